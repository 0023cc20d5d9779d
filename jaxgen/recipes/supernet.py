"""One next-scale network of many depths (S090 VARiant): its configuration, its stage, its sampler, and its claim."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxgen import config as config_lib
from jaxgen.generators.supernet import SupernetTransformer
from jaxgen.recipe import Recipe, Stage
from jaxgen.recipes.claims import Claim, add_times, mean_and_spread, sampling_costs, train_all
from jaxgen.recipes.evaluation import evaluate_images
from jaxgen.recipes.fields import check_fields
from jaxgen.recipes.next_scale import ModelTrainConfig, NextScaleConfig, generator_stage, sample_images
from jaxgen.recipes.next_scale_costs import generator_costs

__all__ = ["SubnetShare", "SupernetConfig", "compare_depths", "supernet_stage"]


@dataclasses.dataclass(frozen=True)
class SubnetShare:
    """The probability that an update trains a subnet, and not the full network: `first`, then a straight line up to `last`.

    With the published values the full network has eight of ten updates for 5 epochs, fewer and fewer for 15 more, and none for
    the last 5 to 15, where it learns through the scales that all depths share. Equal shares are training at a fixed ratio.

    Attributes:
      first: share up to `rise_from`.
      last: share from `rise_to` on.
      rise_from, rise_to: shares of the training.
    """

    first: float = 0.2
    last: float = 1.0
    rise_from: float = 5 / 30
    rise_to: float = 20 / 30

    def __post_init__(self):
        check_fields("share", self, shares=("first", "last", "rise_from", "rise_to"))
        if self.rise_from >= self.rise_to:
            raise ValueError(f"share.rise_from={self.rise_from}: expected less than share.rise_to={self.rise_to}")

    def at(self, progress):
        """The probability when `progress` of the training, in [0, 1], is done."""
        risen = jnp.clip((progress - self.rise_from) / (self.rise_to - self.rise_from), 0.0, 1.0)
        return self.first + (self.last - self.first) * risen


@dataclasses.dataclass(frozen=True)
class SupernetConfig(NextScaleConfig):
    """`NextScaleConfig` with a stage "supernet" after "generator", which teaches the network to do with fewer blocks.

    Attributes:
      depths, bridge: see `SupernetTransformer`.
      subnet: blocks of the late scales when nothing else is asked for; 0 is all.
      supernet_train: how the stage is trained.
      share: whom it trains when.
    """

    depths: tuple[int, ...] = (2, 4, 8)
    bridge: int = 6
    subnet: int = 0
    supernet_train: ModelTrainConfig = ModelTrainConfig()
    share: SubnetShare = SubnetShare()

    def __post_init__(self):
        self.build_generator()

    def build_generator(self) -> SupernetTransformer:
        """The generator module at the depth `subnet`."""
        fields = self._generator_fields() | dict(depths=self.depths, bridge=self.bridge, subnet=self.subnet)
        return SupernetTransformer(patch_nums=self.tokenizer.patch_nums, **fields)

    def at(self, subnet: int) -> SupernetConfig:
        """The configuration at another depth."""
        return dataclasses.replace(self, subnet=subnet)

    def recipe(self) -> Recipe:
        """The stages and the sampler, which takes the option `depth`: blocks of the late scales, one of `depths` or all."""
        base = NextScaleConfig.recipe(self.at(0))
        tokenizer, generator, *rest = base.stages
        samplers = {subnet: self.at(subnet).build_sampler() for subnet in (0, *self.depths)}
        samplers[self.model.depth] = samplers[0]
        sample = functools.partial(_sample, samplers, self.subnet)
        return dataclasses.replace(base, config=self, stages=(tokenizer, generator, supernet_stage(self), *rest), sample=sample)


def _sample(samplers: Mapping[int, Any], subnet: int, params, key, labels, *, depth: int | None = None, **options) -> dict:
    """`sample_images` at a depth; each is compiled when it is first asked for.

    Raises:
      ValueError: a depth that is not in the supernet.
    """
    if depth is not None and depth not in samplers:
        raise ValueError(f"depth={depth} is not in the supernet, which has {', '.join(map(str, sorted(samplers)))} (0 is all)")
    return sample_images(samplers[subnet if depth is None else depth], params, key, labels, **options)


def supernet_stage(config: SupernetConfig) -> Stage:
    """Goes on from the full network of the stage "generator": each update trains it or, with `config.share`, one of the subnets.

    A subnet's update passes the bridge's scales through all blocks, and the others through its own. The subnet is drawn evenly:
    of the paper only summaries could be had, with its equations and schedule, and they do not say how.
    """
    train, subnets = config.supernet_train, (0, *config.depths)
    stages = [generator_stage(dataclasses.replace(config, model_train=train, subnet=subnet)) for subnet in subnets]

    def init(key, frozen):
        # A copy: the stage gives its parameters away at each update.
        return {"generator": jax.tree.map(jnp.copy, frozen["generator"]["generator"])}, ()

    def loss(params, state, batch, key, step, frozen):
        coin, pick, key = jax.random.split(key, 3)
        share = config.share.at(step / train.steps)
        subnet = jnp.where(jax.random.bernoulli(coin, share), jax.random.randint(pick, (), 1, len(subnets)), 0)
        branches = [stage.loss for stage in stages]
        value, (metrics, state) = jax.lax.switch(subnet, branches, params, state, batch, key, step, frozen)
        return value, (metrics | {"share": share}, state)

    def eval_loss(params, state, batch, key, frozen):
        measured = [stage.eval_loss(params, state, batch, key, frozen) for stage in stages]
        each = {f"nll_d{subnet}": m["nll"] for subnet, m in zip(subnets[1:], measured[1:])}
        return measured[0] | each | {"loss": sum(m["loss"] for m in measured) / len(measured)}

    needs = ("tokenizer", "generator")
    return dataclasses.replace(stages[0], name="supernet", init=init, loss=loss, eval_loss=eval_loss, needs=needs)


def compare_depths(config: SupernetConfig, *, seeds: int, samples: int, fixed: float = 0.5, log: Callable[[str], None]) -> Claim:
    """Quality and costs at each depth: VAR of equal size, the supernet, and the supernet at a fixed ratio.

    VAR gets the updates of both stages. All sample without guidance and truncation and are judged by one classifier.

    Args:
      config: of the supernet.
      seeds: trainings of each.
      samples: images that are judged.
      fixed: the share of the subnets' updates at a fixed ratio.
      log: takes progress lines.
    """
    fields = config_lib.fields_of(config, NextScaleConfig)
    whole = dataclasses.replace(config.model_train, steps=config.model_train.steps + config.supernet_train.steps)
    baseline = NextScaleConfig(**fields | dict(model_train=whole))
    systems = {
        "S047 VAR": baseline,
        "S090 VARiant": config,
        f"fixed ratio {fixed}": dataclasses.replace(config, share=SubnetShare(first=fixed, last=fixed)),
    }
    measured: dict[tuple[str, int], list[dict]] = {}
    last: dict[str, tuple[Recipe, dict]] = {}
    common: dict[str, dict] = {}
    for seed in range(seeds):
        base: dict[str, dict] = {}
        for name, system in systems.items():
            log(f"{name}: seed {seed}")
            recipe, params, _ = train_all(system, seed, common | base, log)
            common = {stage: params[stage] for stage in ("tokenizer", "classifier")}
            base = {"generator": params["generator"]} if "supernet" in params else {}
            last[name] = recipe, params
            for depth in (config.model.depth, *reversed(config.depths)) if base else (config.model.depth,):
                row = _measure(recipe, params, depth, seed, samples)
                measured.setdefault((name, depth), []).append(row)
    rows, timed = [], []
    for (name, depth), values in measured.items():
        row = {"system": name, "late depth": depth, "model calls": len(config.tokenizer.patch_nums)}
        row |= {column: mean_and_spread([v[column] for v in values]) for column in values[0]}
        system, (recipe, params) = systems[name], last[name]
        row |= generator_costs(system.at(depth % config.model.depth) if name != "S047 VAR" else system)
        timed.append((_at(recipe, depth), params))
        rows.append(row | sampling_costs(*timed[-1]))
    add_times(rows, timed)
    notes = (
        f"{seeds} seeds; mean (spread). The first {config.bridge} of {len(config.tokenizer.patch_nums)} scales pass all "
        f"{config.model.depth} blocks. VAR has as many updates as the supernet's two stages together."
    )
    return Claim("One network at several depths", rows, notes)


def _measure(recipe: Recipe, params: dict, depth: int, seed: int, samples: int) -> dict:
    """What `compare_generators` measures of a system, at one depth."""
    settings = dict(cfg=0.0, top_k=0, top_p=0.0)
    result, _ = evaluate_images(_at(recipe, depth), params, jax.random.key(seed), num=samples, batch_size=100, settings=settings)
    return {"class accuracy": result["generation"]["class_accuracy"], "Frechet": result["generation"]["frechet"]}


def _at(recipe: Recipe, depth: int) -> Recipe:
    """Samples at a depth, where the system has several."""
    if not hasattr(recipe.config, "depths"):
        return recipe
    return dataclasses.replace(recipe, sample=functools.partial(recipe.sample, depth=depth))
