"""The sequential diffusion tokenizer: tokens in a row, whose prefixes are the first steps of a diffusion in pixels."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgen.nn.adaln import layer_norm
from jaxgen.nn.vit import ViT
from jaxgen.orders import Order, raster
from jaxgen.paths_flow import LinearFlow
from jaxgen.quantizers.multi_scale import Quantized
from jaxgen.quantizers.spherical import SphericalQuantizer
from jaxgen.tokenizers.diffusion_decoder import DiffusionDecoder

__all__ = ["Denoised", "DiffusionTokenizer", "Flow"]


class Flow(NamedTuple):
    """Where the pictures are between two steps.

    Attributes:
      x: between noise and scaled pixels.
      velocity: of the step before.
    """

    x: Float[Array, "b H W C"]
    velocity: Float[Array, "b H W C"]


class Denoised(NamedTuple):
    """What training sees.

    Attributes:
      error: of the velocity, squared and averaged over an image, in units of the data.
      images: the data that the velocity points to.
      quantized: of the tokens; those that the step does not read have no part in the loss.
      hidden: the decoder's patches in its midst, where they were asked for.
    """

    error: Float[Array, "b"]
    images: Float[Array, "b H W C"]
    quantized: Quantized
    hidden: Float[Array, "b h w d"] | None = None


class DiffusionTokenizer(nn.Module):
    """Images in [-1, 1] <-> n tokens in g groups, one for each of g diffusion steps (D-AR, Gao and Shou 2025, arXiv:2505.23660).

    Learned queries read the patches of an image, each what the queries before it did not need to; they become codes on the unit
    sphere, which a causal transformer turns into vectors. Step i of the flow from noise to pixels is steered by the vectors of
    group i alone, so that i groups give the first i steps, and from there the step's velocity points at a preview. Flow matching
    at a random time trains it all: the group of the nearest step is what the decoder is told.

    The authors' blocks have gates that start at 0; these have none.

    Attributes:
      side: of the images.
      channels: C.
      patch: side of the encoder's patches.
      length: n.
      groups: g; divides n.
      vocab: v, number of codes.
      width: c, size of a code.
      beta, codebook_init: see `SphericalQuantizer`.
      hidden: d, of all transformers.
      heads: h, of all transformers.
      encoder_depth, causal_depth, decoder_depth: blocks that read the image, that read the codes, and of the flow.
      decoder_patch: side of the decoder's patches.
      std: that pixels are scaled by in the flow, whose noise has 1.
      shift: s in u / (u + s (1 - u)), which moves equal steps u towards the noise.
      seed: of the noise that pictures are made from, the same for all.
      scan_layers, remat: see `DiffusionDecoder`.
      dtype: of the transformers' computation.

    Raises:
      ValueError: patches that do not fill the image, groups that do not divide the tokens, or heads the width.

    Example:
      >>> tokenizer = DiffusionTokenizer(side=8, patch=2, decoder_patch=2, length=16, groups=4, hidden=64, heads=4)
      >>> tokens = tokenizer.apply(variables, images, method="encode")             # [b, 16]
      >>> tokenizer.apply(variables, tokens[:, :4], method="decode")               # what a quarter of them says
    """

    side: int = 256
    channels: int = 3
    patch: int = 16
    length: int = 256
    groups: int = 8
    vocab: int = 16384
    width: int = 8
    beta: float = 0.25
    codebook_init: float = 1.0
    hidden: int = 768
    heads: int = 12
    encoder_depth: int = 8
    causal_depth: int = 8
    decoder_depth: int = 12
    decoder_patch: int = 8
    std: float = 0.6
    shift: float = 2.0
    seed: int = 0
    scan_layers: bool = False
    remat: bool = False
    dtype: Any = jnp.float32

    def __post_init__(self):
        for name in ("patch", "decoder_patch"):
            if self.side % getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)}: does not divide side={self.side}")
        if self.groups < 1 or self.length % self.groups:
            raise ValueError(f"groups={self.groups}: must divide length={self.length}")
        if self.hidden % self.heads or self.hidden // self.heads % 4:
            raise ValueError(f"heads={self.heads}: hidden={self.hidden} is not so many heads of a multiple of 4 numbers")
        super().__post_init__()

    @property
    def order(self) -> Order:
        """One token a step."""
        return raster(self.length)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.side, self.side

    @property
    def group(self) -> int:
        """Tokens of a group."""
        return self.length // self.groups

    def setup(self):
        init = nn.initializers.normal(0.02)
        vit = dict(heads=self.heads, scan_layers=self.scan_layers, dtype=self.dtype)
        size = (self.patch, self.patch)
        self.patches = nn.Conv(self.hidden, size, strides=size, padding="VALID", dtype=self.dtype)
        # Of low rank, as published; as large as the patches, or all of them would become one code.
        self.queries = self.param("queries", nn.initializers.normal(1.0), (self.length, 8))
        self.query_dense = nn.Dense(self.hidden)
        self.encoder = ViT(depth=self.encoder_depth, **vit)
        self.to_codes = nn.Dense(self.width, use_bias=False)
        self.quantizer = SphericalQuantizer(self.vocab, self.width, self.beta, self.codebook_init)
        self.from_codes = nn.Dense(self.hidden, use_bias=False, dtype=self.dtype)
        self.places = self.param("places", init, (self.length, self.hidden))
        self.causal = ViT(depth=self.causal_depth, **vit)
        sizes = dict(width=self.hidden, heads=self.heads, depth=self.decoder_depth)
        options = dict(scan_layers=self.scan_layers, remat=self.remat, dtype=self.dtype)
        self.decoder = DiffusionDecoder(patch=self.decoder_patch, **sizes, **options)

    def features(self, images: Float[Array, "b H W C"]) -> Float[Array, "b n c"]:
        """What the queries read, before quantisation.

        Raises:
          ValueError: images of another size or number of channels.
        """
        if images.shape[1:] != (self.side, self.side, self.channels):
            raise ValueError(f"images {images.shape}: expected [b, {self.side}, {self.side}, {self.channels}]")
        x = self.patches(images.astype(self.dtype))
        cells, b = x.shape[1], len(x)
        queries = jnp.broadcast_to(self.query_dense(self.queries), (b, self.length, self.hidden)).astype(self.dtype)
        x = jnp.concatenate([layer_norm(x.reshape(b, cells**2, -1)).astype(self.dtype), queries], axis=1)
        places = np.indices((cells, cells)).reshape(2, -1).T
        coords = np.concatenate([places, np.zeros((self.length, 2), int)])  # at 0 nothing turns
        mask = np.tril(np.ones((len(coords), len(coords)), bool))
        mask[:, : cells**2] = True
        return self.to_codes(self.encoder(x, jnp.asarray(mask), coords=coords)[:, cells**2 :])

    def vectors(self, codes: Float[Array, "b k c"]) -> Float[Array, "b k d"]:
        """What steers the decoder, of the first k codes; a vector depends on the codes up to its own."""
        n = codes.shape[1]
        x = self.from_codes(codes.astype(self.dtype)) + self.places[:n].astype(self.dtype)
        return self.causal(x, jnp.tril(jnp.ones((n, n), bool)))

    def encode(self, images: Float[Array, "b H W C"]) -> Int[Array, "b n"]:
        """Tokens of images in [-1, 1]."""
        return self.quantizer.encode(jax.lax.stop_gradient(self.features(images)))

    def decode(self, tokens: Int[Array, "b k"], noise: Float[Array, "b H W C"] | None = None) -> Float[Array, "b H W C"]:
        """Images in [-1, 1]: those of all tokens, or the preview that the first groups give. See `previews`."""
        return self.previews(tokens, noise)[-1]

    def previews(self, tokens: Int[Array, "b k"], noise: Float[Array, "b H W C"] | None = None) -> Float[Array, "k b H W C"]:
        """The images in [-1, 1] that 1, 2, ... groups of tokens give.

        Args:
          tokens: all, or those of the first groups.
          noise: of variance 1, where the pictures start; None is that of `seed`, the same for all rows.

        Raises:
          ValueError: tokens that are not whole groups.
        """
        b, n = tokens.shape
        if not n or n % self.group or n > self.length:
            raise ValueError(f"tokens {tokens.shape}: expected 1 to {self.groups} groups of {self.group}")
        groups = jnp.moveaxis(self.vectors(self.quantizer.lookup(tokens)).reshape(b, -1, self.group, self.hidden), 1, 0)
        decoder, variables = self.decoder.unbind()

        def step(flow, at):
            return self._step(flow, *at, lambda *inputs: decoder.apply(variables, *inputs))

        return jax.lax.scan(step, self.begin(b, noise), (jnp.arange(n // self.group), groups))[1]

    def begin(self, batch: int, noise: Float[Array, "b H W C"] | None = None) -> Flow:
        """The flow before the first group."""
        shape = (self.side, self.side, self.channels)
        if noise is None:
            noise = jnp.broadcast_to(jax.random.normal(jax.random.key(self.seed), shape), (batch, *shape))
        return Flow(noise.astype(jnp.float32), jnp.zeros((batch, *shape)))

    def advance(self, flow: Flow, tokens: Int[Array, "b n"], i: Int[Array, ""]) -> tuple[Flow, Float[Array, "b H W C"]]:
        """(The flow after group i, the preview in [-1, 1]); groups behind it are not looked at."""
        vectors = self.vectors(self.quantizer.lookup(tokens))
        return self._step(flow, i, jax.lax.dynamic_slice_in_dim(vectors, i * self.group, self.group, axis=1), self.decoder)

    def _step(self, flow: Flow, i, vectors, decoder):
        """Two-step Adams and Bashforth without regard to the spacing, as published; the preview goes on to the end at once."""
        now, following = self._done(i / self.groups), self._done((i + 1) / self.groups)
        velocity = decoder(flow.x, jnp.full((len(flow.x),), now), vectors)
        slope = jnp.where(i == 0, velocity, 1.5 * velocity - 0.5 * flow.velocity)
        # The velocity is that of growing noise.
        preview = jnp.clip((flow.x - (1 - now) * slope) / self.std, -1, 1)
        return Flow(flow.x - (following - now) * slope, velocity), preview

    def __call__(
        self,
        images: Float[Array, "b H W C"],
        u: Float[Array, "b"] | None = None,
        noise: Float[Array, "b H W C"] | None = None,
        *,
        after: int = 0,
    ) -> Denoised:
        """Encodes, and denoises at one time an image, steered by the group of the step nearest to it.

        Args:
          images: in [-1, 1].
          u: times in [0, 1], before the shift; 1 is the data. None is 0.
          noise: of variance 1; None is none.
          after: blocks of the decoder before `Denoised.hidden`; 0 leaves it out.
        """
        b = len(images)
        u = jnp.zeros(b) if u is None else u
        noise = jnp.zeros_like(images) if noise is None else noise
        group = jnp.clip(jnp.floor(u * self.groups + 0.5).astype(jnp.int32), 0, self.groups - 1)
        read = jnp.arange(self.length) < ((group + 1) * self.group)[:, None]
        quantized = self.quantizer(self.features(images), read.astype(jnp.float32))
        vectors = self.vectors(quantized.features).reshape(b, self.groups, self.group, -1)
        steer = jnp.take_along_axis(vectors, group[:, None, None, None], axis=1)[:, 0]
        path, x, done = LinearFlow(), images * self.std, self._done(u)
        at = path.interpolate(x, noise, 1 - done)
        velocity, hidden = self.decoder(at, done, steer, after) if after else (self.decoder(at, done, steer), None)
        error = jnp.square(velocity - path.velocity(x, noise)).mean(axis=(1, 2, 3)) / self.std**2
        return Denoised(error, path.data(at, velocity, 1 - done) / self.std, quantized, hidden)

    def _done(self, u):
        """How far the picture has come at time u: 0 is noise, 1 the data."""
        return u / (u + self.shift * (1 - u))
