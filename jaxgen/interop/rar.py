"""Official RAR checkpoints: the class-conditional transformer of bytedance/1d-tokenizer over tokens of MaskGIT's VQGAN.

    model = load(generator="rar_b.bin")
    tokens = model.sample(jax.random.key(0), [207, 980], cfg=16.0, power=2.75)

Its tokenizer, the PyTorch copy of MaskGIT's, is not read here: `sample` gives tokens.
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

from jaxgen.decoding import Settings, check_settings, cosine_ramp
from jaxgen.generators import NextTokenSampler, RandomOrderTransformer, check_labels
from jaxgen.interop.calls import check_tokens, read_params
from jaxgen.interop.files import read_state_dict, write_safetensors
from jaxgen.interop.mapping import Layout, Rule, linear_rules, norm_rules, reshape, to_torch
from jaxgen.interop.vqgan import shape_of

__all__ = ["RAR", "load"]

# Rows of the published tables that no model reads.
SPARE_POSITIONS, SPARE_TIMES = 1024, 100
# The published buffer is not persistent; other savers may keep it.
BUFFERS = ("attn_mask",)
BIASES = ("q_bias", "k_bias", "v_bias")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RAR:
    """A generator with its parameters.

    Attributes:
      generator: the Flax module.
      params: `{"generator": variables}`.
    """

    generator: RandomOrderTransformer
    params: Mapping[str, Any]

    @property
    def num_classes(self) -> int:
        """Classes; this number as a label means unconditional."""
        return self.generator.num_classes

    def logits(
        self, labels: Int[Array, "b"], tokens: Int[Array, "b l"], orders: Int[Array, "b l"] | None = None
    ) -> Float[Array, "b l+1 v"]:
        """Teacher-forced float32 logits after the class and after each token; the last, as published, predict nothing.

        Args:
          labels: class ids.
          tokens: in raster order.
          orders: a permutation a row, in which the tokens are read and predicted; None is raster order.

        Raises:
          ValueError: labels or tokens out of range, arrays of other shapes, or orders that are no permutations.
        """
        labels, length = check_labels(labels, self.num_classes), self.generator.length
        tokens = check_tokens(tokens, length, self.generator.vocab)
        if orders is not None:
            orders = np.asarray(orders)
            if orders.shape != tokens.shape or (np.sort(orders, axis=1) != np.arange(length)).any():
                raise ValueError(f"orders {orders.shape}: expected [b, {length}], each row a permutation of 0..{length - 1}")
            orders = jnp.asarray(orders, jnp.int32)
        return _logits(self.generator, self.params["generator"], labels, tokens, orders)

    def sample(
        self,
        key: Key[Array, ""],
        labels: Int[Array, "b"],
        *,
        cfg: float = 16.0,
        power: float = 2.75,
        top_k: int = 0,
        top_p: float = 0.0,
        temperature: float = 1.0,
    ) -> Int[Array, "b l"]:
        """Samples the tokens of one image a label in raster order, in one compiled function.

        Args:
          key: image i depends on the key, i and its label, not on the rest of the batch.
          labels: class ids.
          cfg: the authors' guidance scale, towards which the weight of the conditional law rises from 1; 1 is no guidance, and
            so, as with the authors, is 0.
          power: > 0; larger ones raise it later, see `cosine_ramp`.
          top_k: 0 is off, 1 is greedy.
          top_p: 0 and 1 are off.
          temperature: > 0.

        Raises:
          ValueError: labels or settings out of range.
        """
        check_settings(cfg=cfg)
        if not 0 < power < np.inf:
            raise ValueError(f"power={power}: must be > 0 and finite")
        weights = cosine_ramp(cfg - 1 if cfg else 0.0, power, self.generator.length)
        sampler = NextTokenSampler(generator=self.generator, tokenizer=None)
        return sampler(self.params, key, labels, Settings(weights, temperature, top_k, top_p))[1]

    def save(self, *, generator: str) -> None:
        """Writes safetensors with the authors' names and layout; the rows of their tables that no model reads are 0."""
        tensors = to_torch(self.params["generator"]["params"], rules(self.generator))
        write_safetensors(generator, _joined(tensors, self.generator))


@functools.partial(jax.jit, static_argnums=0)
def _logits(generator, params, labels, tokens, orders):
    return generator.apply(params, labels, tokens, orders, method="read")


def load(*, generator: str, scan_layers: bool = True, dtype: Any = jnp.float32) -> RAR:
    """Reads a published checkpoint; all sizes come from the file.

    Args:
      generator: `rar_{b,l,xl,xxl}.bin` or its safetensors.
      scan_layers: stack the blocks' parameters and scan over them.
      dtype: of the computation.

    Raises:
      ValueError: a missing, truncated or unsafe file; unknown or missing names; shapes that do not fit.
    """
    state = read_state_dict(generator)
    vocab, width = shape_of(state, "lm_head.weight", generator, 2)
    size = shape_of(state, "blocks.0.attn.q_norm.weight", generator, 1)[0]
    length = shape_of(state, "pos_embed", generator, 3)[1] - SPARE_POSITIONS
    # Codes, the mask token (which no model reads), classes, and no class.
    num_classes = shape_of(state, "embeddings.weight", generator, 2)[0] - vocab - 2
    if length < 1 or num_classes < 1 or width % size:
        raise ValueError(
            f"{generator}: {length} tokens, {num_classes} classes and heads of size {size} in width {width} make no model"
        )
    module = RandomOrderTransformer(
        vocab=vocab,
        num_classes=num_classes,
        length=length,
        width=width,
        heads=width // size,
        depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        mlp_ratio=shape_of(state, "blocks.0.mlp.fc1.weight", generator, 2)[0] / width,
        scan_layers=scan_layers,
        dtype=jnp.dtype(dtype),
    )
    expected = module.param_shapes()["params"]
    variables = {"params": read_params(generator, _split(state, module), rules(module), BUFFERS, expected)}
    # A copy, since the arrays may be views of the file.
    return RAR(generator=module, params=jax.device_put({"generator": variables}, may_alias=False))


