"""An autoencoder whose code is bits: each token of the grid a few of them, without a codebook (BAE, BSQ)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen.orders import Order
from jaxgen.quantizers.binary import (
    bernoulli_bits,
    bits_of,
    codes_of,
    entropy_penalty,
    joined_bits,
    parted_bits,
    spherical_codes,
)
from jaxgen.quantizers.multi_scale import Quantized
from jaxgen.tokenizers.conv import ConvAutoencoder
from jaxgen.tokenizers.multi_scale import Reconstruction

__all__ = ["BinaryTokenizer", "check_bits"]

CODES = ("bernoulli", "spherical")

# Numbers of more bits than this are no int32, and no vocabulary either.
MOST = 24


def check_bits(bits: int, parts: int, code: str) -> None:
    """That bits can be parted evenly into numbers of at most 24 bits.

    Raises:
      ValueError: they cannot, or an unknown kind of code.
    """
    if parts < 1 or bits < 1 or bits % parts or bits // parts > MOST:
        raise ValueError(f"bits={bits}, parts={parts}: expected a number of parts that divides the bits, at most {MOST} a part")
    if code not in CODES:
        raise ValueError(f"code={code!r} is not one of {', '.join(CODES)}")


class BinaryTokenizer(ConvAutoencoder):
    """Images in [-1, 1] <-> c bits for each cell of a grid, told as n numbers of c / n bits.

    With "bernoulli" the features are logits of bits: training draws the bits, and their gradient is that of the probabilities
    (the binary autoencoder of ELM, Liu et al. 2024, arXiv:2410.16257, after Wang et al. 2023). With "spherical" the bits are the
    signs of unit vectors (BSQ). How bits are parted changes what tokens are, not the parameters.

    Attributes:
      channels, ch, ch_mult, res_blocks, attention, groups, dropout, dtype: see `ConvAutoencoder`.
      z_channels: between the convolutions and the codes.
      bits: c, of a cell.
      parts: n, numbers of a cell.
      grid: cells along a side.
      code: "bernoulli" or "spherical".
      stochastic: "bernoulli" draws its bits in training; otherwise it takes the likelier ones.
      penalty: weight of E[p (1 - p)], or of `entropy_penalty`.

    Raises:
      ValueError: see `check_bits`.

    Example:
      >>> tokenizer = BinaryTokenizer(ch=32, ch_mult=(1, 2), bits=8, parts=2, grid=4)
      >>> params = tokenizer.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
      >>> tokens = tokenizer.apply(params, images, method="encode")   # [b, 32], of a vocabulary of 16
    """

    ch: int = 128
    z_channels: int = 256
    bits: int = 16
    parts: int = 1
    grid: int = 16
    code: str = "bernoulli"
    stochastic: bool = True
    penalty: float = 0.0

    def __post_init__(self):
        check_bits(self.bits, self.parts, self.code)
        super().__post_init__()

    def setup(self):
        self.setup_convolutions(self.z_channels, 1)

    @property
    def vocab(self) -> int:
        """Values of a token."""
        return 2 ** (self.bits // self.parts)

    @property
    def width(self) -> int:
        """Numbers of a code."""
        return self.bits

    @property
    def order(self) -> Order:
        """Cell by cell, all numbers of one at a time."""
        return Order(((self.parts,),) * self.grid**2)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W)."""
        return (self.grid * self.factor,) * 2

    def __call__(self, images: Float[Array, "b H W C"], train: bool = False) -> Reconstruction:
        """Encodes and decodes with straight-through gradients; draws from the rng "dropout" while training."""
        features = self.features(images, train)
        if self.code == "spherical":
            codes, loss = spherical_codes(features), entropy_penalty(features)
        else:
            key = self.make_rng("dropout") if train and self.stochastic else None
            p = jax.nn.sigmoid(features)
            codes, loss = bernoulli_bits(features, key), (p * (1 - p)).mean()
        hidden = self.decoder.hidden(self.post_quant_conv(codes), train)
        tokens = joined_bits(jax.lax.stop_gradient(bits_of(codes)), self.parts).reshape(len(images), -1)
        counts = jnp.zeros(self.vocab).at[tokens.reshape(-1)].add(1.0)
        vectors = jax.lax.stop_gradient(codes).reshape(-1, self.bits)
        quantized = Quantized(codes, tokens, self.penalty * loss, counts, vectors)
        return Reconstruction(self.decoder.to_pixels(hidden), hidden, quantized)

    def features(self, images: Float[Array, "b H W C"], train: bool = False) -> Float[Array, "b h w c"]:
        """A number for each bit, positive where it is 1.

        Raises:
          ValueError: images of another size or number of channels, or not floating-point.
        """
        want = (*self.image_size, self.channels)
        if images.ndim != 4 or images.shape[1:] != want or not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images {images.shape} {images.dtype}: expected floating-point [b, {', '.join(map(str, want))}]")
        return super().features(images, train)

    def encode(self, images: Float[Array, "b H W C"]) -> Int[Array, "b l*n"]:
        """The numbers of each cell in raster order; nothing is drawn."""
        bits = bits_of(jax.lax.stop_gradient(self.features(images)))
        return joined_bits(bits, self.parts).reshape(len(images), -1)

    def decode(self, tokens: Int[Array, "b l*n"]) -> Float[Array, "b H W C"]:
        """Images in [-1, 1]."""
        bits = parted_bits(tokens.reshape(len(tokens), self.grid, self.grid, self.parts), self.bits)
        codes = codes_of(bits) if self.code == "spherical" else bits.astype(jnp.float32)
        return self.decode_features(codes)
