"""Whether features learnt from patches in semantic order say more to a linear classifier than those of other orders (S140)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxgen.data import DataConfig, pixels
from jaxgen.metrics import linear_probe
from jaxgen.recipes.claims import Claim, mean_and_spread, train_all
from jaxgen.recipes.evaluation import held_out
from jaxgen.recipes.semantic_patches import SemanticPatchConfig

__all__ = ["compare_orders", "probes"]

NAMES = {"semantic": "S140 SemAIM, semantic order"}


def compare_orders(
    config: SemanticPatchConfig,
    orders: Sequence[str],
    *,
    targets: Sequence[str] = ("features", "pixels"),
    seeds: int,
    limit: int = 10_000,
    log: Callable[[str], None],
) -> Claim:
    """Linear probes of models that differ in the order of the patches alone, for each kind of target.

    Models of one seed share the encoder that orders the patches and says the targets; it is probed, too, and so is a model that
    has learnt nothing.

    Args:
      config: of all that is shared.
      orders: see `SemanticTrainConfig.order`.
      targets: see `SemanticTrainConfig.target`.
      seeds: trainings of each.
      limit: examples of each split that are probed.
      log: takes progress lines.

    Raises:
      ValueError: no seeds.
    """
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: expected at least 1")
    measured: dict[tuple[str, str], list[dict]] = {}
    for seed in range(seeds):
        shared: dict = {}
        for target, order in ((target, order) for target in targets for order in orders):
            log(f"{order} order, {target}: seed {seed}")
            train = dataclasses.replace(config.model_train, order=order, target=target)
            system = dataclasses.replace(config, model_train=train)
            recipe, params, _ = train_all(system, seed, shared if target == "features" else {}, log)
            system, shared = recipe.config, shared | {name: params[name] for name in params if name == "encoder"}
            name = NAMES.get(order, f"{order} order")
            measured.setdefault((name, target), []).append(_learnt(system, params, limit))
        start, _ = jax.jit(recipe.stage("generator").init)(jax.random.key(seed), shared)
        measured.setdefault(("nothing learnt", ""), []).append(_learnt(system, {"generator": start}, limit))
        if shared:
            measured.setdefault(("the encoder that is predicted", ""), []).append(_told(config, shared["encoder"], limit))
    rows = [
        {"system": name, "target": target} | {column: mean_and_spread([row[column] for row in found]) for column in found[0]}
        for (name, target), found in measured.items()
    ]
    title = "Linear probes of models that predicted patches in several orders, of equal size, data and training budget"
    notes = f"{seeds} seeds; mean (spread) of the share of held-out images that a linear classifier of frozen features names."
    return Claim(title, rows, notes)


def _learnt(config: SemanticPatchConfig, params: dict, limit: int) -> dict:
    return probes(lambda images: config.encode(params, images), config.data, limit)


def _told(config: SemanticPatchConfig, variables: dict, limit: int) -> dict:
    config = dataclasses.replace(config, model_train=dataclasses.replace(config.model_train, target="features"))
    return probes(jax.jit(lambda images: config.judge(variables, images)), config.data, limit)


def probes(
    encode: Callable[[Float[Array, "b H W C"]], Float[Array, "b 1+n d"]], data: DataConfig, limit: int = 10_000
) -> dict[str, float]:
    """How many held-out images a linear classifier names by the features of the whole, and by the mean of the patches'.

    Args:
      encode: from images in [-1, 1] to features, the whole first.
      data: whose training split the classifier is fitted to, and whose test split it names.
      limit: examples of each.
    """
    found: dict[str, list] = {}
    for split in ("train", "test"):
        parts = []
        for batch in held_out(data, batch_size=256, limit=limit, split=split):
            tokens = np.asarray(encode(pixels(batch["image"])))
            parts.append((tokens[:, 0], tokens[:, 1:].mean(axis=1), batch["label"]))
        whole, mean, labels = (np.concatenate(column) for column in zip(*parts))
        for name, features in (("probe of the whole", whole), ("probe of the patches' mean", mean)):
            found.setdefault(name, []).append((features, labels))
    return {name: linear_probe(train, test) for name, (train, test) in found.items()}
