"""Official MAR checkpoints: the KL-16 autoencoder and the masked generator of continuous tokens of LTH14/mar.

    model = load(generator="checkpoint-last.pth", tokenizer="kl16.ckpt")
    images, tokens = model.sample(jax.random.key(0), [207, 980], cfg=2.9, steps=256)

Li et al. 2024, *Autoregressive image generation without vector quantization* (arXiv:2406.11838).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgen.decoding.density import path_noise
from jaxgen.decoding.masked_latents import sample_latents
from jaxgen.decoding.speculate_latents import random_order
from jaxgen.decoding.transforms import check_settings
from jaxgen.generators.masked_latent import MaskedLatentTransformer, cosine_steps
from jaxgen.generators.masked_latent_sampler import latent_model
from jaxgen.generators.next_scale_sampler import check_labels
from jaxgen.interop.calls import decode, read_params
from jaxgen.interop.files import read_state_dict, write_safetensors
from jaxgen.interop.mapping import Layout, Rule, linear_rules, norm_rules, reshape, to_torch
from jaxgen.interop.vit import join_biases, split_biases, vit_block_rules
from jaxgen.interop.vqgan import autoencoder_rules, autoencoder_sizes, fuse_attention, shape_of, split_attention
from jaxgen.tokenizers.latents import LatentTokenizer

__all__ = ["MAR", "load", "load_generator", "load_tokenizer"]

# What the authors multiply latents by, and the heads of their models by width: neither is in the files.
LATENT_SCALE = 0.2325
HEADS = {768: 12, 1024: 16, 1280: 16}


_positions = Layout(lambda x: x.reshape(x.shape[1:]), lambda x: x[None])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MAR:
    """An autoencoder and a generator with their parameters.

    Attributes:
      generator: the Flax module.
      tokenizer: the Flax module.
      params: `{"generator": variables, "tokenizer": variables}`.
    """

    generator: MaskedLatentTransformer
    tokenizer: LatentTokenizer
    params: Mapping[str, Any]

    @property
    def num_classes(self) -> int:
        """Classes; this number as a label means unconditional."""
        return self.generator.num_classes

    def encode(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b l c"]:
        """Tokens of images in [-1, 1]: means of the features, scaled, in rows.

        Raises:
          ValueError: images of another size.
        """
        images, side = jnp.asarray(images), self.tokenizer.image_size
        if images.ndim != 4 or images.shape[1:] != (side, side, self.tokenizer.channels):
            raise ValueError(f"images {images.shape}: this tokenizer takes [b, {side}, {side}, {self.tokenizer.channels}]")
        return _encode(self.tokenizer, self.params["tokenizer"], images)

    def decode(self, tokens: Float[Array, "b l c"]) -> Float[Array, "b H W 3"]:
        """Images in [-1, 1] of tokens.

        Raises:
          ValueError: tokens of another shape.
        """
        return decode(self.tokenizer, self.params["tokenizer"], self._checked(tokens))

    def features(
        self, labels: Int[Array, "b"], tokens: Float[Array, "b l c"], known: Bool[Array, "b l"]
    ) -> Float[Array, "b l d"]:
        """What the head is told of each position, given the tokens that are known."""
        return _apply(self.generator, "features", self.params["generator"], self._labels(labels), self._checked(tokens), known)

    def predict(
        self, z: Float[Array, "*b d"], x: Float[Array, "*b c"], times: Int[Array, "*b"]
    ) -> tuple[Float[Array, "*b c"], Float[Array, "*b c"]]:
        """(noise, share of the log-variance between its bounds) that the head sees in noisy tokens; see `DiffusionHead`."""
        return _apply(self.generator, "predict", self.params["generator"], z, x, times)

    def losses(
        self, z: Float[Array, "*b d"], tokens: Float[Array, "*b c"], i: Int[Array, "*b"], noise: Float[Array, "*b c"]
    ) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
        """(squared error, variational bound in bits a number), the two parts of the training loss of each token.

        Args:
          z: its features.
          tokens: clean.
          i: step of the chain, 1..1000.
          noise: in it.
        """
        return _apply(self.generator, "losses", self.params["generator"], z, tokens, i, noise)

    def sample(
        self,
        key: Key[Array, ""],
        labels: Int[Array, "b"],
        *,
        cfg: float = 1.0,
        temperature: float = 1.0,
        steps: int = 64,
        chain_steps: int = 100,
        spacing: str = "ends",
        positions: Int[Array, "b l"] | None = None,
        noise: Float[Array, "b l s+1 c"] | None = None,
    ) -> tuple[Float[Array, "b H W 3"], Float[Array, "b l c"]]:
        """Samples one image a label; one compiled function from key and labels to (images in [-1, 1], tokens).

        Args:
          key: image i depends on the key, i and its label, not on the rest of the batch.
          labels: class ids.
          cfg: guidance as the authors count it, reached at the last step; 1 is off, and is another compile.
          temperature: factor on the noise of every step of the chain.
          steps: of generation; compiles.
          chain_steps: of the head's chain; compiles.
          spacing: which of the 1000 steps those are, see `VPPath`; "stride" is what the authors write as "ddimN". Compiles.
          positions: of each row, in the order in which they come; None is a random order for each.
          noise: of each token's chain, from its end [..., 0, :], which the authors have 0, to its start; None draws it.

        Raises:
          ValueError: labels or settings out of range; steps that do not fit; arrays of other shapes.
        """
        labels, (b, l, c) = self._labels(labels), (len(labels), self.generator.length, self.generator.channels)
        check_settings(cfg=cfg, temperature=temperature)
        for name, given, want in (("positions", positions, (b, l)), ("noise", noise, (b, l, chain_steps + 1, c))):
            if given is not None and np.shape(given) != want:
                raise ValueError(f"{name} {np.shape(given)}: expected {want}")
        static = (self.generator, self.tokenizer, steps, chain_steps, spacing, cfg != 1)
        return _sample(static, self.params, key, labels, jnp.float32(cfg), jnp.float32(temperature), positions, noise)

    def save(self, *, generator: str, tokenizer: str) -> None:
        """Writes safetensors with the authors' names and layout, for their `load_state_dict`.

        Biases of keys, which change nothing and are not kept, are written as 0.
        """
        tensors = to_torch(self.params["generator"]["params"], generator_rules(self.generator))
        write_safetensors(generator, _theirs(tensors))
        tensors = to_torch(self.params["tokenizer"]["params"], tokenizer_rules())
        write_safetensors(tokenizer, split_attention(tensors))

    def _labels(self, labels) -> Int[Array, "b"]:
        return check_labels(labels, self.num_classes)

    def _checked(self, tokens) -> Float[Array, "b l c"]:
        tokens, want = jnp.asarray(tokens), (self.generator.length, self.generator.channels)
        if tokens.ndim != 3 or tokens.shape[1:] != want:
            raise ValueError(f"tokens {tokens.shape}: expected [b, {want[0]}, {want[1]}]")
        return tokens


@functools.partial(jax.jit, static_argnums=0)
def _encode(tokenizer, params, images):
    return tokenizer.apply(params, images, method="encode")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(generator, method, params, *args):
    return generator.apply(params, *args, method=method)


@functools.partial(jax.jit, static_argnums=0)
def _sample(static, params, key, labels, cfg, temperature, positions, noise):
    generator, tokenizer, steps, chain_steps, spacing, guided = static
    order, rows = cosine_steps(generator.length, steps), jnp.arange(len(labels))
    if positions is None:
        positions = random_order(key, rows, generator.length)
    if noise is None:
        noise = path_noise(key, rows, jnp.tile(jnp.arange(generator.length), (len(labels), 1)), chain_steps, generator.channels)
        noise = noise.at[:, :, 0].set(0)
    path = generator.path.respaced(chain_steps, spacing)
    model = latent_model(generator, path, order, temperature=temperature, cfg=cfg - 1 if guided else None)
    tokens, _ = sample_latents(model, params=params["generator"], cond=labels, order=order, positions=positions, noise=noise)
    return tokenizer.apply(params["tokenizer"], tokens, method="decode"), tokens


def load(
    *,
    generator: str,
    tokenizer: str,
    ema: bool = True,
    num_heads: int | None = None,
    decoder_heads: int | None = None,
    scan_layers: bool = True,
    dtype: Any = jnp.float32,
) -> MAR:
    """Reads a published pair of checkpoints; sizes come from the files, heads from the width of the authors' models.

    Args:
      generator: `checkpoint-last.pth`, or the safetensors of `MAR.save`.
      tokenizer: `kl16.ckpt`, or the safetensors of `MAR.save`.
      ema: averaged parameters, which the authors sample with, or the last ones.
      num_heads: of the encoder, where the width is not one of the authors'.
      decoder_heads: of the decoder; None is the encoder's.
      scan_layers: stack the blocks' parameters and scan over them.
      dtype: of the generator's computation.

    Raises:
      ValueError: a missing, truncated or unsafe file; unknown or missing names; shapes that do not fit.
    """
    options = dict(ema=ema, num_heads=num_heads, decoder_heads=decoder_heads, scan_layers=scan_layers, dtype=dtype)
    module, variables = load_generator(generator, **options)
    features = shape_of(_read(tokenizer, "model"), "post_quant_conv.weight", tokenizer, 4)[0]
    grid, patch = math.isqrt(module.length), math.isqrt(max(module.channels // features, 1))
    if patch**2 * features != module.channels or grid**2 != module.length:
        raise ValueError(
            f"{generator} ({module.length} tokens of {module.channels} numbers) does not belong to "
            f"{tokenizer} ({features} features)"
        )
    tokenizer_module, tokenizer_variables = load_tokenizer(tokenizer, grid=grid, patch=patch)
    # A copy, since the arrays may be views of the files; `jnp.asarray` would compile a program for every shape.
    params = jax.device_put({"generator": variables, "tokenizer": tokenizer_variables}, may_alias=False)
    return MAR(generator=module, tokenizer=tokenizer_module, params=params)


def load_generator(
    path: str, *, ema: bool = True, num_heads=None, decoder_heads=None, scan_layers: bool = True, dtype: Any = jnp.float32
):
    """The generator's module and variables (numpy); see `load`."""
    state = _read(path, "model_ema" if ema else "model")
    shape_of(state, "fake_latent", path, 2)
    state = _ours(state)
    classes, width = shape_of(state, "class_emb.weight", path, 2)
    places, decoder_width = shape_of(state, "decoder_pos_embed_learned", path, 3)[1:]
    length = shape_of(state, "diffusion_pos_embed_learned", path, 3)[1]
    if num_heads is None and width not in HEADS:
        raise ValueError(f"{path}: heads of a model of width {width} are not known; pass num_heads")

    def depth(blocks):
        return len({name.split(".")[1] for name in state if name.startswith(f"{blocks}.")})

    module = MaskedLatentTransformer(
        channels=shape_of(state, "z_proj.weight", path, 2)[1],
        length=length,
        num_classes=classes - 1,
        width=width,
        depth=depth("encoder_blocks"),
        heads=num_heads or HEADS[width],
        decoder_width=decoder_width,
        decoder_depth=depth("decoder_blocks"),
        decoder_heads=decoder_heads or num_heads or HEADS[width],
        buffer=places - length,
        mlp_ratio=shape_of(state, "encoder_blocks.0.mlp.fc1.weight", path, 2)[0] / width,
        head_width=shape_of(state, "diffloss.net.input_proj.weight", path, 2)[0],
        head_depth=len({name.split(".")[3] for name in state if name.startswith("diffloss.net.res_blocks.")}),
        scan_layers=scan_layers,
        dtype=jnp.dtype(dtype),
    )
    args = jnp.zeros((1,), jnp.int32), jnp.zeros((1, length, module.channels)), jnp.zeros((1, length), bool)
    expected = jax.eval_shape(lambda key: module.init(key, *args, key), jax.random.key(0))["params"]
    return module, {"params": read_params(path, state, generator_rules(module), (), expected)}


