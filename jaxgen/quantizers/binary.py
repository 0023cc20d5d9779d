"""Codes without a codebook: each feature becomes the nearest corner of a cube in the unit sphere, one bit a channel.

Lookup-free quantisation (Yu et al. 2024, MAGVIT-v2) takes the sign of every channel; binary spherical quantisation (BSQ, Zhao et
al. 2024, arXiv:2406.07548, section 4) does so to unit vectors, so that codes are +-1 / sqrt(c). `BinaryScales` adds such codes
scale by scale and corrects itself (Infinity, Han et al. 2024, arXiv:2412.04431, sections 3.2 and 3.4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxgen.quantizers.multi_scale import Quantized
from jaxgen.quantizers.scale_sum import ScaleSum
from jaxgen.resample import resize

__all__ = [
    "BinaryScales",
    "bernoulli_bits",
    "bits_of",
    "codes_of",
    "entropy_penalty",
    "joined_bits",
    "parted_bits",
    "spherical_codes",
]


def bits_of(features: Float[Array, "*b c"]) -> Int[Array, "*b c"]:
    """1 where a channel is positive, else 0: the corner that is nearest, whatever the length of the features."""
    return (features > 0).astype(jnp.int32)


def codes_of(bits: Int[Array, "*b c"]) -> Float[Array, "*b c"]:
    """(2 bit - 1) / sqrt(c), unit vectors."""
    return (2.0 * bits - 1.0) / jnp.sqrt(jnp.float32(bits.shape[-1]))


def spherical_codes(features: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
    """The codes of features, whose gradient is that of the features' direction (BSQ, equations 8 and 9)."""
    unit = _unit(features)
    return unit + jax.lax.stop_gradient(codes_of(bits_of(features)) - unit)


def bernoulli_bits(features: Float[Array, "*b c"], key: Key[Array, ""] | None = None) -> Float[Array, "*b c"]:
    """Bits as numbers 0 and 1, whose gradient is that of p = sigmoid(features) (binary autoencoders, Wang et al. 2023).

    Args:
      features: logits.
      key: draws each bit with probability p; None takes the likelier value, `bits_of`.
    """
    p = jax.nn.sigmoid(features)
    bits = bits_of(features) if key is None else jax.random.bernoulli(key, p)
    return p + jax.lax.stop_gradient(bits - p)


def joined_bits(bits: Int[Array, "*b c"], parts: int) -> Int[Array, "*b n"]:
    """Each of `parts` runs of c / n bits as one number, its first bit the smallest."""
    runs = bits.reshape(*bits.shape[:-1], parts, -1)
    return (runs << jnp.arange(runs.shape[-1])).sum(-1).astype(jnp.int32)


