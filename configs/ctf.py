"""S019 CTF: coarse-to-fine tokens, clusters of codes in turn and then all codes at once (Guo et al. 2025, arXiv 2503.16194).

    python scripts/train.py --config configs/ctf.py --variant small --workdir runs/ctf --set data.path=mnist.npz
    python scripts/sample.py --workdir runs/ctf --labels 0,1,2 --num 8 --cfg 1 --out grid.png

n x n tokens take n^2 calls of a model that chooses among few clusters, and one of a second model that chooses codes. The authors
sample the two at temperatures of their own (their table 3): `--temperature` is that of both, and
`--option "fine={'temperature': 0.9, 'cfg': 1.0}"` sets the codes' apart.

Variants: those of `configs/llamagen.py`, with its data and budgets, and a larger codebook at the small sizes, where about half of
the blocks predict clusters; `paper` has LlamaGen-B for both. Of the paper's text an abstract, its tables and a summary were to be
had: that the second model has as many blocks as the first, and that there are 512 clusters, is not from there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from configs import llamagen
from jaxgen import config as config_lib
from jaxgen.recipe import Recipe
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.coarse_to_fine import CoarseToFineConfig, CoarseToFineModelConfig, compare_flat
from jaxgen.recipes.image_llama import ImageLlamaConfig

VARIANTS = llamagen.VARIANTS

# Codes and clusters where there are no published ones.
SIZES = {"smoke": (16, 4), "demo": (256, 16), "small": (2048, 64)}


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return build(variant).recipe()


def build(variant: str) -> CoarseToFineConfig:
    """The configuration of a variant."""
    base = llamagen.build(variant)
    if variant in llamagen.PUBLISHED:
        return clustered(base, clusters=512, fine_depth=base.model.depth)
    vocab, clusters = SIZES[variant]
    fine = base.model.depth // 2
    model = dataclasses.replace(base.model, depth=base.model.depth - fine)
    tokenizer = dataclasses.replace(base.tokenizer, vocab=vocab)
    return clustered(dataclasses.replace(base, model=model, tokenizer=tokenizer), clusters=clusters, fine_depth=fine)


def clustered(base: ImageLlamaConfig, *, clusters: int, fine_depth: int) -> CoarseToFineConfig:
    """The same data, tokenizer, sizes and training, with a second model."""
    model = CoarseToFineModelConfig(**config_lib.fields_of(base.model), clusters=clusters, fine_depth=fine_depth)
    return CoarseToFineConfig(**config_lib.fields_of(base) | dict(model=model))


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S019's claim, measured again: clusters first against a flat codebook, with as many blocks in all.

    Args:
      budget: "smoke" (nothing is learnt), or "small" (the digits of `demo`).
      seeds: trainings of each system.
      edits: of the configuration, such as `data.path=...`.
      log: takes progress lines.
    """
    config, smoke = claim_config(build, budget, edits, small="demo")
    return [compare_flat(config, seeds=seeds, samples=100 if smoke else 1000, log=log)]
