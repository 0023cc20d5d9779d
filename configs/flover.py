"""S038 Flover: requests that arrive at any time share every model call (Yao et al. 2023, arXiv 2305.13484).

    python scripts/train.py --config configs/flover.py --variant small --workdir runs/flover
    python scripts/sample.py --workdir runs/flover --prompt "The " --prompt "A function" --num 20 --out text.txt
    python scripts/claim.py S038

Sampling goes through a server with a fixed number of slots, so any number of prompts of any lengths is one compiled step.
Variants: `smoke` (seconds on a CPU), `small` (minutes), and `paper`: the sizes of LLaMA 65B (Touvron et al. 2023, table 2),
one of the models that the authors serve, on bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from configs import language
from jaxgen import config as config_lib
from jaxgen.recipe import Recipe
from jaxgen.recipes import serving_claims
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.language import LanguageModelConfig
from jaxgen.recipes.serving import ServedConfig, ServingConfig

VARIANTS = ("smoke", "small", "paper")


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return _config(variant).recipe()


def _config(variant: str) -> ServedConfig:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    base = language.base("small" if variant == "paper" else variant)
    fields = config_lib.fields_of(base)
    if variant == "smoke":
        return ServedConfig(**fields, serving=ServingConfig(slots=4, chunk=8, narrow=(2,)))
    if variant == "small":
        return ServedConfig(**fields, serving=ServingConfig(slots=16, narrow=(1, 2, 4, 8)))
    llama = LanguageModelConfig(width=8192, heads=64, depth=80, hidden=22016, scan_layers=True, dtype="bfloat16")
    return ServedConfig(**fields | {"model": llama}, serving=ServingConfig(slots=32, chunk=256, narrow=(8, 16)))


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S038's claim, measured again: throughput and latency against one request at a time and against static batches.

    Args:
      budget: "smoke" (nothing is learnt), or "small".
      seeds: streams of requests.
      edits: of the configuration, such as `serving.slots=32`.
      log: takes progress lines.
    """
    config, smoke = claim_config(_config, budget, edits)
    small = dict(requests=48, prompt=(4, 64), new=(8, 64))
    sizes = dict(requests=12, prompt=(2, 12), new=(2, 12)) if smoke else small
    return [serving_claims.compare_serving(config, seeds=seeds, log=log, **sizes)]
