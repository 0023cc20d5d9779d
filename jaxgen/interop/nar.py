"""Official NAR checkpoints: the class- or caption-conditional Llama of neighbours of ThisisBillhe/NAR, for images.

model = load(generator="c2i_B.pt", tokenizer="vq_ds16_c2i.pt")          # the tokenizer is LlamaGen's
images, tokens = model.sample(jax.random.key(0), [207, 980], cfg=2.0)
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgen.generators import NeighbourLlama
from jaxgen.interop import llamagen
from jaxgen.interop.calls import read_params
from jaxgen.interop.mapping import Rule, linear_rules, to_torch

__all__ = ["NAR", "load", "load_generator"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class NAR(llamagen.LlamaGen):
    """A generator with its parameters, and a tokenizer with its own or none. Attributes and methods are those of `LlamaGen`."""

    generator: NeighbourLlama

    def _published(self) -> dict[str, np.ndarray]:
        tensors = to_torch(self.params["generator"]["params"], generator_rules(self.generator))
        return _one_list(tensors, self.generator.depth)


def load(
    *,
    generator: str,
    tokenizer: str | None = None,
    num_heads: int | None = None,
    grid: int | None = None,
    head_depth: int = 1,
    scan_layers: bool = True,
    dtype: Any = jnp.float32,
) -> NAR:
    """Reads a published checkpoint.

    Args:
      generator: `c2i_*.pt`, `t2i_*.pt`, or their safetensors.
      tokenizer: LlamaGen's `vq_ds16_*.pt` or its safetensors; None is for tokens alone.
      num_heads, grid, scan_layers, dtype: see `jaxgen.interop.llamagen.load`.
      head_depth: blocks before the head that looks down, which the file does not tell from the others; 1 as published.

    Raises:
      ValueError: fewer blocks than that, or see `jaxgen.interop.llamagen.load`.
    """
    fields = dict(num_heads=num_heads, grid=grid, head_depth=head_depth, scan_layers=scan_layers, dtype=dtype)
    module, variables = load_generator(generator, **fields)
    return llamagen.with_tokenizer(NAR, module, variables, (generator, tokenizer), dtype)


def load_generator(
    path: str,
    *,
    num_heads: int | None = None,
    grid: int | None = None,
    head_depth: int = 1,
    scan_layers: bool = True,
    dtype: Any = jnp.float32,
):
    """The generator's module and variables (numpy); see `load`."""
    state, sizes = llamagen.read_generator(path, num_heads=num_heads, grid=grid)
    depth = sizes.pop("depth") - head_depth
    if depth < 1 or head_depth < 1:
        raise ValueError(f"head_depth={head_depth}: {path} has {depth + head_depth} blocks, of which one at least comes before")
    module = NeighbourLlama(**sizes, depth=depth, head_depth=head_depth, scan_layers=scan_layers, dtype=jnp.dtype(dtype))
    expected = module.param_shapes()["params"]
    state = _two_lists(state, depth)
    return module, {"params": read_params(path, state, generator_rules(module), llamagen.BUFFERS, expected)}


def _two_lists(state: Mapping[str, np.ndarray], depth: int) -> dict[str, np.ndarray]:
    """The blocks after the first `depth` under a name of their own, counted from 0."""

    def rename(match):
        i = int(match[1])
        return f"layers.{i}." if i < depth else f"medusa_layers.{i - depth}."

    return {re.sub(r"^layers\.(\d+)\.", rename, name): array for name, array in state.items()}


def _one_list(state: Mapping[str, np.ndarray], depth: int) -> dict[str, np.ndarray]:
    """The inverse of `_two_lists`."""
    after = re.compile(r"^medusa_layers\.(\d+)\.")
    return {after.sub(lambda match: f"layers.{int(match[1]) + depth}.", name): array for name, array in state.items()}


def generator_rules(module: NeighbourLlama) -> tuple[Rule, ...]:
    """LlamaGen's names, and those of what the second head has to itself."""
    return (
        *llamagen.generator_rules(module),
        *llamagen.block_rules(module, "medusa_layers", "stacks_0"),
        Rule("medusa_norm.weight", "norms_0/scale"),
        *linear_rules("medusa_output", "heads_before_0", bias=False),
    )
