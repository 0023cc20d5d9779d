"""S080 HMAR: scale-Markov next-scale prediction with masked refinement in a scale (Kumbong et al. 2025, arXiv 2506.04421).

    python scripts/train.py --config configs/hmar.py --variant small --workdir runs/hmar --set data.path=mnist.npz
    python scripts/sample.py --workdir runs/hmar --labels 0,1,2 --num 8 --out grid.png

A scale sees itself alone; there is no cache. The last blocks exist twice: once to predict the next scale, and once, trained
afterwards, to predict the masked tokens of a scale. `refiner.passes` says how many tokens become certain at each pass over a
scale; `recipe.sample(..., passes=("1", "1+3", ...))` takes another schedule without training. Variants: `smoke` (seconds on a
CPU), `demo` (scikit-learn's digits, minutes on a CPU), `small` (MNIST or CIFAR-10 at 32 pixels), and the published ImageNet
models `d16`, `d20`, `d24` and `d30` (256 pixels); `paper` is `d16`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from configs import var
from jaxgen import config as config_lib
from jaxgen.decoding.masked_scale import even_passes
from jaxgen.recipe import Recipe
from jaxgen.recipes import claims, markov_scale_claims
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.markov_scale import MarkovConfig
from jaxgen.recipes.next_scale import plain
from jaxgen.recipes.refined_scale import RefinedScaleConfig, RefinerConfig

VARIANTS = ("smoke", "demo", "small", "d16", "d20", "d24", "d30", "paper")

# The schedule of the authors' sampler: the second scale takes two passes and the third four.
PUBLISHED = ("1", "1+3", "1+1+2+5", "16", "25", "36", "64", "100", "169", "256")
REFINER = {
    "smoke": RefinerConfig(depth=1, passes=("1", "1+3", "16")),
    "demo": RefinerConfig(depth=1, passes=("1", "1+3", "1+1+2+5", "16")),
    "small": RefinerConfig(depth=4, passes=("1", "1+3", "1+1+2+5", "16", "36", "64")),
}
# Epochs of the masked half, after those of VAR for the next-scale half.
EPOCHS = 100


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return _config(variant).recipe()


def _config(variant: str) -> RefinedScaleConfig:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    base = var.get_config("d16" if variant == "paper" else variant).config
    fields = config_lib.fields_of(base)
    train, optim = base.model_train, base.model_train.optim
    if variant in REFINER:
        steps, warmup = max(train.steps // 2, 1), optim.warmup_steps
    else:
        updates = -(-var.IMAGENET_TRAIN // train.batch_size)
        steps, warmup = EPOCHS * updates, round(EPOCHS / 50 * updates)
    refiner_train = dataclasses.replace(train, steps=steps, optim=dataclasses.replace(optim, warmup_steps=warmup))
    refiner = REFINER.get(variant, RefinerConfig(depth=8, passes=PUBLISHED))
    return RefinedScaleConfig(**fields, markov=MarkovConfig(weights="normal"), refiner=refiner, refiner_train=refiner_train)


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S080's claims, measured again: quality by schedule, calls, time and memory against VAR; what an update costs.

    All systems get the same tokenizer, images, sizes and updates of the next-scale half; HMAR's masked half gets half as many
    more, as published. HMAR's rows differ in the schedule alone, and share their weights.

    Args:
      budget: "smoke" (nothing is learnt), or "small" (the digits of `demo`; the sizes of `paper` for what is not trained).
      seeds: trainings of each system.
      edits: of the configuration, such as `data.path=...`.
      log: takes progress lines.
    """
    ours, smoke = claim_config(_config, budget, edits, small="demo")

    def scheduled(passes):
        return dataclasses.replace(ours, refiner=dataclasses.replace(ours.refiner, passes=passes))

    systems = {
        "S047 VAR": plain(ours),
        "S080 HMAR, one pass a scale": scheduled(()),
        "S080 HMAR, published schedule": ours,
    }
    if not smoke:
        four = even_passes(ours.build_generator().order, 4)
        systems["S080 HMAR, four passes a scale"] = scheduled(tuple("+".join(map(str, counts)) for counts in four))
    first = "S080 HMAR, one pass a scale"
    comparison = claims.compare_generators(
        systems,
        seeds=seeds,
        samples=100 if smoke else 1000,
        log=log,
        columns=markov_scale_claims.sampling_columns,
        same_weights={name: first for name in systems if "HMAR" in name and name != first},
    )
    sized = ours if smoke else _config("paper")
    models = {"S047 VAR": (plain(sized).build_generator(), None), "S080 HMAR": (sized.build_generator(), None)}
    costs = dict(depth=1 if smoke else 2, repeats=1 if smoke else 3, log=log)
    return [comparison, markov_scale_claims.compare_updates(models, sized.tokenizer.width, **costs)]
