"""S085 MVAR: scale-Markov and spatial-Markov next-scale prediction (Zhang et al. 2025, arXiv 2505.12742).

    python scripts/train.py --config configs/mvar.py --variant small --workdir runs/mvar --set data.path=mnist.npz
    python scripts/sample.py --workdir runs/mvar --labels 0,1,2 --num 8 --out grid.png

A scale sees the picture so far, at its own grid, and in the last scales a window of it; there is no cache. Updates take the
first scales together and each of the last ones alone. Variants: `smoke` (seconds on a CPU), `demo` (scikit-learn's digits,
minutes on a CPU), `small` (MNIST or CIFAR-10 at 32 pixels), and `paper`: MVAR-d16 on ImageNet at 256 pixels, from scratch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from configs import var
from jaxgen import config as config_lib
from jaxgen.recipe import Recipe
from jaxgen.recipes import claims, markov_scale_claims
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.markov_scale import MarkovConfig, MarkovScaleConfig
from jaxgen.recipes.next_scale import plain

VARIANTS = ("smoke", "demo", "small", "paper")

# The window of the published models is 7 x 7, in the last two of ten scales (refine_step and kernel_size in their code).
MARKOV = {
    "smoke": MarkovConfig(window=3, since=2, packed=2, turns=2),
    "demo": MarkovConfig(window=3, since=3, packed=3, turns=2),
    "small": MarkovConfig(window=5, since=4, packed=4, turns=4),
    "paper": MarkovConfig(window=7, since=8, packed=8, turns=8),
}


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return _config(variant).recipe()


def _config(variant: str) -> MarkovScaleConfig:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    base = var.get_config("d16" if variant == "paper" else variant).config
    fields = config_lib.fields_of(base)
    if variant == "paper":
        # Their README's command and the defaults of its arguments; images are cropped in the middle and mirrored.
        batch, epochs = 448, 300
        updates = -(-var.IMAGENET_TRAIN // batch)
        optim = dataclasses.replace(base.model_train.optim, lr=1e-4 * batch / 256, warmup_steps=round(epochs / 50 * updates))
        fields["model_train"] = dataclasses.replace(base.model_train, steps=epochs * updates, batch_size=batch, optim=optim)
        fields["data"] = dataclasses.replace(base.data, mid_scale=1.0, flip=True)
    return MarkovScaleConfig(**fields, markov=MARKOV[variant])


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S085's claims, measured again: quality, memory and no cache against VAR; updates of a part of the scales; O(N k) attention.

    Both systems get the same tokenizer, images, sizes and updates. An MVAR update sees a part of the tokens, so MVAR is trained
    once more with all scales in every update, as its authors also do (appendix D.5).

    Args:
      budget: "smoke" (nothing is learnt), or "small" (the digits of `demo`; the sizes of `paper` for what is not trained).
      seeds: trainings of each system.
      edits: of the configuration, such as `markov.window=1`.
      log: takes progress lines.
    """
    ours, smoke = claim_config(_config, budget, edits, small="demo")
    together = dataclasses.replace(ours, markov=dataclasses.replace(ours.markov, packed=0))
    comparison = claims.compare_generators(
        {"S047 VAR": plain(ours), "S085 MVAR, scales apart": ours, "S085 MVAR, all scales an update": together},
        seeds=seeds,
        samples=100 if smoke else 1000,
        log=log,
        columns=markov_scale_claims.sampling_columns,
    )
    sized = ours if smoke else _config("paper")
    groups = sized.groups()
    model, often = sized.build_generator(), dict(repeats=1 if smoke else 3, log=log)
    systems = {"S047 VAR": (plain(sized).build_generator(), None), "S085 MVAR, all scales": (model, None)}
    names = ("the first together", *(f"scale {end} alone" for _, end in groups[1:]))
    systems |= {f"S085 MVAR, {name}": (model, group) for name, group in zip(names, groups)}
    updates = markov_scale_claims.compare_updates(systems, sized.tokenizer.width, depth=1 if smoke else 2, **often)
    sides = (4, 8) if smoke else (16, 24, 32, 48, 64)
    return [comparison, updates, markov_scale_claims.compare_windows(sides, sized.markov.window, **often)]
