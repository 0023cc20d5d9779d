"""S011 M-VAR: attention within scales, Mamba-2 between them (Ren et al. 2024, arXiv 2411.10433).

    python scripts/train.py --config configs/m_var.py --variant small --workdir runs/m_var --set data.path=mnist.npz
    python scripts/sample.py --workdir runs/m_var --labels 0,1,2 --num 8 --out grid.png

Variants: `smoke`, `demo` (scikit-learn's digits, minutes on a CPU), `small` (MNIST or CIFAR-10 at 32 pixels), and the published
ImageNet models `d12`, `d16`, `d20`, `d24` and `d30` (256 pixels); `paper` is `d24`, the one of 1.5B parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from configs import var
from jaxgen import config as config_lib
from jaxgen.recipe import Recipe
from jaxgen.recipes import claims
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.next_scale import NextScaleConfig
from jaxgen.recipes.next_scale_costs import generator_costs
from jaxgen.recipes.scale_recurrent import MixerConfig, ScaleRecurrentConfig

VARIANTS = ("smoke", "demo", "small", "d12", "d16", "d20", "d24", "d30", "paper")

# Parameters that are not decayed: those of VAR, and the vectors of the Mamba-2 layers.
NO_DECAY = (*var.NO_DECAY, "mixer/A_log", "mixer/D")


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return _config(variant).recipe()


def _config(variant: str) -> ScaleRecurrentConfig:
    if variant in ("smoke", "demo", "small"):
        # Two thirds of VAR's blocks have as many parameters.
        depth, mixer = {
            "smoke": (2, MixerConfig(state_size=8, state_head=16)),
            "demo": (2, MixerConfig(state_size=16, state_head=32)),
            "small": (5, MixerConfig()),
        }[variant]
        return _extended(var.get_config(variant).config, depth, mixer)
    if variant in VARIANTS:
        name = "d24" if variant == "paper" else variant
        # The authors train d12 as d16; theirs and VAR's commands are the same but for the depth.
        base = var.get_config("d16" if name == "d12" else name).config
        depth = int(name[1:])
        base = dataclasses.replace(base, model=dataclasses.replace(base.model, drop_path_rate=0.1 * depth / 24))
        # Their README turns the normalisation of queries and keys off for the sizes up to d20.
        return _extended(base, depth, MixerConfig(), l2_norm=depth > 20)
    raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")


def _extended(base: NextScaleConfig, depth: int, mixer: MixerConfig, **model) -> ScaleRecurrentConfig:
    """The system on the tokenizer and the schedule of `base`."""
    fields = config_lib.fields_of(base)
    fields["model"] = dataclasses.replace(base.model, depth=depth, **model)
    optim = dataclasses.replace(base.model_train.optim, no_decay=NO_DECAY)
    fields["model_train"] = dataclasses.replace(base.model_train, optim=optim)
    return ScaleRecurrentConfig(**fields, mixer=mixer)


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S011's claim, measured again: what an image costs, and how good it is, against VAR of as many parameters.

    A block has 27 d^2 parameters where VAR's has 18 d^2, so two blocks stand against three of the same width; both get the same
    tokenizer, images and updates. A second table counts the published sizes in their traced programs.

    Args:
      budget: "smoke" (nothing is learnt), or "small" (the digits of `demo`).
      seeds: trainings of each system.
      edits: of the configuration, such as `data.path=...`.
      log: takes progress lines.
    """
    ours, smoke = claim_config(_config, budget, edits, small="demo")
    fields = config_lib.fields_of(ours, NextScaleConfig)
    depth = ours.model.depth * 3 // 2
    theirs = NextScaleConfig(**fields | dict(model=dataclasses.replace(ours.model, depth=depth)))
    comparison = claims.compare_generators(
        {"S047 VAR": theirs, "S011 M-VAR": ours},
        seeds=seeds,
        samples=100 if smoke else 1000,
        log=log,
        columns=lambda recipe, params: generator_costs(recipe.config),
    )
    return [comparison, _published_costs(("d16",) if smoke else ("d20", "d24", "d30"), log)]


def _published_costs(sizes: Sequence[str], log: Callable[[str], None]) -> Claim:
    rows = []
    for size in sizes:
        for name, config in (("S047 VAR", var.get_config(size).config), ("S011 M-VAR", _config(size))):
            for pixels, scales in ((256, var.SCALES_256), (512, var.SCALES_512)):
                log(f"{name} {size} at {pixels} pixels: counting")
                config = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, patch_nums=scales))
                rows.append({"system": f"{name} {size}", "pixels": pixels} | generator_costs(config))
    notes = "With guidance, without the tokenizer; GFLOP of matrix products in the program; from d24 on updates run blocks twice."
    return Claim("Published sizes: what an image costs", rows, notes)
