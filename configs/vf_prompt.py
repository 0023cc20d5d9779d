"""S018 VF prompt: a full-view prompt between the class and the image (Cai et al. 2025, arXiv 2502.16965).

    python scripts/train.py --config configs/vf_prompt.py --variant small --workdir runs/vf --set data.path=mnist.npz
    python scripts/sample.py --workdir runs/vf --labels 0,1,2 --num 8 --cfg 1 --out grid.png

The prompt has as many vectors as the image has tokens. `model.prompt=learned` (the default) learns them; `model.prompt=codes`
draws codes anew for each image, the paper's universal prompt; `model.prompt=class` takes the tokens of another image of the
class, its class prompt, from `class_images` of the training images, which sampling reads again. Paper and code were not to be
had, its abstract and a reader's notes were.

Variants: those of `configs/llamagen.py`, with its data, sizes and budgets; `paper` is LlamaGen-B with 256 vectors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from configs import llamagen
from jaxgen import config as config_lib
from jaxgen.recipe import Recipe
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.image_llama import ImageLlamaConfig
from jaxgen.recipes.prompted import PromptedConfig, PromptedModelConfig, compare_prompts

VARIANTS = llamagen.VARIANTS


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return build(variant).recipe()


def build(variant: str) -> PromptedConfig:
    """The configuration of a variant."""
    return prompted(llamagen.build(variant))


def prompted(base: ImageLlamaConfig) -> PromptedConfig:
    """The same data, tokenizer, sizes and training, with a prompt as long as the image."""
    (side,) = base.tokenizer.patch_nums
    model = PromptedModelConfig(**config_lib.fields_of(base.model) | dict(prompts=side**2))
    # The prompt is no kernel: it does not decay.
    optim = dataclasses.replace(base.model_train.optim, no_decay=(*base.model_train.optim.no_decay, "prompt_embed"))
    train = dataclasses.replace(base.model_train, optim=optim)
    return PromptedConfig(**config_lib.fields_of(base) | dict(model=model, model_train=train))


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S018's claim, measured again: a prompt of each kind against none.

    Args:
      budget: "smoke" (nothing is learnt), or "small" (the digits of `demo`).
      seeds: trainings of each system.
      edits: of the configuration, such as `data.path=...`.
      log: takes progress lines.
    """
    config, smoke = claim_config(build, budget, edits, small="demo")
    return [compare_prompts(config, seeds=seeds, samples=100 if smoke else 1000, log=log)]
