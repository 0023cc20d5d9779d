"""Official xAR checkpoints (S048): the next-cell transformer of OliverRensu/xAR over latents of MAR's KL-16 autoencoder.

model = load(generator="xAR-B.pth", tokenizer="kl16.ckpt")
images, latents = model.sample(jax.random.key(0), [207, 980], cfg=1.7, steps=40)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxgen.decoding.next_x import Draw
from jaxgen.generators.next_scale_sampler import check_labels
from jaxgen.generators.next_x import NextXTransformer
from jaxgen.generators.next_x_sampler import NextXSampler
from jaxgen.interop import mar
from jaxgen.interop.files import read_state_dict, write_safetensors
from jaxgen.interop.mapping import Layout, Rule, linear_rules, reshape, to_jax, to_torch
from jaxgen.interop.vqgan import shape_of
from jaxgen.tokenizers.latents import LatentTokenizer

__all__ = ["XAR", "load"]

# Buffers that the files carry beside the parameters.
BUFFERS = ("mask", r"(en|de)coder_blocks\.\d+\.attn\.rope\.(freqs|freqs_cos|freqs_sin)")
# What their one bias of queries, keys and values is here.
BIASES = ("q_bias", "k_bias", "v_bias")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class XAR:
    """A generator with its parameters, and the autoencoder whose latents it makes, if that was loaded.

    Latents are pictures [b, h, w, c] of features times 0.2325.

    Attributes:
      generator: the Flax module.
      tokenizer: the Flax module; None where latents are all that is wanted.
      params: `{"generator": variables, "tokenizer": variables}`, the second only with a tokenizer.
    """

    generator: NextXTransformer
    tokenizer: LatentTokenizer | None = None
    params: Mapping[str, Any]

    @property
    def num_classes(self) -> int:
        """Classes; this number as a label means unconditional."""
        return self.generator.num_classes

    def encode(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
        """Latents of images in [-1, 1].

        Raises:
          ValueError: images of another size, or no tokenizer.
        """
        images, side = jnp.asarray(images), self._tokenizer.image_size
        if images.ndim != 4 or images.shape[1:] != (side, side, self._tokenizer.channels):
            raise ValueError(f"images {images.shape}: this tokenizer takes [b, {side}, {side}, {self._tokenizer.channels}]")
        return self._picture(_apply(self._tokenizer, "encode", self.params["tokenizer"], images))

    def decode(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        """Images in [-1, 1] of latents.

        Raises:
          ValueError: latents of another shape, or no tokenizer.
        """
        g, latents = self.generator, jnp.asarray(latents)
        if latents.ndim != 4 or latents.shape[1:] != (g.grid, g.grid, g.channels):
            raise ValueError(f"latents {latents.shape}: expected [b, {g.grid}, {g.grid}, {g.channels}]")
        tokens = latents.reshape(len(latents), -1, g.channels)
        return _apply(self._tokenizer, "decode", self.params["tokenizer"], tokens)

    @property
    def _tokenizer(self) -> LatentTokenizer:
        if self.tokenizer is None:
            raise ValueError("tokenizer=None: images need the autoencoder's file, load(generator=..., tokenizer=...)")
        return self.tokenizer

    def _picture(self, tokens) -> Float[Array, "b h w c"]:
        return tokens.reshape(len(tokens), self.generator.grid, self.generator.grid, -1)

    def velocities(
        self, labels: Int[Array, "b"], latents: Float[Array, "b h w c"], t: Float[Array, "b K"], noise: Float[Array, "b K q c"]
    ) -> Float[Array, "b K q c"]:
        """What the model expects of noise - latents, cell by cell, when cell k is at level t_k: the forward pass of training.

        Args:
          labels: class ids.
          latents: pictures.
          t: levels, 1 is noise.
          noise: of the cells.

        Raises:
          ValueError: labels out of range, or arrays of other shapes.
        """
        labels, g, order = check_labels(labels, self.num_classes), self.generator, self.generator.order
        want = {
            "latents": (len(labels), g.grid, g.grid, g.channels),
            "t": (len(labels), order.steps),
            "noise": (len(labels), order.steps, order.sizes[0], g.channels),
        }
        for name, array in (("latents", latents), ("t", t), ("noise", noise)):
            if np.shape(array) != want[name]:
                raise ValueError(f"{name} {np.shape(array)}: expected {want[name]}")
        return _velocities(g, self.params["generator"], labels, *map(jnp.asarray, (latents, t, noise)))

    def sample(
        self,
        key: Key[Array, ""] | None,
        labels: Int[Array, "b"],
        *,
        cfg: float = 1.7,
        steps: int = 50,
        solver: str = "noisy",
        temperature: float = 1.0,
        draw: Draw | None = None,
    ) -> tuple[Float[Array, "b H W 3"] | None, Float[Array, "b h w c"]]:
        """Samples one image a label, cell by cell; one compiled function from key and labels to (images in [-1, 1], latents).

        Without a tokenizer the images are None.

        Args:
          key: image i depends on the key, i and its label, not on the rest of the batch.
          labels: class ids.
          cfg: the published scale less 1 at the last cell (the weight grows from 0 at the first).
          steps: of the solver, for each cell.
          solver: see `jaxgen.decoding.next_x.sample_entities`; "noisy" is the authors'.
          temperature: factor on all noise.
          draw: gives the noise, in place of the key.

        Raises:
          ValueError: labels out of range, too few steps, or an unknown solver.
        """
        labels, g, tokenizer = check_labels(labels, self.num_classes), self.generator, self.tokenizer
        # Tokens that are pixels have nothing to decode.
        pixels = LatentTokenizer(image_size=g.grid, channels=g.channels, patch=1)
        sampler = NextXSampler(generator=g, tokenizer=tokenizer or pixels, steps=steps, solver=solver)
        if draw is not None:
            latents = self._picture(_recorded(sampler, draw, self.params["generator"], labels, jnp.float32(cfg)))
            return None if tokenizer is None else self.decode(latents), latents
        images, drawn = sampler(self.params, key, labels, cfg=cfg, temperature=temperature)
        return None if tokenizer is None else images, self._picture(drawn.tokens)

    def save(self, *, generator: str) -> None:
        """Writes safetensors with the authors' names and layout, buffers included, for their `load_state_dict`.

        The autoencoder is MAR's (see `jaxgen.interop.mar`).
        """
        tensors = to_torch(self.params["generator"]["params"], rules(self.generator))
        for name in [name for name in tensors if name.endswith(BIASES[0])]:
            stem = name.removesuffix(BIASES[0])
            tensors[f"{stem}qkv.bias"] = np.concatenate([tensors.pop(stem + bias) for bias in BIASES])
        write_safetensors(generator, tensors | _buffers(self.generator))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(module, method, params, x):
    return module.apply(params, x, method=method)


@functools.partial(jax.jit, static_argnums=0)
def _velocities(generator, params, labels, latents, t, noise):
    b, steps, q, c = noise.shape
    x0 = generator.units.split(latents.reshape(b, -1, c)).reshape(b, steps, q, c)
    level = t[..., None, None]
    x = ((1 - level) * x0 + level * noise).reshape(b, steps * q, c)
    return generator.apply(params, labels, x, t, method="velocity").reshape(b, steps, q, c)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _recorded(sampler, draw: Callable, params, labels, cfg):
    return sampler.tokens(params, labels, draw, cfg)


def load(*, generator: str, tokenizer: str | None = None, scan_layers: bool = True, dtype: Any = jnp.float32) -> XAR:
    """Reads a published checkpoint; sizes, heads and cells come from the file.

    Args:
      generator: `xAR-{B,L,H}.pth` or its safetensors.
      tokenizer: MAR's `kl16.ckpt` or its safetensors; None for latents alone.
      scan_layers: stack the blocks' parameters and scan over them.
      dtype: of the computation.

    Raises:
      ValueError: a missing, truncated or unsafe file; unknown or missing names; shapes that do not fit.
    """
    state = read_state_dict(generator)
    classes, width = shape_of(state, "class_emb.weight", generator, 2)
    hidden = shape_of(state, "encoder_blocks.0.mlp.fc1_g.weight", generator, 2)[0]
    length = shape_of(state, "encoder_pos_embed_learned", generator, 3)[1]
    blocks = {tuple(name.split(".")[:2]) for name in state if "_blocks." in name}
    depth = sum(stack == "encoder_blocks" for stack, _ in blocks)
    if len(blocks) != 2 * depth:
        raise ValueError(f"{generator}: {depth} blocks of the encoder and {len(blocks) - depth} of the decoder")
    quarter = shape_of(state, "encoder_blocks.0.attn.rope.freqs", generator, 1)[0]
    grid = round(length**0.5)
    module = NextXTransformer(
        channels=shape_of(state, "pred.weight", generator, 2)[0],
        grid=grid,
        num_classes=classes - 1,
        width=width,
        depth=depth,
        heads=width // (4 * quarter),
        unit="cell",
        # The rotary tables of the released code are those of four cells.
        unit_size=grid // 2,
        # The hidden width is rounded down, so that the ratio is known up to a part of it.
        mlp_ratio=4.0 if hidden == int(width * 4.0 * 2 / 3) else (hidden + 0.5) * 1.5 / width,
        scan_layers=scan_layers,
        dtype=jnp.dtype(dtype),
    )
    for name in [name for name in state if name.endswith("attn.qkv.bias")]:
        parts = np.split(state.pop(name), 3)
        state |= {name.removesuffix("qkv.bias") + bias: part for bias, part in zip(BIASES, parts)}
    try:
        params = to_jax(state, rules(module), ignore=BUFFERS, expected=module.param_shapes()["params"])
    except ValueError as error:
        raise ValueError(f"{generator}: {error}") from error
    variables, autoencoder = {"generator": {"params": params}}, None
    if tokenizer is not None:
        autoencoder, variables["tokenizer"] = mar.load_tokenizer(tokenizer, grid=grid, dtype=dtype)
        if autoencoder.token_channels != module.channels:
            raise ValueError(f"{generator} has {module.channels} channels a token, {tokenizer} {autoencoder.token_channels}")
    # A copy, since the arrays may be views of the files.
    return XAR(generator=module, tokenizer=autoencoder, params=jax.device_put(variables, may_alias=False))


def rules(module: NextXTransformer) -> tuple[Rule, ...]:
    """Published names of the parameters, the biases of queries, keys and values apart."""
    d, h = module.width, module.heads
    k = d // h
    qkv = Layout(lambda x: x.T.reshape(d, 3, h, k), lambda x: x.reshape(d, 3 * d).T)
    proj = Layout(lambda x: x.T.reshape(h, k, d), lambda x: x.reshape(d, d).T)
    parts = Layout(lambda x: x.T.reshape(d, 6, d), lambda x: x.reshape(d, 6 * d).T)
    out = [
        Rule("class_emb.weight", "class_embed/embedding"),
        *linear_rules("time_embed.mlp.0", "time/fc1"),
        *linear_rules("time_embed.mlp.2", "time/fc2"),
        *linear_rules("z_proj", "token_embed"),
        Rule("z_proj_ln.weight", "stacks/token_norm/scale"),
        *linear_rules("decoder_embed", "stacks/between"),
        *linear_rules("pred", "outputs"),
    ]
    for stack in ("encoder", "decoder"):
        theirs = f"{stack}_blocks.{{i}}"
        ours = f"stacks/{stack}/" + ("blocks" if module.scan_layers else "blocks_{i}")
        out += [
            Rule(f"{stack}_pos_embed_learned", f"stacks/{stack}_position", reshape((1, -1, d), (-1, d))),
            Rule(f"{stack}_norm.weight", f"stacks/{stack}_norm/scale"),
            Rule(f"{theirs}.attn.qkv.weight", f"{ours}/attention/qkv/kernel", qkv),
            *(Rule(f"{theirs}.attn.{bias}", f"{ours}/attention/{bias}", reshape((d,), (h, k))) for bias in BIASES),
            Rule(f"{theirs}.attn.proj.weight", f"{ours}/attention/proj/kernel", proj),
            Rule(f"{theirs}.attn.proj.bias", f"{ours}/attention/proj/bias"),
            *linear_rules(f"{theirs}.mlp.fc1_g", f"{ours}/mlp/gate_fc1"),
            *linear_rules(f"{theirs}.mlp.fc1_x", f"{ours}/mlp/fc1"),
            *linear_rules(f"{theirs}.mlp.fc2", f"{ours}/mlp/fc2"),
            Rule(f"{theirs}.ada_lin.1.weight", f"{ours}/ada/dense/kernel", parts),
            Rule(f"{theirs}.ada_lin.1.bias", f"{ours}/ada/dense/bias", reshape((6 * d,), (6, d))),
        ]
    return tuple(out)


def _buffers(module: NextXTransformer) -> dict[str, np.ndarray]:
    """The mask and each block's rotary tables."""
    step, coords = module.order.step_of, module.units.coords
    size = module.width // module.heads // 2
    rates = (10000.0 ** (-np.arange(0, size, 2) / size)).astype(np.float32)
    angles = np.repeat((coords[:, :, None] * rates).reshape(len(coords), -1), 2, axis=-1)
    tables = {"freqs": rates, "freqs_cos": np.cos(angles), "freqs_sin": np.sin(angles)}
    out = {"mask": np.where(step[:, None] >= step[None], 0, -np.inf).astype(np.float32)[None, None]}
    for stack in ("encoder", "decoder"):
        for i in range(module.depth):
            out |= {f"{stack}_blocks.{i}.attn.rope.{name}": table for name, table in tables.items()}
    return out
