"""Self-autoregressive refinement (S008 SAR): a last stage that trains a next-scale model on its own predictions."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxgen.data import image_batches, pixels
from jaxgen.decoding import truncate
from jaxgen.objectives.likelihood import cross_entropy, drop_labels
from jaxgen.objectives.student_forcing import contrastive_student_forcing, staggered_inputs
from jaxgen.optim import OptimConfig, adamw
from jaxgen.recipe import Recipe, Stage, modules
from jaxgen.recipes.fields import check_fields
from jaxgen.recipes.flexible_scales import FlexibleConfig, Forcing
from jaxgen.recipes.next_scale import NextScaleConfig, generator_stage

__all__ = ["FlexibleRefinementConfig", "RefineConfig", "RefinementConfig", "refine_stage"]


@dataclasses.dataclass(frozen=True)
class RefineConfig:
    """How a trained generator is refined.

    Attributes:
      steps: updates; 0 takes the generator from the work directory as it is.
      batch_size: global.
      accumulate: micro-batches an update.
      ema: decay, 0 is off.
      weight: of the contrastive student-forcing loss; 0 is plain teacher forcing, without the second forward pass.
      draw: predictions are drawn; otherwise the likeliest, as in the authors' shorter runs.
      cfg: guidance of what is drawn, half of it at the first scale and all at the last; 0 is none, and saves a forward pass.
      top_k, top_p: of what is drawn; 0 is off.
      optim: AdamW and its schedule.
    """

    steps: int = 100
    batch_size: int = 768
    accumulate: int = 1
    ema: float = 0.0
    weight: float = 0.01
    draw: bool = False
    cfg: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    optim: OptimConfig = OptimConfig()

    def __post_init__(self):
        check_fields("refine", self, steps=0, batch_size=1, accumulate=1, weight=0, cfg=0, top_k=0, shares=("ema", "top_p"))
        if not self.draw and (self.cfg or self.top_k or self.top_p):
            raise ValueError(
                f"refine.cfg={self.cfg}, refine.top_k={self.top_k} and refine.top_p={self.top_p} need refine.draw=true"
            )


@dataclasses.dataclass(frozen=True)
class RefinementConfig(NextScaleConfig):
    """`NextScaleConfig` with a stage "refine" after the generator's, whose weights the sampler uses."""

    refine: RefineConfig = RefineConfig()

    def forcing(self, variables, images, key) -> Forcing:
        """A training batch; `key` is not used, since the scales are always the same."""
        tokenizer, generator, frozen = self.build_tokenizer(), self.build_generator(), variables["tokenizer"]
        order = tokenizer.order
        tokens = tokenizer.apply(frozen, images, method="encode")

        def feed(picture, scale, ids):
            return tokenizer.apply(frozen, picture, scale, ids, method="feed")

        def rollout(predicted):
            empty = jnp.zeros((len(images), *order.shapes[-1], tokenizer.width))
            return jax.lax.stop_gradient(staggered_inputs(feed, order, empty, tokens, predicted))

        inputs = jax.lax.stop_gradient(self.teacher_inputs(tokenizer, frozen, tokens))
        share = jnp.full(order.length, 1 / order.length)
        ramp = jnp.asarray(order.step_of) / max(order.steps - 1, 1)
        return Forcing(tokens, inputs, rollout, generator.apply, share, ramp, order.sizes[0])

    def recipe(self) -> Recipe:
        """The stages and the sampler."""
        return _refined(super().recipe(), self)


@dataclasses.dataclass(frozen=True)
class FlexibleRefinementConfig(FlexibleConfig):
    """`FlexibleConfig`, the published case, with a stage "refine" after the generator's."""

    refine: RefineConfig = RefineConfig()

    def recipe(self) -> Recipe:
        """The stages and the sampler."""
        return _refined(super().recipe(), self)


def _refined(base: Recipe, config: Any) -> Recipe:
    """`base` with the stage after the generator's; the sampler takes the last stage's generator."""
    at = [stage.name for stage in base.stages].index("generator") + 1
    return dataclasses.replace(base, stages=(*base.stages[:at], refine_stage(config), *base.stages[at:]))


def refine_stage(config: Any) -> Stage:
    """Teacher forcing and, on the model's own predictions, the contrastive student-forcing loss (Zhou et al. 2025, section 4).

    L = L_TF + weight L_CSF. The first forward pass reads true tokens; its predictions are the inputs and the targets of the
    second, which covers all scales. (The released code rolls out the last scale alone, with the class as its only context.)

    Args:
      config: with `refine` and `forcing(variables, images, key) -> Forcing`.
    """
    options, null = config.refine, config.num_classes
    base = generator_stage(config)

    def init(key, frozen):
        return {"generator": jax.tree.map(jnp.asarray, modules(frozen)["generator"])}, ()

    def predictions(forcing: Forcing, variables, labels, logits, key):
        if not options.draw:
            return logits.argmax(-1)
        if options.cfg:
            t = 0.5 * options.cfg * (1 + forcing.ramp)[:, None]
            logits = (1 + t) * logits - t * forcing.logits(variables, jnp.full_like(labels, null), forcing.inputs)
        return jax.random.categorical(key, truncate(logits, top_k=options.top_k, top_p=options.top_p))

    def loss(params, state, batch, key, step, frozen):
        list_key, drop_key, draw_key, *paths = jax.random.split(key, 5)
        variables, labels = params["generator"], drop_labels(drop_key, batch["label"], null, config.model_train.class_drop)
        forcing = config.forcing(modules(frozen), pixels(batch["image"]), list_key)
        logits = forcing.logits(variables, labels, forcing.inputs, train=True, rngs={"dropout": paths[0]})
        value = (cross_entropy(logits, forcing.tokens) * forcing.share).sum(1).mean()
        metrics = {"nll": value}
        if options.weight:
            fixed = jax.lax.stop_gradient(variables)
            made = predictions(forcing, fixed, batch["label"], jax.lax.stop_gradient(logits), draw_key)
            student = forcing.logits(variables, labels, forcing.rollout(made), train=True, rngs={"dropout": paths[1]})
            metrics["student"] = contrastive_student_forcing(student, made, forcing.share, forcing.first).mean()
            value = value + options.weight * metrics["student"]
        return value, (metrics, state)

    return dataclasses.replace(
        base,
        name="refine",
        steps=options.steps,
        init=init,
        loss=loss,
        optimizer=adamw(options.optim, options.steps) if options.steps else optax.identity(),
        data=functools.partial(image_batches, config.data, options.batch_size, "train"),
        needs=("tokenizer", "generator"),
        ema=options.ema,
        accumulate=options.accumulate,
    )