def load_tokenizer(path: str, *, grid: int = 16, patch: int = 1, dtype: Any = jnp.float32):
    """The autoencoder's module and variables (numpy). Its file does not reveal how many tokens an image has: `grid` along a
    side, each of `patch` x `patch` features."""
    state = fuse_attention(_read(path, "model"))
    sizes = autoencoder_sizes(state, path)
    attention, lowest = sizes.pop("attention"), len(sizes["ch_mult"]) - 1
    module = LatentTokenizer(
        image_size=grid * patch * 2**lowest,
        patch=patch,
        features=shape_of(state, "post_quant_conv.weight", path, 4)[0],
        encoder_attention=attention,
        decoder_attention=f"decoder.up.{lowest}.attn.0.qkv.weight" in state,
        scale=LATENT_SCALE,
        dtype=jnp.dtype(dtype),
        **sizes,
    )
    image = jax.ShapeDtypeStruct((1, module.image_size, module.image_size, module.channels), jnp.float32)
    expected = jax.eval_shape(lambda key, image: module.init(key, image, key), jax.random.key(0), image)["params"]
    return module, {"params": read_params(path, state, tokenizer_rules(), (), expected)}


def _read(path, key):
    """The state dict of the authors' file, or of `MAR.save`."""
    return read_state_dict(path, None if str(path).endswith(".safetensors") else key)


