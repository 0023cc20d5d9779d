"""How data is corrupted on the way from t = 0, the data, to t = 1, noise.

Masking: every token is replaced by the mask on its own with probability `rate(t)` (Sahoo et al. 2024, section 3.2; Shi
et al. 2024), so its law is that of data where it is not masked, and the reverse only ever fills masks in.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

__all__ = ["Cosine", "Linear", "Masking", "Power", "Schedule"]


class Schedule(Protocol):
    """The share of tokens that are masked at time t; rises from rate(0) = 0 to rate(1) = 1."""

    def rate(self, t: Float[Array, "*b"]) -> Float[Array, "*b"]: ...

    def time(self, rate: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """The inverse of `rate`."""


@dataclasses.dataclass(frozen=True)
class Linear:
    """rate = t, the log-linear noise of masked diffusion models (Sahoo et al. 2024) and of BD3-LM."""

    def rate(self, t):
        return jnp.asarray(t, jnp.float32)

    def time(self, rate):
        return jnp.asarray(rate, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Cosine:
    """rate = sin(pi t / 2): MaskGIT's cosine of the share that is done, cos(pi (1 - t) / 2) (Chang et al. 2022, section 3.3)."""

    def rate(self, t):
        return jnp.sin(0.5 * jnp.pi * jnp.asarray(t, jnp.float32))

    def time(self, rate):
        return jnp.arcsin(jnp.clip(jnp.asarray(rate, jnp.float32), 0.0, 1.0)) * 2 / jnp.pi


@dataclasses.dataclass(frozen=True)
class Power:
    """rate = t ** exponent (BD3-LM, Arriola et al. 2025).

    Attributes:
      exponent: > 0; more than 1 masks less.
    """

    exponent: float

    def __post_init__(self):
        if not self.exponent > 0:
            raise ValueError(f"exponent={self.exponent} must be positive")

    def rate(self, t):
        return jnp.asarray(t, jnp.float32) ** self.exponent

    def time(self, rate):
        return jnp.asarray(rate, jnp.float32) ** (1 / self.exponent)


@dataclasses.dataclass(frozen=True)
class Masking:
    """The masking path.

    Attributes:
      mask: the id that masked tokens get; not one that the model predicts.
      schedule: how many are masked when.
    """

    mask: int
    schedule: Schedule = Linear()

    def corrupt(
        self, key: Key[Array, ""], tokens: Int[Array, "b l"], t: Float[Array, "b *l"], *, exact: bool = False
    ) -> tuple[Int[Array, "b l"], Bool[Array, "b l"]]:
        """(tokens at time t, which of them are masked).

        Args:
          key: of the draw.
          tokens: data.
          t: one time a row, [b], or one a token, [b, l], such as one for each block.
          exact: mask exactly ceil(rate l) tokens of a row, as MaskGIT and MAR are trained, instead of each on its own.

        Raises:
          ValueError: times that fit neither, or one a token where counts are exact.
        """
        t = jnp.asarray(t)
        if t.shape not in (tokens.shape[:1], tokens.shape) or (exact and t.ndim != 1):
            raise ValueError(f"t {t.shape} does not fit tokens {tokens.shape}: expected [b]" + ("" if exact else " or [b, l]"))
        rate = self.schedule.rate(t)
        rate = rate[:, None] if rate.ndim == 1 else rate
        u = jax.random.uniform(key, tokens.shape)
        if exact:
            # A hair less than the product, so that rounding does not mask one more than its exact value asks for.
            u, rate = jnp.argsort(jnp.argsort(u, axis=1), axis=1), jnp.ceil(tokens.shape[1] * (rate - 2.5e-7))
        masked = u < rate
        return jnp.where(masked, self.mask, tokens), masked

    def weight(self, t: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """rate'(t) / rate(t), the weight of a masked token in the bound on the likelihood (Sahoo et al. 2024, section 3.4)."""
        t = jnp.asarray(t, jnp.float32)
        rate, slope = jax.jvp(self.schedule.rate, (t,), (jnp.ones_like(t),))
        return slope / rate
