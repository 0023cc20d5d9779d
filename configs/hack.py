"""S165 HACK: a cache in which every head keeps what it needs (Qin et al. 2025, arXiv 2504.09261).

    python scripts/train.py --config configs/hack.py --variant small --workdir runs/hack --set data.path=mnist.npz
    python scripts/sample.py --workdir runs/hack --labels 0,1,2 --num 8 --out grid.png

The system is VAR as it is, trained or converted; the heads are told apart on its own samples before the first image is drawn.
Variants: `smoke`, `demo` (scikit-learn's digits, minutes on a CPU), `small` (MNIST or CIFAR-10 at 32 pixels), and `paper`, the
d30 of VAR at 256 pixels. `cache.keep` is the share of the cache that is kept; the recipe's `sample` has the option `compressed`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from configs import var
from jaxgen import config as config_lib
from jaxgen.recipe import Recipe
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.head_aware import BudgetConfig, HeadAwareConfig
from jaxgen.recipes.head_aware_claims import compare_budgets

VARIANTS = ("smoke", "demo", "small", "paper")

# Half of the cache is what the authors save on VAR-d30 without loss.
BUDGETS = {"smoke": BudgetConfig(samples=8), "paper": BudgetConfig(samples=50)}


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return _config(variant).recipe()


def _config(variant: str) -> HeadAwareConfig:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    base = var.get_config("d30" if variant == "paper" else variant).config
    fields = config_lib.fields_of(base)
    return HeadAwareConfig(**fields, cache=BUDGETS.get(variant, BudgetConfig()))


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S165's claim, measured again: less cache at near-equal output, against the full cache and against equal heads.

    Args:
      budget: "smoke" (nothing is learnt), or "small" (the digits of `demo`).
      seeds: trainings.
      edits: of the configuration, such as `data.path=...`.
      log: takes progress lines.
    """
    config, smoke = claim_config(_config, budget, edits, small="demo")
    return [compare_budgets(config, keeps=(0.5, 0.3), seeds=seeds, samples=100 if smoke else 1000, log=log)]
