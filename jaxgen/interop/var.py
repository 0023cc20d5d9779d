"""Official VAR checkpoints (S047): the multi-scale tokenizer and the next-scale transformer of FoundationVision/VAR.

model = load(generator="var_d16.pth", tokenizer="vae_ch160v4096z32.pth")
images, tokens = model.sample(jax.random.key(0), [207, 980], cfg=4.0, top_k=900, top_p=0.95)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxgen.decoding import Known, Settings
from jaxgen.generators import NextScaleSampler, NextScaleTransformer, check_labels, keep_tokens
from jaxgen.interop.calls import check_tokens, decode, encode, next_scale_logits, read_params
from jaxgen.interop.files import read_state_dict, write_safetensors
from jaxgen.interop.mapping import Layout, Rule, conv_rules, linear_rules, reshape, to_torch
from jaxgen.interop.vqgan import autoencoder_rules, autoencoder_sizes, shape_of
from jaxgen.tokenizers import MultiScaleTokenizer

__all__ = ["VAR", "load", "load_generator", "load_tokenizer"]

PATCH_NUMS = {680: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 2240: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)}
# Buffers that the files carry beside the parameters.
GENERATOR_BUFFERS = ("lvl_1L", "attn_bias_for_masking", r"blocks\.\d+\.attn\.zero_k_bias")
TOKENIZER_BUFFERS = ("quantize.ema_vocab_hit_SV",)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class VAR:
    """A tokenizer and a generator with their parameters.

    Attributes:
      generator: the Flax module.
      tokenizer: the Flax module.
      params: `{"generator": variables, "tokenizer": variables}`.
    """

    generator: NextScaleTransformer
    tokenizer: MultiScaleTokenizer
    params: Mapping[str, Any]

    @property
    def num_classes(self) -> int:
        """Classes; this number as a label means unconditional."""
        return self.generator.num_classes

    @property
    def patch_nums(self) -> tuple[int, ...]:
        """Grid of each scale."""
        return self.generator.patch_nums

    def encode(self, images: Float[Array, "b H W 3"]) -> Int[Array, "b l"]:
        """Tokens of images in [-1, 1], scales concatenated coarse to fine.

        Raises:
          ValueError: images of another size or dtype.
        """
        return encode(self.tokenizer, self.params["tokenizer"], jnp.asarray(images))

    def decode(self, tokens: Int[Array, "b l"]) -> Float[Array, "b H W 3"]:
        """Images in [-1, 1] of tokens.

        Raises:
          ValueError: another number of tokens, or ids outside the vocabulary.
        """
        return decode(self.tokenizer, self.params["tokenizer"], self._checked(tokens))

    def logits(self, labels: Int[Array, "b"], tokens: Int[Array, "b l"]) -> Float[Array, "b l v"]:
        """Teacher-forced float32 logits; a label of `num_classes` means unconditional."""
        labels = check_labels(labels, self.num_classes)
        return next_scale_logits(self.generator, self.tokenizer, self.params, labels, self._checked(tokens))

    def sample(
        self,
        key: Key[Array, ""],
        labels: Int[Array, "b"],
        *,
        cfg: float = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        temperature: float = 1.0,
        smooth: bool = False,
    ) -> tuple[Float[Array, "b H W 3"], Int[Array, "b l"]]:
        """Samples one image a label; one compiled function from key and labels to (images in [-1, 1], tokens).

        Args:
          key: image i depends on the key, i and its label, not on the rest of the batch.
          labels: class ids.
          cfg: guidance scale at the last scale (the weight grows from 0 at the first).
          top_k: 0 is off, 1 is greedy.
          top_p: 0 is off.
          temperature: > 0.
          smooth: the authors' `more_smooth`.
        """
        return self._sampler(smooth)(self.params, key, labels, Settings(cfg, temperature, top_k, top_p))

    def edit(
        self,
        key: Key[Array, ""],
        labels: Int[Array, "b"],
        images: Float[Array, "b H W 3"],
        keep: Any,
        *,
        cfg: float = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        temperature: float = 1.0,
        smooth: bool = False,
    ) -> tuple[Float[Array, "b H W 3"], Int[Array, "b l"]]:
        """Zero-shot in-painting, out-painting and class-conditional editing: the tokens under `keep` are forced.

        Args:
          images: the pictures to edit, in [-1, 1].
          keep: bool [h, w] or [b, h, w] of any resolution, True where the picture stays.
          key, labels, cfg, top_k, top_p, temperature, smooth: as in `sample`.
        """
        tokens = self.encode(images)
        known = Known(tokens, keep_tokens(self.generator.order, keep, batch=tokens.shape[0]))
        return self._sampler(smooth)(self.params, key, labels, Settings(cfg, temperature, top_k, top_p), known)

    def save(self, *, generator: str, tokenizer: str) -> None:
        """Writes safetensors with the authors' names and layout, buffers included, for their `load_state_dict`."""
        tensors = to_torch(self.params["generator"]["params"], generator_rules(self.generator))
        write_safetensors(generator, tensors | generator_buffers(self.generator))
        self.save_tokenizer(tokenizer)

    def save_tokenizer(self, path: str) -> None:
        """The tokenizer's part of `save`."""
        tensors = to_torch(self.params["tokenizer"]["params"], tokenizer_rules(self.tokenizer))
        hits = np.zeros((len(self.patch_nums), self.tokenizer.vocab), np.float32)
        write_safetensors(path, tensors | {"quantize.ema_vocab_hit_SV": hits})

    def _sampler(self, smooth: bool) -> NextScaleSampler:
        return NextScaleSampler(generator=self.generator, tokenizer=self.tokenizer, smooth=smooth)

    def _checked(self, tokens) -> Int[Array, "b l"]:
        return check_tokens(tokens, self.generator.order.length, self.tokenizer.vocab)


