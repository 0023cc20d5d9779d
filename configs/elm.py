"""S152 ELM: a plain language model over binary image codes, parted into sub-vocabularies (Liu et al. 2024, arXiv 2410.16257).

    python scripts/train.py --config configs/elm.py --variant small --workdir runs/elm --set data.path=mnist.npz
    python scripts/sample.py --workdir runs/elm --labels 0,1,2 --num 8 --cfg 1 --top_k 8 --out grid.png

What the paper tries is a setting here: `tokenizer.code=bernoulli` (its binary autoencoder) or `spherical` (BSQ), `tokenizer.bits`
and `model.parts` (2 parts of 10 bits are its 2-10), and of sampling temperature, top-k, top-p and a guidance weight for each
token. `configs/llamagen.py` has the quantiser with a codebook. `model.modeling=masked` is the paper's masked language model, on
the same blocks, embeddings and heads (theirs is told each part apart, by a head that is tied to the embeddings); `reveal.steps`
and `reveal.choice_temperature` sample it.

Variants: those of `configs/llamagen.py` with its data and budgets and a binary code; `paper` is ELM-L with 2 x 10 bits for
ImageNet at 256 pixels, as in the authors' script, `xl` is the next; `xxl` and `2b` have 2 x 12 bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from configs import llamagen, var
from jaxgen import config as config_lib
from jaxgen.recipe import Recipe
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.image_llama import ImageLlamaConfig
from jaxgen.recipes.sub_vocabulary import BinaryTokenizerConfig, SubVocabularyConfig, SubVocabularyModelConfig, compare_parts

# Width, blocks, heads, hidden width and bits of a part; all have two parts.
PUBLISHED = {
    "paper": (1024, 24, 16, 2816, 10),
    "xl": (1280, 36, 20, 3584, 10),
    "xxl": (1536, 48, 24, 4096, 12),
    "2b": (1792, 48, 28, 4864, 12),
}
VARIANTS = ("smoke", "demo", "small", *PUBLISHED)

# Bits of a cell where there are no published ones.
BITS = {"smoke": 4, "demo": 12, "small": 12}


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return build(variant).recipe()


def build(variant: str) -> SubVocabularyConfig:
    """The configuration of a variant."""
    if variant in PUBLISHED:
        width, depth, heads, hidden, bits = PUBLISHED[variant]
        base = llamagen.published(width, depth, heads, hidden, 16)
        train = dataclasses.replace(base.model_train, steps=400 * (var.IMAGENET_TRAIN // 256))
        return binary(dataclasses.replace(base, model_train=train), bits=2 * bits)
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    return binary(llamagen.build(variant), bits=BITS[variant])


def binary(base: ImageLlamaConfig, *, bits: int) -> SubVocabularyConfig:
    """The same data, sizes and training, with bits in the place of a codebook."""
    tokenizer = BinaryTokenizerConfig(**config_lib.fields_of(base.tokenizer, BinaryTokenizerConfig), bits=bits)
    train = dataclasses.replace(base.tokenizer_train, revive_every=0)
    parts = dict(tokenizer=tokenizer, tokenizer_train=train, model=SubVocabularyModelConfig(**config_lib.fields_of(base.model)))
    return SubVocabularyConfig(**config_lib.fields_of(base) | parts)


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S152's claim, measured again: the same bits as one token a cell and as several, and a causal model against a masked one.

    Args:
      budget: "smoke" (nothing is learnt), or "small" (the digits of `demo`).
      seeds: trainings of each system.
      edits: of the configuration, such as `data.path=...`.
      log: takes progress lines.
    """
    config, smoke = claim_config(build, budget, edits, small="demo")
    return [compare_parts(config, (2, 1) if smoke else (2, 3, 1), seeds=seeds, samples=100 if smoke else 1000, log=log)]
