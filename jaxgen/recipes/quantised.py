"""A next-scale system whose sampler runs on 4-bit weights (S137 MARLIN): one more stage, which rounds them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from jaxgen.adapters import (
    Int4Module,
    Linear,
    get_kernel,
    gptq,
    int4_layers,
    linear_layers,
    replace_kernel,
    unstack_layers,
    with_hessians,
)
from jaxgen.data import image_batches
from jaxgen.decoding import Known, Settings
from jaxgen.generators import NextScaleSampler, NextScaleTransformer
from jaxgen.objectives.likelihood import drop_labels
from jaxgen.recipe import Recipe, Stage, modules
from jaxgen.recipes.fields import check_fields
from jaxgen.recipes.next_scale import NextScaleConfig, generator_stage
from jaxgen.tokenizers import MultiScaleTokenizer
from kernels_pallas.int4 import group_scales, nearest, pack_values

__all__ = ["Int4Config", "Int4Sampler", "QuantisedConfig", "int4_stage", "packed_generator"]

METHODS = ("rtn", "gptq")


@dataclasses.dataclass(frozen=True)
class Int4Config:
    """How weights become 4-bit ones.

    Attributes:
      method: "gptq", or "rtn" (round to nearest), which needs no data.
      group_size: inputs that share a scale; in a layer of k inputs their largest common divisor.
      clip: see `kernels_pallas.int4.pack_int4`.
      damp: see `jaxgen.adapters.gptq`.
      head: also the layers outside the blocks, the first and the last.
      steps: batches of training images that "gptq" looks at ("rtn" is done after any); 0 takes the weights from the work
        directory as they are.
      batch_size: of those.
    """

    method: str = "gptq"
    group_size: int = 128
    clip: str = "mse"
    damp: float = 0.01
    head: bool = False
    steps: int = 8
    batch_size: int = 128

    def __post_init__(self):
        for name, known in (("method", METHODS), ("clip", ("max", "mse"))):
            if getattr(self, name) not in known:
                raise ValueError(f"int4.{name}={getattr(self, name)!r}: expected one of {', '.join(known)}")
        check_fields("int4", self, group_size=8, damp=0, steps=0, batch_size=1)


# Columns of kernels are rounded each by itself; Hessians are of their rows.
RULES = (
    (r"int4/.*/(values|scales)$", P(None, ("fsdp", "tensor"))),
    (r"hessians/", P(("fsdp", "tensor"), None)),
)


@dataclasses.dataclass(frozen=True)
class QuantisedConfig(NextScaleConfig):
    """`NextScaleConfig` with a last stage "int4", whose weights the sampler uses."""

    int4: Int4Config = Int4Config()

    def build_sampler(self) -> Int4Sampler:
        """From key and labels to images."""
        return Int4Sampler(generator=self.build_generator(), tokenizer=self.build_tokenizer())

    def recipe(self) -> Recipe:
        """The stages and the sampler."""
        base = super().recipe()
        return dataclasses.replace(base, stages=(*base.stages, int4_stage(self)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4Sampler:
    """`NextScaleSampler` on the weights of an `int4_stage`, used like it.

    The blocks are unrolled: a loop over stacked layers would copy a layer's words before a kernel can read them.

    Attributes:
      generator: that the weights were trained in.
      tokenizer: see `NextScaleSampler`.
      implementation: see `kernels_pallas.int4.int4_matmul`.
    """

    generator: NextScaleTransformer
    tokenizer: MultiScaleTokenizer
    implementation: str | None = None
    _last: list = dataclasses.field(default_factory=list, compare=False, repr=False)

    def __call__(self, params: dict, key, labels, settings: Settings = Settings(), known: Known | None = None):
        """(images, tokens), see `NextScaleSampler.__call__`; `params` has the entry "int4" besides.

        Raises:
          ValueError: there are no 4-bit weights, or they are not this generator's.
        """
        if "int4" not in params:
            raise ValueError(f"no 4-bit weights: the stage 'int4' is missing, there are {', '.join(sorted(params))}")
        packed = {"generator": self._pack(params["generator"], params["int4"]), "tokenizer": params["tokenizer"]}
        return self._sampler(packed, key, labels, settings, known)

    def param_shapes(self) -> dict:
        """See `NextScaleSampler.param_shapes`; "int4" is checked when it is packed."""
        return NextScaleSampler(generator=self.generator, tokenizer=self.tokenizer).param_shapes()

    @functools.cached_property
    def _sampler(self) -> NextScaleSampler:
        generator = Int4Module(self.generator.clone(scan_layers=False), self.implementation)
        return NextScaleSampler(generator=generator, tokenizer=self.tokenizer)

    def _pack(self, generator, values):
        """The variables with packed kernels; remembered for as long as the same ones are sampled from."""
        if not self._last or self._last[0] is not generator or self._last[1] is not values:
            self._last[:] = [generator, values, packed_generator(generator, values)]
        return self._last[2]


def packed_generator(generator, values: Mapping[str, Mapping[str, Any]]):
    """Unrolled variables of a generator, with 4-bit kernels from the parameters of an `int4_stage`.

    Raises:
      ValueError: values of other layers than the generator has.
    """
    variables = unstack_layers(generator)
    for path, layer in values.items():
        kernel, (k, n) = get_kernel(variables, path), layer["values"].shape
        if kernel.size != k * n:
            raise ValueError(f"int4: {path} is [{k}, {n}] and the generator's kernel {kernel.shape}")
        variables = replace_kernel(variables, path, pack_values(layer["values"].astype(jnp.int8), layer["scales"]))
    return variables


def int4_stage(config: QuantisedConfig) -> Stage:
    """The stage that rounds the generator's weights.

    Its parameters are `{"int4": {path: {"values": integers in -8..7 as bfloat16 [k, n], "scales": bfloat16 [groups, n]}}}`:
    floats, since gradients are taken of a stage's parameters, though nothing is learnt by gradients here. With "gptq" the
    state is the Hessians, summed over the batches, and the last update solves for the integers.
    """
    options, width = config.int4, config.tokenizer.width
    unrolled = dataclasses.replace(config, model=dataclasses.replace(config.model, scan_layers=False, remat=False))
    module, base = unrolled.build_generator(), generator_stage(unrolled)

    @functools.cache
    def layers() -> dict[str, Linear]:
        order = module.order
        features = jax.ShapeDtypeStruct((1, order.length - order.sizes[0], width), jnp.float32)
        found = linear_layers(module, module.param_shapes(width), jax.ShapeDtypeStruct((1,), jnp.int32), features)
        return {path: layer for path, layer in found.items() if options.head or path.startswith("transformer/")}

    def rounded(frozen, hessians=None):
        """Nearest values, or GPTQ's."""
        variables, values = unstack_layers(modules(frozen)["generator"]), {}
        for path, layer in layers().items():
            group, w = math.gcd(layer.k, options.group_size), get_kernel(variables, path).reshape(layer.matrix)
            if group < 8:
                size = options.group_size
                raise ValueError(f"int4.group_size={size}: a scale of {path} would have {group} of {layer.k} inputs")
            if hessians is None:
                scales = group_scales(w, group, clip=options.clip, dtype=jnp.bfloat16)
                q = nearest(w, scales)
            else:
                q, scales = gptq(w, hessians[path], group, damp=options.damp, clip=options.clip)
            values[path] = {"values": q.astype(jnp.bfloat16), "scales": scales}
        return values

    def init(key, frozen):
        values = rounded(frozen)
        if options.method == "rtn":
            return {"int4": values}, ()
        hessians = {path: jnp.zeros((layer.k, layer.k)) for path, layer in layers().items()}
        return {"int4": values}, {"hessians": hessians, "int4": values}

    def loss(params, state, batch, key, step, frozen):
        """The float model's, on images and labels as in training; only "gptq" looks at them."""
        if options.method == "rtn":
            return jnp.zeros(()), ({}, state)
        labels = drop_labels(key, batch["label"], module.num_classes, config.model_train.class_drop)
        variables = {"generator": unstack_layers(modules(frozen)["generator"])}
        watched = with_hessians(module, base.eval_loss, layers())
        metrics, sums = watched(variables, (), batch | {"label": labels}, key, frozen)
        hessians = jax.tree.map(jnp.add, state["hessians"], sums)
        last = step == options.steps - 1
        values = jax.lax.cond(last, lambda: rounded(frozen, hessians), lambda: state["int4"])
        return metrics.pop("loss"), (metrics, {"hessians": hessians, "int4": values})

    def after_update(params, state, key, step):
        return {"int4": state["int4"]}, state

    def eval_loss(params, state, batch, key, frozen):
        """The generator's, with 4-bit weights."""
        variables = {"generator": packed_generator(modules(frozen)["generator"], params["int4"])}
        with int4_layers():
            return base.eval_loss(variables, (), batch, key, frozen)

    return Stage(
        name="int4",
        steps=options.steps,
        init=init,
        loss=loss,
        optimizer=optax.set_to_zero(),
        data=functools.partial(image_batches, config.data, options.batch_size, "train"),
        needs=("tokenizer", "generator"),
        after_update=after_update if options.method == "gptq" else None,
        eval_data=base.eval_data,
        eval_loss=eval_loss,
        rules=RULES,
    )
