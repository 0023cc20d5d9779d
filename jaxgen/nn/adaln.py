"""Adaptive layer normalisation: the condition sets scale, shift and gate (Peebles & Xie 2023, section 3.2)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["AdaLNHead", "Modulation", "SharedModulation", "layer_norm", "rms_norm"]


def layer_norm(x: Float[Array, "b l d"], eps: float = 1e-6) -> Float[Array, "b l d"]:
    """(x - mean) / sqrt(var + eps) over the last axis, in float32, without parameters."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(jnp.square(x - mean).mean(-1, keepdims=True) + eps)


def rms_norm(x: Float[Array, "b l d"], eps: float = 1e-6) -> Float[Array, "b l d"]:
    """x / sqrt(mean(x^2) + eps) over the last axis, in float32, without parameters (Zhang & Sennrich 2019)."""
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + eps)


def _scaled(init, factors):
    """`init` times `factors`, one for each part on axis -2."""

    def scaled(key, shape, dtype=jnp.float32):
        return init(key, shape, dtype) * jnp.asarray(factors, dtype)[:, None]

    return scaled


def _factors(branches: int, gate: float, rest: float) -> tuple[float, ...]:
    """Factors in the order of VAR's published checkpoints: the gates of all branches, their scales, their shifts."""
    return (gate,) * branches + (rest,) * (2 * branches)


def _parts(width: int, factors: tuple[float, ...], kernel_init, dtype=jnp.float32, *, name: str) -> nn.DenseGeneral:
    """A dense layer from [*b, d] to [*b, parts, width], with an initial scale for each part."""

    def init(key, shape, dtype=jnp.float32):
        # `DenseGeneral` asks for a matrix.
        parts = _scaled(kernel_init, factors)(key, (shape[0], len(factors), width), dtype)
        return parts.reshape(shape)

    return nn.DenseGeneral((len(factors), width), kernel_init=init, dtype=dtype, name=name)


class Modulation(nn.Module):
    """Three vectors for each branch of a block from the condition; of two: gate 1, gate 2, scale 1, scale 2, shift 1, shift 2.

    Attributes:
      width: of the blocks.
      branches: n, of a block.
      gate_init: factor on the initial kernel of the gates; small, so that blocks start near the identity.
      rest_init: factor on the initial kernel of scales and shifts.
    """

    width: int
    branches: int = 2
    kernel_init: Any = nn.initializers.xavier_uniform()
    gate_init: float = 1e-5
    rest_init: float = 0.5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, cond: Float[Array, "*b d"]) -> Float[Array, "*b 3*n d"]:
        factors = _factors(self.branches, self.gate_init, self.rest_init)
        return _parts(self.width, factors, self.kernel_init, self.dtype, name="dense")(nn.silu(cond))


class SharedModulation(nn.Module):
    """The block's own offset to the vectors that all blocks share, three for each of its n branches."""

    gate_init: float = 1e-5
    rest_init: float = 0.5

    @nn.compact
    def __call__(self, shared: Float[Array, "*b 3*n d"]) -> Float[Array, "*b 3*n d"]:
        parts, width = shared.shape[-2:]
        init = _scaled(nn.initializers.normal(width**-0.5), _factors(parts // 3, self.gate_init, self.rest_init))
        return self.param("offset", init, (parts, width)) + shared


class AdaLNHead(nn.Module):
    """Adaptive norm and the classifier over the vocabulary, in float32.

    Attributes:
      vocab: v.
      rest_init: factor on the initial kernel of scale and shift.
      head_init: factor on the initial kernel of the classifier.
    """

    vocab: int
    kernel_init: Any = nn.initializers.xavier_uniform()
    rest_init: float = 0.5
    head_init: float = 0.02

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"], cond: Float[Array, "b *l d"]) -> Float[Array, "b l v"]:
        """Logits; the condition is one a row, or one a position."""
        cond = cond if cond.ndim == 3 else cond[:, None]
        ada = _parts(x.shape[-1], (self.rest_init,) * 2, self.kernel_init, name="ada")(nn.silu(cond))
        scale, shift = jnp.moveaxis(ada, -2, 0)

        def head_init(*args):
            return self.kernel_init(*args) * self.head_init

        return nn.Dense(self.vocab, kernel_init=head_init, name="head")(layer_norm(x) * (1 + scale) + shift)
