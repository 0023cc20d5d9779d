"""S119 STree: trees of drafts verified by a state-space model in one call (Wu et al. 2025, arXiv 2505.14969).

    python scripts/train.py --config configs/stree.py --variant small --workdir runs/stree --set data.path=shakespeare.txt
    python scripts/sample.py --workdir runs/stree --prompt "To be, or" --num 3 --out text.txt

A Mamba-2 language model on bytes, and a one-block transformer that drafts for it. Variants: `smoke` (a hybrid with attention, so
that both kinds of layers run), `small`, and `paper`: the sizes of Mamba2-2.7B with a draft of 68 million weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from configs import spectr
from jaxgen.data.text import TextConfig
from jaxgen.recipe import Recipe
from jaxgen.recipes import state_space
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.language import LanguageModelConfig, LanguageTrainConfig
from jaxgen.recipes.state_space import StateSpaceConfig, StateSpaceFields

VARIANTS = ("smoke", "small", "paper")


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return _config(variant).recipe()


def _config(variant: str) -> StateSpaceConfig:
    if variant == "paper":
        model = LanguageModelConfig(vocab=50288, width=2560, heads=20, depth=64, dtype="bfloat16")
        return StateSpaceConfig(
            data=TextConfig(length=2048),
            model=model,
            model_train=LanguageTrainConfig(steps=300_000, batch_size=512),
            draft=LanguageModelConfig(vocab=50288, width=768, heads=12, depth=2, hidden=3072, dtype="bfloat16"),
            draft_train=LanguageTrainConfig(steps=100_000, batch_size=512),
            ssm=StateSpaceFields(state_size=128, head_size=64),
            tree=(4, 3, 2, 1, 1),
        )
    pair = spectr.pair(variant)
    if variant == "smoke":
        ssm = StateSpaceFields(state_size=4, head_size=8, attention_every=2)
        return StateSpaceConfig(**pair, ssm=ssm, tree=(2, 1))
    model = LanguageModelConfig(width=160, heads=4, depth=3)
    return StateSpaceConfig(**pair | dict(model=model))


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S119's claim, measured again: trees of drafts against chains, on a state-space model.

    Args:
      budget: "smoke" (nothing is learnt) or "small".
      seeds: of the samplings; the models are trained once, for the method is lossless.
      edits: of the configuration, such as `data.path=shakespeare.txt`.
      log: takes progress lines.
    """
    config, smoke = claim_config(_config, budget, edits)
    sizes = dict(prompts=1, new_tokens=4, repeats=1) if smoke else dict(prompts=16, new_tokens=128, repeats=3)
    return [state_space.compare_shapes(config, seeds=1 if smoke else seeds, **sizes, log=log)]