def _ours(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names of ours for what the authors store in other pieces: the class of "no class" is the last one, see `split_biases`."""
    out = split_biases(state)
    if "fake_latent" in out and "class_emb.weight" in out:
        out["class_emb.weight"] = np.concatenate([out["class_emb.weight"], out.pop("fake_latent")])
    return out


def _theirs(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `_ours`."""
    out = join_biases(tensors)
    classes = out["class_emb.weight"]
    out["class_emb.weight"], out["fake_latent"] = classes[:-1], classes[-1:]
    return out


def generator_rules(module: MaskedLatentTransformer) -> tuple[Rule, ...]:
    """Published names of a generator's parameters, as `_ours` leaves them."""
    net = "diffloss.net"
    rules = [
        Rule("class_emb.weight", "class_embed/embedding"),
        *linear_rules("z_proj", "token_embed"),
        *norm_rules("z_proj_ln", "token_norm"),
        *linear_rules("decoder_embed", "decoder_embed"),
        Rule("mask_token", "mask_token", reshape((1, 1, -1), (-1,))),
        Rule("diffusion_pos_embed_learned", "head_position", _positions),
        *linear_rules(f"{net}.time_embed.mlp.0", "head/time/fc1"),
        *linear_rules(f"{net}.time_embed.mlp.2", "head/time/fc2"),
        *linear_rules(f"{net}.cond_embed", "head/cond"),
        *linear_rules(f"{net}.input_proj", "head/inputs"),
        *norm_rules(f"{net}.res_blocks.{{i}}.in_ln", "head/blocks_{i}/norm"),
        *linear_rules(f"{net}.res_blocks.{{i}}.mlp.0", "head/blocks_{i}/fc1"),
        *linear_rules(f"{net}.res_blocks.{{i}}.mlp.2", "head/blocks_{i}/fc2"),
        *linear_rules(f"{net}.res_blocks.{{i}}.adaLN_modulation.1", "head/blocks_{i}/ada"),
        *linear_rules(f"{net}.final_layer.adaLN_modulation.1", "head/ada"),
        *linear_rules(f"{net}.final_layer.linear", "head/outputs"),
    ]
    sizes = (("encoder", module.width, module.heads), ("decoder", module.decoder_width, module.decoder_heads))
    for half, width, heads in sizes:
        rules += [
            Rule(f"{half}_pos_embed_learned", f"{half}_position", _positions),
            *norm_rules(f"{half}_norm", f"{half}/norm"),
            *vit_block_rules(f"{half}_blocks.{{i}}", f"{half}/blocks" + ("" if module.scan_layers else "_{i}"), width, heads),
        ]
    return tuple(rules)


def tokenizer_rules() -> tuple[Rule, ...]:
    """Published names of an autoencoder's parameters, with one projection in attention (`fuse_attention`)."""
    names = {"quant_conv": "to_moments", "post_quant_conv": "from_features"}
    rules = []
    for rule in autoencoder_rules():
        head, _, tail = rule.ours.partition("/")
        rules.append(dataclasses.replace(rule, ours=f"{names[head]}/{tail}") if head in names else rule)
    return tuple(rules)
