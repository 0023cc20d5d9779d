"""S110 Counterfactual token generation: the same noise under an intervention (Chatzi et al. 2025, arXiv 2409.17027).

    python scripts/train.py --config configs/counterfactual.py --variant small --workdir runs/told --set data.path=shakespeare.txt
    python scripts/sample.py --workdir runs/told --prompt "To be, or" --num 3 --out told.txt

A byte language model writes a text, one byte of it is changed, and it goes on with the noise of the first time. Variants: `smoke`
(seconds on a CPU), `small` (minutes), and `paper`: the sizes of Llama 3 8B, on bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from configs import language
from jaxgen import config as config_lib
from jaxgen.data.text import TextConfig
from jaxgen.optim import OptimConfig
from jaxgen.recipe import Recipe
from jaxgen.recipes import counterfactual_claims as claims
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.counterfactual import CounterfactualConfig, ReplayConfig
from jaxgen.recipes.language import LanguageConfig, LanguageModelConfig, LanguageTrainConfig

VARIANTS = ("smoke", "small", "paper")


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return _config(variant).recipe()


def _config(variant: str) -> CounterfactualConfig:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    base = _llama() if variant == "paper" else language.base(variant)
    fields = config_lib.fields_of(base)
    return CounterfactualConfig(**fields, replay=ReplayConfig(drafts=3 if variant == "smoke" else 8))


def _llama() -> LanguageConfig:
    """Llama 3 8B (Grattafiori et al. 2024, table 3), without its vocabulary; the paper trains nothing."""
    return LanguageConfig(
        data=TextConfig(length=2048),
        model=LanguageModelConfig(
            vocab=128256,
            width=4096,
            heads=32,
            kv_heads=8,
            depth=32,
            hidden=14336,
            theta=500000.0,
            scan_layers=True,
            remat=True,
            dtype="bfloat16",
        ),
        model_train=LanguageTrainConfig(
            steps=100_000,
            batch_size=512,
            optim=OptimConfig(lr=3e-4, warmup_steps=2000, schedule="cosine", lr_end=0.1, clip=1.0, no_decay=("scale",)),
        ),
    )


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S110's claim, measured again: a counterfactual stays closer to the factual text than the model's free continuation.

    Args:
      budget: "smoke" (nothing is learnt), or "small" (the byte model of `configs/language.py`, trained once).
      seeds: of prompts, noise and interventions.
      edits: of the configuration, such as `data.path=tinyshakespeare.txt`.
      log: takes progress lines.
    """
    config, smoke = claim_config(_config, budget, edits)
    sizes = dict(texts=4, prompt=8, length=24) if smoke else dict(texts=32, prompt=32, length=128)
    temperatures = (1.0,) if smoke else (0.2, 0.6, 1.0)
    return [claims.compare_noise(config, temperatures=temperatures, seeds=seeds, log=log, **sizes)]
