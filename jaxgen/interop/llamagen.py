"""Official LlamaGen checkpoints: the VQ tokenizer and the class- or caption-conditional Llama of FoundationVision/LlamaGen.

    model = load(generator="c2i_B_256.pt", tokenizer="vq_ds16_c2i.pt")
    images, tokens = model.sample(jax.random.key(0), [207, 980], cfg=4.0, top_k=2000)

Models of captions take the features of FLAN-T5 XL, which is not here: `model.sample(key, Context(features, mask))`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxgen.decoding import Settings
from jaxgen.generators import ImageLlama, NextTokenSampler, check_condition
from jaxgen.interop import flexvar
from jaxgen.interop.calls import decode, encode, read_params
from jaxgen.interop.files import read_checkpoint, read_state_dict, write_safetensors
from jaxgen.interop.mapping import Layout, Rule, linear_rules, to_torch
from jaxgen.interop.vqgan import shape_of
from jaxgen.tokenizers import FlexibleTokenizer

__all__ = ["LlamaGen", "block_rules", "generator_rules", "load", "load_generator", "read_generator", "with_tokenizer"]

# Where the published files hold the parameters (DeepSpeed writes "module").
NESTED = ("model", "module", "state_dict")
BUFFERS = (r"layers\.\d+\.attention\.kv_cache\.[kv]_cache", "freqs_cis", "causal_mask")
# Heads of the published widths, which the files do not tell.
HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 2048: 32, 2560: 40, 3200: 32, 4096: 32}
GRID = 16


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LlamaGen:
    """A tokenizer and a generator with their parameters.

    Attributes:
      generator: the Flax module.
      tokenizer: the Flax module; None where there are tokens alone.
      params: `{"generator": variables, "tokenizer": variables}`.
    """

    generator: ImageLlama
    tokenizer: FlexibleTokenizer | None
    params: Mapping[str, Any]

    @property
    def num_classes(self) -> int:
        """Classes; this number as a label means unconditional. 0 is a model of captions."""
        return self.generator.num_classes

    def encode(self, images: Float[Array, "b H W 3"]) -> Int[Array, "b l"]:
        """Tokens of images in [-1, 1] in raster order; of any size that whole tokens fill.

        Raises:
          ValueError: images of another shape or dtype, or no tokenizer.
        """
        images, tokenizer = jnp.asarray(images), self._its_tokenizer()
        factor = tokenizer.factor
        if images.ndim != 4 or any(n < factor or n % factor for n in images.shape[1:3]):
            raise ValueError(f"images {images.shape}: expected [b, H, W, 3] with sides that are multiples of {factor}")
        shape = tuple(n // factor for n in images.shape[1:3])
        return encode(tokenizer.clone(patch_nums=(shape,)), self.params["tokenizer"], images)

    def decode(self, tokens: Int[Array, "b l"]) -> Float[Array, "b H W 3"]:
        """Square images in [-1, 1] of tokens.

        Raises:
          ValueError: a number of tokens that is no square, ids outside the vocabulary, or no tokenizer.
        """
        tokens, grid = self._checked(tokens)
        return decode(self._its_tokenizer().clone(patch_nums=(grid,)), self.params["tokenizer"], tokens)

    def logits(self, cond, tokens: Int[Array, "b l"]) -> Float[Array, "b l v"]:
        """Teacher-forced float32 logits.

        Args:
          cond: labels [b], of which `num_classes` means unconditional; or captions: a `Context` of the language model's features
            [b, p, c] and of a mask [b, p], False on the padding.
          tokens: of a square image.
        """
        tokens, grid = self._checked(tokens)
        return _logits(self.generator.clone(grid=grid), self.params["generator"], check_condition(cond, self.generator), tokens)

    def sample(
        self,
        key: Key[Array, ""],
        cond,
        *,
        cfg: float = 4.0,
        top_k: int = 0,
        top_p: float = 0.0,
        temperature: float = 1.0,
    ) -> tuple[Float[Array, "b H W 3"] | None, Int[Array, "b l"]]:
        """Samples one image a condition: (images in [-1, 1], None without a tokenizer; tokens), in one compiled function.

        Args:
          key: image i depends on the key, i and its condition, not on the rest of the batch.
          cond: labels [b], or captions as in `logits`.
          cfg: the authors' scale s in unconditional + s (conditional - unconditional); 1 is no guidance.
          top_k: 0 is off, 1 is greedy.
          top_p: 0 and 1 are off.
          temperature: > 0.
        """
        sampler = NextTokenSampler(generator=self.generator, tokenizer=self.tokenizer)
        return sampler(self.params, key, cond, Settings(cfg - 1, temperature, top_k, top_p))

    def save(self, *, generator: str, tokenizer: str | None = None) -> None:
        """Writes safetensors with the authors' names and layout.

        Raises:
          ValueError: a path for a tokenizer that there is not.
        """
        write_safetensors(generator, _split_gates(self._published()))
        if tokenizer is not None:
            flexvar.save_tokenizer(tokenizer, self._its_tokenizer(), self.params["tokenizer"])

    def _published(self) -> dict[str, np.ndarray]:
        """The generator under the published names, with the gates joined."""
        return to_torch(self.params["generator"]["params"], generator_rules(self.generator))

    def _its_tokenizer(self) -> FlexibleTokenizer:
        if self.tokenizer is None:
            raise ValueError("tokenizer=None: the generator was loaded without one")
        return self.tokenizer

    def _checked(self, tokens) -> tuple[Int[Array, "b l"], int]:
        tokens, vocab = np.asarray(tokens), self.generator.vocab
        grid = round(tokens.shape[-1] ** 0.5) if tokens.ndim == 2 else 0
        if tokens.ndim != 2 or not grid or grid**2 != tokens.shape[1] or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"tokens {tokens.dtype} {tokens.shape}: expected integers [b, l] of square images")
        if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab):
            raise ValueError(f"tokens span {tokens.min()}..{tokens.max()}; the vocabulary is 0..{vocab - 1}")
        return jnp.asarray(tokens, jnp.int32), grid


@functools.partial(jax.jit, static_argnums=0)
def _logits(generator, params, cond, tokens):
    return generator.apply(params, cond, tokens)


def load(
    *,
    generator: str,
    tokenizer: str,
    num_heads: int | None = None,
    grid: int | None = None,
    scan_layers: bool = True,
    dtype: Any = jnp.float32,
) -> LlamaGen:
    """Reads a published pair of checkpoints.

    Args:
      generator: `c2i_*.pt`, `t2i_XL_*.pt`, or their safetensors.
      tokenizer: `vq_ds{8,16}_*.pt` or its safetensors.
      num_heads: of a width that was not published; the file cannot tell.
      grid: tokens along a side of what is sampled; None is what fits the file's caches if sampling left any in it, else 16.
      scan_layers: stack the blocks' parameters and scan over them.
      dtype: of the computation.

    Raises:
      ValueError: a missing, truncated or unsafe file; unknown or missing names; shapes that do not fit; heads that cannot be
        told.
    """
    module, variables = load_generator(generator, num_heads=num_heads, grid=grid, scan_layers=scan_layers, dtype=dtype)
    return with_tokenizer(LlamaGen, module, variables, (generator, tokenizer), dtype)


def with_tokenizer(cls: type[LlamaGen], module: ImageLlama, variables, paths: tuple[str, str | None], dtype: Any) -> LlamaGen:
    """A generator, which was read from the first path, with the tokenizer in the second; None is none."""
    generator, tokenizer = paths
    params, tokens = {"generator": variables}, None
    if tokenizer is not None:
        tokens, params["tokenizer"] = flexvar.load_tokenizer(tokenizer, patch_nums=(module.grid,), dtype=dtype)
        if module.vocab != tokens.vocab:
            message = f"{generator} (vocabulary {module.vocab}) does not belong to {tokenizer} (vocabulary {tokens.vocab})"
            raise ValueError(message)
    # A copy, since the arrays may be views of the files; `jnp.asarray` would compile a program for every shape.
    return cls(generator=module, tokenizer=tokens, params=jax.device_put(params, may_alias=False))


def load_generator(
    path: str, *, num_heads: int | None = None, grid: int | None = None, scan_layers: bool = True, dtype: Any = jnp.float32
):
    """The generator's module and variables (numpy); see `load`."""
    state, sizes = read_generator(path, num_heads=num_heads, grid=grid)
    module = ImageLlama(**sizes, scan_layers=scan_layers, dtype=jnp.dtype(dtype))
    expected = module.param_shapes()["params"]
    return module, {"params": read_params(path, state, generator_rules(module), BUFFERS, expected)}


