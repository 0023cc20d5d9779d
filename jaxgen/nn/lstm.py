"""A long short-term memory whose weights meet the devices once a sequence, not once a step."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgen.nn.placement import place_rows, place_whole

__all__ = ["LSTM"]

State = tuple[Float[Array, "b d"], Float[Array, "b d"]]


def _cell(z: Float[Array, "b 4 d"], c: Float[Array, "b d"]) -> State:
    """(c, h) after a step, from the gates before their nonlinearities: input, forget, cell, output."""
    c = nn.sigmoid(z[:, 1]) * c + nn.sigmoid(z[:, 0]) * jnp.tanh(z[:, 2])
    return c, nn.sigmoid(z[:, 3]) * jnp.tanh(c)


@jax.custom_vjp
def _recur(x: Float[Array, "l b 4 d"], kernel: Float[Array, "d 4 d"], c: Float[Array, "b d"], h: Float[Array, "b d"]):
    """(c, h) [l, b, d] after each step, of what the inputs add to the gates.

    Left to itself, the backward pass would add to the kernel's gradient, and so sum it over devices, at every step.
    """
    return _forward(x, kernel, c, h)[0]


def _forward(x, kernel, c, h):
    whole = place_whole(kernel)

    def step(state, x):
        c, h = state
        z = x + jnp.einsum("bd,dge->bge", h, whole)
        state = _cell(z, c)
        return state, (z, *state)

    start = place_rows(c), place_rows(h)
    _, (z, cs, hs) = jax.lax.scan(step, start, x)
    return (cs, hs), (z, cs, hs, kernel, *start)


def _backward(kept, grads):
    z, cs, hs, kernel, c, h = kept
    whole = place_whole(kernel)

    def before(first, rest):
        return jnp.concatenate([first[None], rest[:-1]])

    def step(later, xs):
        z, c, *own = xs
        _, pull = jax.vjp(_cell, z, c)
        dz, dc = pull(tuple(map(jnp.add, later, own)))
        return (dc, jnp.einsum("bge,dge->bd", dz, whole)), dz

    none = place_rows(jnp.zeros_like(c)), place_rows(jnp.zeros_like(h))
    (dc, dh), dz = jax.lax.scan(step, none, (z, before(c, cs), *grads), reverse=True)
    return dz, jnp.einsum("lbd,lbge->dge", before(h, hs), dz), dc, dh


_recur.defvjp(_forward, _backward)


def _orthogonal(key, shape, dtype=jnp.float32) -> Float[Array, "d 4 d"]:
    """Each gate's matrix is orthogonal."""
    rows, gates, columns = shape
    draw = nn.initializers.orthogonal()
    return jnp.stack([draw(k, (rows, columns), dtype) for k in jax.random.split(key, gates)], axis=1)


class LSTM(nn.Module):
    """z_t = W x_t + U h_(t-1) + b;  c_t = f c_(t-1) + i tanh(g), h_t = o tanh(c_t), with i, f, o the sigmoids of z's parts.

    Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000. W x is one product for all steps, and so is the
    gradient of U; U is gathered once before the steps.

    Attributes:
      width: d.
      dtype: of the computation, states among it.
    """

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l n"], state: State) -> tuple[Float[Array, "b l d"], Float[Array, "b l d"]]:
        """(c, h) after each of the l inputs, from the state (c, h) before the first."""
        kernel = self.param("kernel", _orthogonal, (self.width, 4, self.width))
        bias = self.param("bias", nn.initializers.zeros, (4, self.width))
        z = nn.DenseGeneral((4, self.width), use_bias=False, dtype=self.dtype, name="input")(place_rows(x))
        z = place_rows(z + bias.astype(self.dtype)).swapaxes(0, 1)
        cs, hs = _recur(z, kernel.astype(self.dtype), *(x.astype(self.dtype) for x in state))
        return place_rows(cs.swapaxes(0, 1)), place_rows(hs.swapaxes(0, 1))
