"""The straight path between data and noise, and the flow along it (flow matching; rectified flow)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

__all__ = [
    "METHODS",
    "LinearFlow",
    "integrate",
    "integrate_with",
    "logit_normal_times",
    "times_with_jump",
    "two_speed_times",
    "uniform_times",
]

Velocity = Callable[[Float[Array, "b *n"], Float[Array, ""]], Float[Array, "b *n"]]
Draw = Callable[[Int[Array, ""]], Float[Array, "b *n"]]

METHODS = ("euler", "heun", "noisy")


@dataclasses.dataclass(frozen=True)
class LinearFlow:
    """x_t = (1 - t) x_0 + t noise, with t = 0 the data and t = 1 the noise (Liu et al. 2023; Lipman et al. 2023).

    Its velocity dx_t / dt = noise - x_0 is what a model learns to expect given x_t; following the expectation from t = 1 to t = 0
    turns noise into data.

    Example:
      >>> path = LinearFlow()
      >>> x_t = path.interpolate(x, noise, t)                    # t [b], or of x's shape up to trailing axes
      >>> loss = jnp.square(model(x_t, t) - path.velocity(x, noise)).mean()
    """

    def interpolate(self, x: Float[Array, "b *n"], noise: Float[Array, "b *n"], t: Float[Array, "*b"]) -> Float[Array, "b *n"]:
        """x_t; `t` has the leading axes of `x`, and holds for all numbers of the others."""
        t = _trailing(t, x)
        return (1 - t) * x + t * noise

    def velocity(self, x: Float[Array, "b *n"], noise: Float[Array, "b *n"]) -> Float[Array, "b *n"]:
        """dx_t / dt, the same at every t."""
        return noise - x

    def data(self, x_t: Float[Array, "b *n"], velocity: Float[Array, "b *n"], t: Float[Array, "*b"]) -> Float[Array, "b *n"]:
        """The x_0 that a velocity at x_t points to."""
        return x_t - _trailing(t, x_t) * velocity

    def score(self, x_t: Float[Array, "b *n"], velocity: Float[Array, "b *n"], t: Float[Array, "*b"]) -> Float[Array, "b *n"]:
        """The gradient of the log-density of x_t, -(x_t + (1 - t) velocity) / t for the expected velocity there; t > 0.

        Since x_t + (1 - t) velocity is the expected noise (Ma et al. 2024, *SiT*, arXiv:2401.08740).
        """
        t = _trailing(t, x_t)
        return -(x_t + (1 - t) * velocity) / t


def logit_normal_times(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "*b"]:
    """Levels 1 / (1 + exp(-n)) of standard normal n: most of them in the middle, the hardest (Esser et al. 2024)."""
    return jax.nn.sigmoid(jax.random.normal(key, shape))


def uniform_times(steps: int) -> Float[Array, " steps+1"]:
    """1, 1 - 1 / steps, ..., 0.

    Raises:
      ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: expected at least 1")
    return jnp.linspace(1.0, 0.0, steps + 1)


def times_with_jump(steps: int, last: float = 0.04) -> Float[np.ndarray, " steps+1"]:
    """1 to `last` in equal steps, and from there to 0 in one: for noisy steps, whose score grows without bound near 0.

    Raises:
      ValueError: fewer than two steps, or a `last` outside (0, 1).
    """
    if steps < 2:
        raise ValueError(f"steps={steps}: expected at least 2")
    if not 0 < last < 1:
        raise ValueError(f"last={last}: expected a level between 0 and 1")
    return np.append(np.linspace(1, last, steps), 0).astype(np.float32)


def two_speed_times(steps: int) -> Float[np.ndarray, " steps+1"]:
    """Half of the levels from 1 to 0.3, the others from 0.25 to 0: small steps near the data (FlowAR's released sampler).

    Raises:
      ValueError: an odd number of steps, or fewer than two.
    """
    if steps < 2 or steps % 2:
        raise ValueError(f"steps={steps}: expected an even number")
    half = steps // 2
    return np.concatenate([np.linspace(1, 0.3, half), np.linspace(0.25, 0, half + 1)]).astype(np.float32)


def integrate(
    velocity: Velocity, x: Float[Array, "b *n"], times: Float[Array, " steps+1"], *, method: str = "euler"
) -> Float[Array, "b *n"]:
    """Follows dx / dt = velocity(x, t) along `times`, in one compiled loop.

    Args:
      velocity: of all rows at one time.
      x: where the flow is at times[0].
      times: monotone, of any spacing; 1 to 0 makes data of noise.
      method: "euler", or "heun", which calls `velocity` twice a step.

    Raises:
      ValueError: an unknown method, or fewer than two times.
    """
    if method not in ("euler", "heun"):
        raise ValueError(f"method={method!r}: expected euler or heun")
    return integrate_with(lambda x, t, state: (velocity(x, t), state), x, times, (), method=method)[0]


def integrate_with(
    velocity: Callable[..., tuple[Float[Array, "b *n"], Any]],
    x: Float[Array, "b *n"],
    times: Float[Array, " steps+1"],
    state: Any,
    *,
    method: str = "euler",
    draw: Draw | None = None,
) -> tuple[Float[Array, "b *n"], Any]:
    """`integrate` for velocities that carry something, such as a cache that is written in place; and with noise.

    The method "noisy" runs dx = (velocity - t score) dt + sqrt(2 t) dW down `times`, by Euler and Maruyama's steps. The noise
    that each step adds and the score takes back (see `LinearFlow.score`) leave the law at every t that of the flow, and wash out
    errors of earlier steps (Ma et al. 2024). The last step adds none. Times then decrease, and are above 0 but for the last.

    Args:
      velocity: `(x, t, state) -> (velocity, state)`.
      x: where the flow is at times[0].
      times: as in `integrate`.
      state: a pytree of fixed shapes.
      method: "euler", "heun" or "noisy".
      draw: of "noisy": step 0, 1, ... -> standard normal numbers of x's shape.

    Returns:
      (x at the last time, the last state).

    Raises:
      ValueError: an unknown method, noise where there is to be none or the reverse, or fewer than two times.
    """
    if method not in METHODS or (method == "noisy") != (draw is not None):
        raise ValueError(f"method={method!r}, draw={draw}: expected one of {', '.join(METHODS)}, and noise for noisy alone")
    if times.ndim != 1 or times.shape[0] < 2:
        raise ValueError(f"times {times.shape}: expected at least two of them")
    times, last = jnp.asarray(times), times.shape[0] - 2

    def step(carry, at):
        x, state = carry
        i, t, following = at
        slope, state = velocity(x, t, state)
        if method == "noisy":
            slope = slope - t * LinearFlow().score(x, slope, t)
        moved = x + (following - t) * slope
        if method == "heun":
            second, state = velocity(moved, following, state)
            moved = x + (following - t) * 0.5 * (slope + second)
        if method == "noisy":
            moved = moved + jnp.where(i < last, jnp.sqrt(2 * t * (t - following)), 0) * draw(i)
        return (moved, state), None

    return jax.lax.scan(step, (x, state), (jnp.arange(last + 1), times[:-1], times[1:]))[0]


def _trailing(t, x):
    """`t` with axes of one behind it, so that it broadcasts against `x`."""
    t = jnp.asarray(t)
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))