def read_generator(path: str, *, num_heads: int | None, grid: int | None) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """(Arrays by published name with the gates joined, the sizes of an `ImageLlama`) of a file; see `load`."""
    outer = read_checkpoint(path)
    state = read_state_dict(path, next((key for key in NESTED if key in outer), None))
    vocab, width = shape_of(state, "output.weight", path, 2)
    heads = num_heads or HEADS.get(width)
    if not heads or width % heads:
        raise ValueError(f"{path}: the file does not tell the heads of width {width}; pass num_heads, a divisor of it")
    table, captions = "cls_embedding.embedding_table.weight", "cls_embedding.uncond_embedding"
    if table in state:
        condition = dict(num_classes=shape_of(state, table, path, 2)[0] - 1)
    else:
        condition = dict(zip(("prefix", "caption_width"), shape_of(state, captions, path, 2)))
    prefix = condition.get("prefix", 1)
    sizes = dict(
        vocab=vocab,
        grid=grid or _cached_grid(state, prefix) or GRID,
        width=width,
        heads=heads,
        depth=len({name.split(".")[1] for name in state if name.startswith("layers.")}),
        kv_heads=(shape_of(state, "layers.0.attention.wqkv.weight", path, 2)[0] - width) * heads // (2 * width),
        hidden=shape_of(state, "layers.0.feed_forward.w1.weight", path, 2)[0],
    )
    return _join_gates(state), sizes | condition