def _split(state: Mapping[str, np.ndarray], module: RandomOrderTransformer) -> dict[str, np.ndarray]:
    """The published tables cut into what is read: codes and classes, positions and steps that there are, biases apart."""
    out, vocab, rows = dict(state), module.vocab, module.length + 2
    table = out.pop("embeddings.weight")
    out |= {"embeddings.codes": table[:vocab], "embeddings.classes": table[vocab + 1 :]}
    for name, used in _tables(rows):
        if name in out and out[name].ndim == 3:
            out[name] = out[name][0, used]
    for name in [name for name in out if name.endswith("attn.qkv.bias")]:
        out |= zip((name.removesuffix("qkv.bias") + bias for bias in BIASES), np.split(out.pop(name), 3))
    return out


def _joined(tensors: Mapping[str, np.ndarray], module: RandomOrderTransformer) -> dict[str, np.ndarray]:
    """The inverse of `_split`, with zeros where the model has nothing."""
    out, d, rows = dict(tensors), module.width, module.length + 2
    mask = np.zeros((1, d), np.float32)
    out["embeddings.weight"] = np.concatenate([out.pop("embeddings.codes"), mask, out.pop("embeddings.classes")])
    for name, used in _tables(rows):
        table = np.zeros((1, module.length + (SPARE_TIMES if name == "timesteps_embeddings" else SPARE_POSITIONS), d), np.float32)
        table[0, used] = out[name]
        out[name] = table
    for name in [name for name in out if name.endswith(BIASES[0])]:
        stem = name.removesuffix(BIASES[0])
        out[f"{stem}qkv.bias"] = np.concatenate([out.pop(stem + bias) for bias in BIASES])
    return out


def _tables(rows: int) -> tuple[tuple[str, slice], ...]:
    """The rows of each table that are read."""
    return (
        ("pos_embed", slice(rows)),
        ("target_aware_pos_embed", slice(2, rows)),
        ("timesteps_embeddings", slice(rows)),
    )


def rules(module: RandomOrderTransformer) -> tuple[Rule, ...]:
    """Published names of the parameters, as `_split` leaves them."""
    d, h = module.width, module.heads
    k = d // h
    theirs, ours = "blocks.{i}", "transformer/blocks" if module.scan_layers else "transformer/blocks_{i}"
    # Theirs: shift, scale and gate of the attention, then of the MLP. Ours: both gates, both scales, both shifts.
    turn = [2, 5, 1, 4, 0, 3]
    back = np.argsort(turn)
    parts = Layout(lambda x: x.T.reshape(d, 6, d)[:, turn], lambda x: x[:, back].reshape(d, 6 * d).T)
    offsets = Layout(lambda x: x.reshape(6, d)[turn], lambda x: x[back].reshape(6 * d))
    qkv = Layout(lambda x: x.T.reshape(d, 3, h, k), lambda x: x.reshape(d, 3 * d).T)
    proj = Layout(lambda x: x.T.reshape(h, k, d), lambda x: x.reshape(d, d).T)
    final = Layout(lambda x: x.T.reshape(d, 2, d), lambda x: x.reshape(d, 2 * d).T)
    norms = {"norm1": "norm_0", "norm2": "norm_1", "attn.q_norm": "attention/q_norm", "attn.k_norm": "attention/k_norm"}
    return (
        Rule("cls_token", "start", reshape((1, 1, d), (d,))),
        Rule("embeddings.codes", "token_embed/embedding"),
        Rule("embeddings.classes", "class_embed/embedding"),
        Rule("pos_embed", "position"),
        Rule("target_aware_pos_embed", "target"),
        Rule("timesteps_embeddings", "time"),
        Rule("adaln_before_head.adaLN_modulation.1.weight", "head/ada/kernel", final),
        Rule("adaln_before_head.adaLN_modulation.1.bias", "head/ada/bias", reshape((2 * d,), (2, d))),
        *linear_rules("lm_head", "head/head"),
        *(rule for name, our in norms.items() for rule in norm_rules(f"{theirs}.{name}", f"{ours}/{our}")),
        Rule(f"{theirs}.attn.qkv.weight", f"{ours}/attention/qkv/kernel", qkv),
        *(Rule(f"{theirs}.attn.{bias}", f"{ours}/attention/{bias}", reshape((d,), (h, k))) for bias in BIASES),
        Rule(f"{theirs}.attn.proj.weight", f"{ours}/attention/proj/kernel", proj),
        Rule(f"{theirs}.attn.proj.bias", f"{ours}/attention/proj/bias"),
        *linear_rules(f"{theirs}.mlp.fc1", f"{ours}/mlp/fc1"),
        *linear_rules(f"{theirs}.mlp.fc2", f"{ours}/mlp/fc2"),
        Rule(f"{theirs}.adaLN_modulation.1.weight", f"{ours}/ada/dense/kernel", parts),
        Rule(f"{theirs}.adaLN_modulation.1.bias", f"{ours}/ada/dense/bias", offsets),
    )