def load(
    *,
    generator: str,
    tokenizer: str,
    patch_nums: Sequence[int] | None = None,
    num_heads: int | None = None,
    scan_layers: bool = True,
    dtype: Any = jnp.float32,
) -> VAR:
    """Reads a published pair of checkpoints; sizes, heads, scales and the kind of AdaLN come from the files.

    Args:
      generator: `var_d*.pth` or its safetensors.
      tokenizer: `vae_ch160v4096z32.pth` or its safetensors.
      patch_nums: grid of each scale, where the generator's file does not reveal it.
      num_heads: where attention is not l2-normalised and the file therefore does not reveal it; the authors use width / 64.
      scan_layers: stack the blocks' parameters and scan over them.
      dtype: of the computation.

    Raises:
      ValueError: a missing, truncated or unsafe file; unknown or missing names; shapes that do not fit; scales that cannot
        be told.
    """
    module, variables = load_generator(
        generator, patch_nums=patch_nums, num_heads=num_heads, scan_layers=scan_layers, dtype=dtype
    )
    parts = with_tokenizer(module, {"generator": variables}, generator, tokenizer, dtype)
    return VAR(**parts)


def with_tokenizer(generator: NextScaleTransformer, variables: Mapping[str, Any], path: str, tokenizer: str, dtype: Any) -> dict:
    """A generator, the tokenizer that belongs to it, and the parameters of both: the fields of `VAR`.

    Args:
      generator: the module.
      variables: `{"generator": variables}`, and those of more modules.
      path: of the generator's file.
      tokenizer: path of the tokenizer's file.
      dtype: of the computation.

    Raises:
      ValueError: see `load`.
    """
    module, tokenizer_variables = load_tokenizer(tokenizer, patch_nums=generator.patch_nums, dtype=dtype)
    width = variables["generator"]["params"]["word_embed"]["kernel"].shape[0]
    if module.vocab != generator.vocab or width != module.width:
        raise ValueError(
            f"{path} (vocabulary {generator.vocab}, code width {width}) does not belong to "
            f"{tokenizer} (vocabulary {module.vocab}, code width {module.width})"
        )
    # A copy, since the arrays may be views of the files; `jnp.asarray` would compile a program for every shape.
    params = jax.device_put({**variables, "tokenizer": tokenizer_variables}, may_alias=False)
    return dict(generator=generator, tokenizer=module, params=params)


