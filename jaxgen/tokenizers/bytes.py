"""Images or clips <-> the bytes of a file, as tokens."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from jaxgen.data.transforms import pixels, to_uint8
from jaxgen.orders import Order, raster
from jaxgen.tokenizers.pairs import BYTES, END, Pairs

__all__ = ["END", "ByteTokenizer", "Codec", "PixelCodec", "from_tokens", "to_tokens"]


class Codec(Protocol):
    """How pixels become a file. Hashable.

    Attributes:
      shape: of what it takes, images [H, W, C] or clips [f, H, W, C].
      suffix: of the names of its files.
    """

    shape: tuple[int, ...]
    suffix: str

    def encode(self, image: UInt8[np.ndarray, "*shape"]) -> bytes:
        """The bytes that say something: a file without what all files have in common."""

    def decode(self, data: bytes) -> UInt8[np.ndarray, "*shape"]:
        """The pixels.

        Raises:
          ValueError: `data` is not valid.
        """

    def file(self, data: bytes) -> bytes:
        """A file that ordinary programs read, if `data` is valid."""


@dataclasses.dataclass(frozen=True)
class PixelCodec:
    """Pixels as they are, a byte a number, row by row: what ImageGPT and its like predict (Chen et al. 2020).

    Attributes:
      shape: of the images or clips.
    """

    shape: tuple[int, ...]

    suffix = "raw"  # a fact of the class, not a field

    def encode(self, image):
        """See `Codec`."""
        return np.ascontiguousarray(image, np.uint8).tobytes()

    def decode(self, data):
        """See `Codec`."""
        if len(data) != np.prod(self.shape):
            raise ValueError(f"{len(data)} bytes: expected {np.prod(self.shape)}, the pixels of {self.shape}")
        return np.frombuffer(data, np.uint8).reshape(self.shape)

    def file(self, data):
        """The same bytes."""
        return data


def to_tokens(data: bytes, length: int, pairs: Pairs = BYTES) -> Int[np.ndarray, "l"]:
    """The tokens of bytes, then `END`. Of more than `length` tokens the first ones, without an end."""
    tokens = np.full(length, END, np.int32)
    cut = pairs.encode(data)[:length]
    tokens[: len(cut)] = cut
    return tokens


def from_tokens(tokens: Int[np.ndarray, "l"], pairs: Pairs = BYTES) -> bytes:
    """The bytes before the first `END`."""
    tokens = np.asarray(tokens)
    ends = np.flatnonzero(tokens == END)
    return pairs.decode(tokens[: ends[0] if len(ends) else len(tokens)])


class ByteTokenizer(nn.Module):
    """A codec in a tokenizer's place: no parameters; both ways are taken on the host, outside of the compiled program.

    Attributes:
      codec: between pixels and bytes.
      length: l, tokens an image.
      pairs: of bytes, which are tokens, too.
      merges: tokens that a model has for pairs, of which those that `pairs` lacks mean nothing.

    Example:
      >>> tokenizer = ByteTokenizer(JpegCodec(image_size=8, channels=1), length=64)
      >>> tokens = tokenizer.apply({}, images, method="encode")     # [b, 64]
    """

    codec: Any
    length: int
    pairs: Pairs = BYTES
    merges: int = 0

    @property
    def vocab(self) -> int:
        """v, tokens that a model of them has."""
        return END + 1 + max(self.merges, len(self.pairs))

    def tokens(self, data: bytes) -> Int[np.ndarray, "l"]:
        """See `to_tokens`."""
        return to_tokens(data, self.length, self.pairs)

    def file(self, tokens: Int[np.ndarray, "l"]) -> bytes:
        """See `from_tokens`."""
        return from_tokens(tokens, self.pairs)

    @property
    def order(self) -> Order:
        """One position a step."""
        return raster(self.length)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.codec.shape[-3:-1]

    def encode(self, images: Float[Array, "b ... c"]) -> Int[Array, "b l"]:
        """Tokens of pictures in [-1, 1]. A file that is too long is cut, and then not valid."""

        def run(images):
            return np.stack([self.tokens(self.codec.encode(image)) for image in np.asarray(images)])

        out = jax.ShapeDtypeStruct((images.shape[0], self.length), jnp.int32)
        return jax.pure_callback(run, out, to_uint8(images), vmap_method="sequential")

    def decode(self, tokens: Int[Array, "b l"]) -> Float[Array, "b ... c"]:
        """Pictures in [-1, 1]; what is not valid becomes grey."""
        return self.read(tokens)[0]

    def read(self, tokens: Int[Array, "b l"]) -> tuple[Float[Array, "b ... c"], Bool[Array, "b"]]:
        """(pictures, which of them are valid)."""

        def run(tokens):
            pictures, valid = np.zeros((len(tokens), *self.codec.shape), np.uint8), np.zeros(len(tokens), bool)
            for i, row in enumerate(np.asarray(tokens)):
                try:
                    pictures[i], valid[i] = self.codec.decode(self.file(row)), True
                except ValueError:  # told by `valid`
                    continue
            return pictures, valid

        b = tokens.shape[0]
        out = jax.ShapeDtypeStruct((b, *self.codec.shape), jnp.uint8), jax.ShapeDtypeStruct((b,), bool)
        pictures, valid = jax.pure_callback(run, out, tokens, vmap_method="sequential")
        return jnp.where(valid.reshape(b, *(1,) * len(self.codec.shape)), pixels(pictures), 0.0), valid