def _cached_grid(state: Mapping[str, np.ndarray], prefix: int) -> int:
    """The grid of the images that were last sampled with a file's weights; 0 if it holds no caches."""
    cache = state.get("layers.0.attention.kv_cache.k_cache")
    return 0 if cache is None or cache.ndim != 4 else int(max(cache.shape[2] - prefix, 0) ** 0.5)


def _join_gates(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The two matrices before the product of each SwiGLU as one, [2, hidden, d]."""
    out = dict(state)
    for name in state:
        other, joined = (name.replace(".w1.", w) for w in (".w3.", ".w13."))
        if ".w1." in name and other in state and state[name].shape == state[other].shape:
            out[joined] = np.stack([out.pop(name), out.pop(other)])
    return out


def _split_gates(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `_join_gates`."""
    out = {}
    for name, array in state.items():
        parts = zip(("w1", "w3"), array) if ".w13." in name else ((None, array),)
        out |= {name.replace(".w13.", f".{w}."): part for w, part in parts}
    return out


def block_rules(module: ImageLlama, theirs: str, ours: str) -> tuple[Rule, ...]:
    """Published names of a stack's blocks, `{theirs}.{i}`, with `w13` of `_join_gates` for their `w1` and `w3`."""
    theirs, ours = f"{theirs}.{{i}}", f"{ours}/blocks" if module.scan_layers else f"{ours}/blocks_{{i}}"
    d, heads, groups = module.width, module.heads, module.kv_heads or module.heads
    size, ratio = d // heads, heads // groups

    def by_group(x):
        """Queries, keys and values one after the other -> each group's together."""
        parts = np.split(x.T.reshape(d, heads + 2 * groups, size), [heads, heads + groups], axis=1)
        return np.concatenate([part.reshape(d, groups, -1, size) for part in parts], axis=2)

    def by_part(x):
        parts = np.split(x, [ratio, ratio + 1], axis=2)
        return np.concatenate([part.reshape(d, -1) for part in parts], axis=1).T

    gates = Layout(lambda x: x.transpose(2, 0, 1), lambda x: x.transpose(1, 2, 0))
    out = Layout(lambda x: x.T.reshape(heads, d // heads, d), lambda x: x.reshape(d, d).T)
    return (
        Rule(f"{theirs}.attention_norm.weight", f"{ours}/attention_norm/scale"),
        Rule(f"{theirs}.ffn_norm.weight", f"{ours}/mlp_norm/scale"),
        Rule(f"{theirs}.attention.wqkv.weight", f"{ours}/attention/qkv/kernel", Layout(by_group, by_part)),
        Rule(f"{theirs}.attention.wo.weight", f"{ours}/attention/o/kernel", out),
        Rule(f"{theirs}.feed_forward.w13.weight", f"{ours}/mlp/w13/kernel", gates),
        *linear_rules(f"{theirs}.feed_forward.w2", f"{ours}/mlp/w2", bias=False),
    )


def generator_rules(module: ImageLlama) -> tuple[Rule, ...]:
    """Published names of a generator's parameters; see `block_rules`."""
    rules = (
        Rule("tok_embeddings.weight", "token_embed/embedding"),
        Rule("norm.weight", "norm/scale"),
        *linear_rules("output", "head", bias=False),
        *block_rules(module, "layers", "transformer"),
    )
    if module.num_classes:
        return (*rules, Rule("cls_embedding.embedding_table.weight", "class_embed/embedding"))
    return (
        *rules,
        Rule("cls_embedding.uncond_embedding", "no_caption"),
        *linear_rules("cls_embedding.cap_proj.fc1", "caption_fc1", bias=False),
        *linear_rules("cls_embedding.cap_proj.fc2", "caption_fc2", bias=False),
    )