def load_generator(path: str, *, patch_nums=None, num_heads=None, scan_layers: bool = True, dtype: Any = jnp.float32):
    """The generator's module and variables (numpy); see `load`."""
    options = dict(patch_nums=patch_nums, num_heads=num_heads, scan_layers=scan_layers, dtype=dtype)
    return generator_of(read_state_dict(path), path, **options)


def generator_of(
    state: Mapping[str, np.ndarray],
    path: str,
    *,
    kind: type[NextScaleTransformer] = NextScaleTransformer,
    patch_nums=None,
    num_heads=None,
    scan_layers: bool = True,
    dtype: Any = jnp.float32,
):
    """The module, of `kind`, and the variables (numpy) of a state dict that was read from `path`; see `load`."""
    vocab, width = shape_of(state, "head.weight", path, 2)
    classes = shape_of(state, "class_emb.weight", path, 2)[0] - 1
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    head_scale = "blocks.0.attn.scale_mul_1H11"
    l2_norm = head_scale in state
    heads = num_heads or (shape_of(state, head_scale, path, 4)[1] if l2_norm else max(width // 64, 1))
    module = kind(
        vocab=vocab,
        num_classes=classes,
        patch_nums=_patch_nums(state, patch_nums, path),
        width=width,
        heads=heads,
        depth=depth,
        mlp_ratio=shape_of(state, "blocks.0.ffn.fc1.weight", path, 2)[0] / width,
        l2_norm=l2_norm,
        shared_adaln="shared_ada_lin.1.weight" in state,
        scan_layers=scan_layers,
        dtype=jnp.dtype(dtype),
    )
    expected = module.param_shapes(shape_of(state, "word_embed.weight", path, 2)[1])["params"]
    return module, {"params": read_params(path, state, generator_rules(module), GENERATOR_BUFFERS, expected)}


def load_tokenizer(path: str, *, patch_nums: Sequence[int], phi_ratio: float = 0.5, dtype: Any = jnp.float32):
    """The tokenizer's module and variables (numpy). Its file does not reveal the scales."""
    state = read_state_dict(path)
    vocab, width = shape_of(state, "quantize.embedding.weight", path, 2)
    phis = sum(name.startswith("quantize.quant_resi.") and name.endswith(".weight") for name in state)
    module = MultiScaleTokenizer(
        **autoencoder_sizes(state, path),
        vocab=vocab,
        width=width,
        patch_nums=tuple(patch_nums),
        phis=phis,
        phi_ratio=phi_ratio,
        dtype=jnp.dtype(dtype),
    )
    image = jax.ShapeDtypeStruct((1, *module.image_size, module.channels), jnp.float32)
    expected = jax.eval_shape(module.init, jax.random.key(0), image)["params"]
    unshared = "quantize.quant_resi.0.weight" in state
    rules = tokenizer_rules(module, unshared=unshared)
    return module, {"params": read_params(path, state, rules, TOKENIZER_BUFFERS, expected)}


def _patch_nums(state, given, path) -> tuple[int, ...]:
    length = shape_of(state, "pos_1LC", path, 3)[1]
    if given is None and "lvl_1L" in state:
        sizes = np.unique(state["lvl_1L"], return_counts=True)[1]
        given = [round(size**0.5) for size in sizes]
    if given is None and length in PATCH_NUMS:
        given = PATCH_NUMS[length]
    if given is None:
        raise ValueError(f"{path}: the scales of its {length} positions are not in the file; pass patch_nums")
    if sum(n * n for n in given) != length:
        raise ValueError(f"patch_nums={tuple(given)} give {sum(n * n for n in given)} positions; {path} has {length}")
    levels = np.repeat(np.arange(len(given)), np.square(given))
    if "lvl_1L" in state and not np.array_equal(np.ravel(state["lvl_1L"]), levels):
        raise ValueError(f"{path}: the levels of its positions (lvl_1L) are not those of patch_nums={tuple(given)}")
    return tuple(given)


def generator_rules(module: NextScaleTransformer) -> tuple[Rule, ...]:
    """Published names of a generator's parameters."""
    d, h = module.width, module.heads
    k = d // h
    theirs, ours = "blocks.{i}", "transformer/blocks" if module.scan_layers else "transformer/blocks_{i}"

    def parts(n: int) -> tuple[Layout, Layout]:
        """A dense layer whose output is cut into n vectors."""
        kernel = Layout(lambda x: x.T.reshape(d, n, d), lambda x: x.reshape(d, n * d).T)
        return kernel, reshape((n * d,), (n, d))

    def parts_rules(theirs: str, ours: str, n: int) -> tuple[Rule, ...]:
        kernel, bias = parts(n)
        return Rule(f"{theirs}.weight", f"{ours}/kernel", kernel), Rule(f"{theirs}.bias", f"{ours}/bias", bias)

    qkv = Layout(lambda x: x.T.reshape(d, 3, h, k), lambda x: x.reshape(d, 3 * d).T)
    proj = Layout(lambda x: x.T.reshape(h, k, d), lambda x: x.reshape(d, d).T)
    rules = [
        Rule("pos_start", "start", reshape((1, -1, d), (-1, d))),
        Rule("pos_1LC", "position", reshape((1, -1, d), (-1, d))),
        Rule("lvl_embed.weight", "level"),
        Rule("class_emb.weight", "class_embed/embedding"),
        *linear_rules("word_embed", "word_embed"),
        *linear_rules("head", "head/head"),
        *parts_rules("head_nm.ada_lin.1", "head/ada", 2),
        Rule(f"{theirs}.attn.mat_qkv.weight", f"{ours}/attention/qkv/kernel", qkv),
        Rule(f"{theirs}.attn.q_bias", f"{ours}/attention/q_bias", reshape((d,), (h, k))),
        Rule(f"{theirs}.attn.v_bias", f"{ours}/attention/v_bias", reshape((d,), (h, k))),
        Rule(f"{theirs}.attn.proj.weight", f"{ours}/attention/proj/kernel", proj),
        Rule(f"{theirs}.attn.proj.bias", f"{ours}/attention/proj/bias"),
        *linear_rules(f"{theirs}.ffn.fc1", f"{ours}/mlp/fc1"),
        *linear_rules(f"{theirs}.ffn.fc2", f"{ours}/mlp/fc2"),
    ]
    if module.l2_norm:
        rules.append(Rule(f"{theirs}.attn.scale_mul_1H11", f"{ours}/attention/log_scale", reshape((1, h, 1, 1), (h, 1))))
    if module.shared_adaln:
        rules += parts_rules("shared_ada_lin.1", "transformer/shared_ada", 6)
        rules.append(Rule(f"{theirs}.ada_gss", f"{ours}/ada/offset", reshape((1, 1, 6, d), (6, d))))
    else:
        rules += parts_rules(f"{theirs}.ada_lin.1", f"{ours}/ada/dense", 6)
    return tuple(rules)


def tokenizer_rules(module: MultiScaleTokenizer, *, unshared: bool = False) -> tuple[Rule, ...]:
    """Published names of a tokenizer's parameters; the authors name the phi convolutions by how scales share them."""
    if unshared:
        phi = conv_rules("quantize.quant_resi.{i}", "quantizer/phi_{i}")
    elif module.phis == 1:
        phi = conv_rules("quantize.quant_resi.qresi", "quantizer/phi_0")
    else:
        phi = conv_rules("quantize.quant_resi.qresi_ls.{i}", "quantizer/phi_{i}")
    return (*autoencoder_rules(), *phi, Rule("quantize.embedding.weight", "quantizer/codebook"))


def generator_buffers(module: NextScaleTransformer) -> dict[str, np.ndarray]:
    """What the authors' module keeps beside its parameters."""
    step = module.order.step_of
    bias = np.where(module.mask.dense(), 0.0, -np.inf).astype(np.float32)
    zeros = {f"blocks.{i}.attn.zero_k_bias": np.zeros(module.width, np.float32) for i in range(module.depth)}
    return {"lvl_1L": step[None].astype(np.int64), "attn_bias_for_masking": bias[None, None], **zeros}
