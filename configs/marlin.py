"""S137 MARLIN: generation with 4-bit weights, unpacked inside the matmul kernel (Frantar et al. 2024, arXiv 2408.11743).

    python scripts/train.py --config configs/marlin.py --variant demo --workdir runs/int4
    python scripts/sample.py --workdir runs/int4 --labels 0,1,2 --num 8 --out grid.png

A VAR is trained as in `configs/var.py`, then rounded by GPTQ, and sampled from with `kernels_pallas.int4.int4_matmul`.
Variants: `smoke`, `demo` and `small` are VAR's, and `paper` is its largest model for 256 pixels, d30: 2 billion weights, as
the paper's kernels are for models of billions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from configs import var
from jaxgen import config as config_lib
from jaxgen.recipe import Recipe
from jaxgen.recipes import quantised_claims
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.quantised import Int4Config, QuantisedConfig

VARIANTS = {"smoke": "smoke", "demo": "demo", "small": "small", "paper": "d30"}


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return _config(variant).recipe()


def _config(variant: str) -> QuantisedConfig:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    base = var.get_config(VARIANTS[variant]).config
    int4 = Int4Config(steps=2, batch_size=16) if variant == "smoke" else Int4Config()
    return QuantisedConfig(**config_lib.fields_of(base), int4=int4)


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S137's claims, measured again: what rounding to 4 bits costs in quality, and what it saves in bytes and seconds.

    Args:
      budget: "smoke" (nothing is learnt), or "small" (the digits of `demo`, and a layer of 8192 x 8192 alone).
      seeds: trainings of the generator.
      edits: of the configuration, such as `int4.group_size=32`.
      log: takes progress lines.
    """
    config, smoke = claim_config(_config, budget, edits, small="demo")
    batches = (1, 4) if smoke else (1, 8, 32)
    return [
        quantised_claims.compare_precisions(config, seeds=seeds, samples=100 if smoke else 1000, batches=batches, log=log),
        quantised_claims.layer_speed(size=512 if smoke else 8192, rows=(1, 16) if smoke else (1, 4, 16, 32, 64), log=log),
    ]
