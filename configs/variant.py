"""S090 VARiant: one network, early scales deep and late ones as shallow as one likes (Chen et al. 2025, arXiv 2511.16546).

    python scripts/train.py --config configs/variant.py --variant small --workdir runs/variant --set data.path=mnist.npz
    python scripts/sample.py --workdir runs/variant --labels 0,1,2 --num 8 --out grid.png

Variants: `smoke`, `demo` (scikit-learn's digits, minutes on a CPU), `small` (MNIST or CIFAR-10 at 32 pixels), and `paper`,
VAR-d30 at 256 pixels with subnets of 16, 8, 4 and 2 blocks. `subnet` is the depth at which late scales are sampled, 0 the full
one; the recipe's `sample` takes any as its option `depth`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from configs import var
from jaxgen import config as config_lib
from jaxgen.optim import OptimConfig
from jaxgen.recipe import Recipe
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.next_scale import NextScaleConfig
from jaxgen.recipes.supernet import SupernetConfig, compare_depths

VARIANTS = ("smoke", "demo", "small", "paper")

# Full depth, subnets, scales of the full network.
SIZES = {"smoke": (4, (2, 3), 2), "demo": (6, (2, 3), 2), "small": (8, (2, 4), 3), "paper": (30, (2, 4, 8, 16), 6)}


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return _config(variant).recipe()


def _config(variant: str) -> SupernetConfig:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    base = var.get_config("d30" if variant == "paper" else variant).config
    depth, depths, bridge = SIZES[variant]
    sizes = dict(depth=depth, scan_layers=False) | (dict(width=96, heads=3) if variant == "demo" else {})
    fields = config_lib.fields_of(base, NextScaleConfig)
    fields["model"] = dataclasses.replace(base.model, **sizes)
    if variant == "paper":
        return SupernetConfig(**fields, depths=depths, bridge=bridge, supernet_train=_published_training(base))
    train = base.model_train
    again = dataclasses.replace(train, steps=train.steps * 3 // 4, optim=dataclasses.replace(train.optim, lr=train.optim.lr / 2))
    return SupernetConfig(**fields, depths=depths, bridge=bridge, supernet_train=again)


def _published_training(base: NextScaleConfig):
    """30 epochs after VAR-d30 (5 + 15 + 5 to 15 are published, the last for shallow subnets), AdamW at 1e-6.

    The schedule within is not published; here the rate is constant.
    """
    updates = -(-var.IMAGENET_TRAIN // 1024)
    optim = OptimConfig(lr=1e-6, schedule="constant", weight_decay=0.05, no_decay=var.NO_DECAY)
    return dataclasses.replace(base.model_train, steps=30 * updates, batch_size=1024, optim=optim)


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S090's claims, measured again: speed, cache bytes and quality at each depth, against VAR and against a fixed ratio.

    Args:
      budget: "smoke" (nothing is learnt), or "small" (the digits of `demo`).
      seeds: trainings of each system.
      edits: of the configuration, such as `data.path=...`.
      log: takes progress lines.
    """
    config, smoke = claim_config(_config, budget, edits, small="demo")
    return [compare_depths(config, seeds=seeds, samples=100 if smoke else 1000, log=log)]