def parted_bits(numbers: Int[Array, "*b n"], bits: int) -> Int[Array, "*b c"]:
    """The c bits of n numbers: undoes `joined_bits`."""
    runs = (numbers[..., None] >> jnp.arange(bits // numbers.shape[-1])) & 1
    return runs.reshape(*numbers.shape[:-1], bits)


def entropy_penalty(
    features: Float[Array, "*b c"], *, inverse_temperature: float = 100.0, diversity: float = 1.0
) -> Float[Array, ""]:
    """E[H(q(u))] - diversity H(E[q(u)]) in nats: features should be sure of their bits, and all bits used (BSQ, equation 12).

    With u = x / |x|, the law q(u) of a soft code factorises over the bits, P(bit) = sigmoid(4 tau u / sqrt(c)) as in the authors'
    code; the entropy of the mean is taken bit by bit, which bounds it from above.

    Args:
      features: any number of them.
      inverse_temperature: tau.
      diversity: weight of the second term.
    """
    logits = 4 * inverse_temperature * _unit(features) / features.shape[-1] ** 0.5
    on, off = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    sure = -(jnp.exp(on) * on + jnp.exp(off) * off).sum(-1).mean()
    mean = jnp.exp(on).reshape(-1, features.shape[-1]).mean(0)
    used = -(jax.scipy.special.xlogy(mean, mean) + jax.scipy.special.xlogy(1 - mean, 1 - mean)).sum()
    return sure - diversity * used


def _unit(x):
    """x / |x|, finite at 0, gradient included."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


@dataclasses.dataclass(frozen=True, kw_only=True)
class BinaryScales(ScaleSum):
    """Features as a sum over scales of enlarged binary codes; it has no parameters.

    Residuals are pooled by areas; codes and the picture so far are resampled bilinearly, as Infinity does.

    Attributes:
      width: c, channels of the features, and bits of a cell.
      patch_nums: grid of tokens of each scale.
      patch: p, a token is p x p cells, with c p^2 bits and features in the order of PyTorch's `pixel_unshuffle`; Infinity's 8B
        model has 2.

    Example:
      >>> scales = BinaryScales(width=32, patch_nums=(1, 2, 4, 6))
      >>> bits = scales.encode(features)                  # features [b, 6, 6, 32], bits [b, 57, 32]
      >>> inputs = scales.inputs(bits)                    # [b, 56, 32]
    """

    width: int
    patch_nums: tuple
    patch: int = 1

    def __post_init__(self):
        for name in ("width", "patch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        _ = self.order  # raises for scales that decrease

    @property
    def bits(self) -> int:
        """Of a token."""
        return self.width * self.patch**2

    def _cells(self, scale: int) -> tuple[int, int]:
        h, w = self.order.shapes[scale]
        return h * self.patch, w * self.patch

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) of the picture, in cells."""
        return self._cells(self.order.steps - 1)

    def _to_tokens(self, grid: Float[Array, "b h w c"]) -> Float[Array, "b q d"]:
        b, h, w, c = grid.shape
        p = self.patch
        grid = grid.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 5, 2, 4)
        return grid.reshape(b, -1, c * p * p)

    def _to_cells(self, scale: int, tokens: Float[Array, "b q d"]) -> Float[Array, "b h w c"]:
        h, w = self.order.shapes[scale]
        p = self.patch
        grid = tokens.reshape(-1, h, w, self.width, p, p).transpose(0, 1, 4, 2, 5, 3)
        return grid.reshape(-1, h * p, w * p, self.width)

    def added(self, scale: int, tokens: Int[Array, "b q d"]) -> Float[Array, "b h w c"]:
        """What the bits of a scale add to the picture: their codes, enlarged."""
        return resize(codes_of(self._to_cells(scale, tokens)), self.size, "bilinear")

    def seen(self, picture: Float[Array, "b h w c"], scale: int) -> Float[Array, "b q d"]:
        """The picture at the cells of a scale."""
        return self._to_tokens(resize(picture, self._cells(scale), "bilinear"))

    def encode(self, features: Float[Array, "b h w c"]) -> Int[Array, "b l d"]:
        """Bits of all scales, coarse to fine."""
        return self._quantize(jax.lax.stop_gradient(features), lambda scale, bits: bits)[0]

    def corrected(
        self, features: Float[Array, "b h w c"], key: Key[Array, ""], *, strength: float, scales: int | None = None
    ) -> tuple[Int[Array, "b l d"], Float[Array, "b l-first d"]]:
        """Bits to predict and what to predict them from, where mistakes were made: bitwise self-correction (algorithm 2).

        At each scale a share of the bits, drawn uniformly from 0 .. strength (in hundredths), is turned over and goes so into the
        picture; the bits of the next scales then correct it, as a model must its own mistakes.

        Args:
          features: of the tokenizer.
          key: for the shares and the bits.
          strength: the largest share; the authors' 2B model has 0.3.
          scales: how many scales, from the first on, have mistakes; None is all.

        Returns:
          (bits without the mistakes of their own scale, inputs of the scales 2..K).

        Raises:
          ValueError: a strength outside [0, 1].
        """
        if not 0 <= strength <= 1:
            raise ValueError(f"strength={strength}: expected a share in [0, 1]")
        count = self.order.steps if scales is None else scales

        def flip(scale, bits):
            if scale >= count:
                return bits
            share_key, bits_key = jax.random.split(jax.random.fold_in(key, scale))
            share = jax.random.randint(share_key, (), 0, round(100 * strength) + 1) * 0.01
            return jnp.where(jax.random.uniform(bits_key, bits.shape) < share, 1 - bits, bits)

        bits, pictures = self._quantize(jax.lax.stop_gradient(features), flip)
        parts = [self.seen(picture, scale + 1) for scale, picture in enumerate(pictures[:-1])]
        return bits, jnp.concatenate([self.seen(pictures[0], 0)[:, :0], *parts], axis=1)

    def _quantize(self, features, flip: Callable):
        """The bits of what is left at each scale, and the picture after each; `flip` changes what goes into it."""
        if features.shape[1:] != (*self.size, self.width):
            raise ValueError(f"features {features.shape[1:]} do not have the shape {(*self.size, self.width)}")
        picture, bits, pictures = jnp.zeros_like(features), [], []
        for scale in range(self.order.steps):
            bits.append(bits_of(self._to_tokens(resize(features - picture, self._cells(scale), "area"))))
            picture = picture + self.added(scale, flip(scale, bits[-1]))
            pictures.append(picture)
        return jnp.concatenate(bits, axis=1), pictures

    def __call__(self, features: Float[Array, "b h w c"]) -> Quantized:
        """Quantises with straight-through gradients, those of the direction of what is left at each scale.

        `tokens` are bits, `loss` is the mean `entropy_penalty` of the scales, `counts` how often each bit was 0 and 1, [2, d].
        """
        picture, bits, loss, sg = self.empty(features.shape[0]), [], 0.0, jax.lax.stop_gradient
        for scale in range(self.order.steps):
            rest = resize(features - sg(picture), self._cells(scale), "area")
            picture = picture + resize(spherical_codes(rest), self.size, "bilinear")
            bits.append(bits_of(self._to_tokens(sg(rest))))
            loss += entropy_penalty(rest) / self.order.steps
        tokens = jnp.concatenate(bits, axis=1)
        ones = tokens.reshape(-1, self.bits).sum(0).astype(jnp.float32)
        counts = jnp.stack([tokens.size / self.bits - ones, ones])
        return Quantized(picture, tokens, loss, counts, sg(features).reshape(-1, self.width))
