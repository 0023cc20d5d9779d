"""Kernels are lowered for devices that are not here, and each device gets the implementation that it should."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from kernels_pallas import explain, target
from kernels_pallas.decode import cudnn, decode_attention, tree_attention

pytestmark = pytest.mark.numeric
UNCHECKED = [export.DisabledSafetyCheck.custom_call(name) for name in ("mosaic_gpu_v2", "mosaic_gpu")]
CALLS = {"tpu": "stablehlo.custom_call @tpu_custom_call", "cuda": "stablehlo.custom_call @mosaic_gpu_v2"}


def arguments(b, s, g, h, d, dtype=jnp.bfloat16, t=None):
    q = jax.ShapeDtypeStruct((b, h, d) if t is None else (b, t, h, d), dtype)
    cache = jax.ShapeDtypeStruct((b, s, g, d), dtype)
    lengths = jax.ShapeDtypeStruct((b,), np.int32)
    if t is None:
        return q, cache, cache, lengths
    tree = jax.ShapeDtypeStruct((b, t, g, d), dtype)
    return q, cache, cache, lengths, tree, tree, jax.ShapeDtypeStruct((t, t), bool)


def lowered(kind, platform, fn, args):
    # A fresh function: JAX keeps what it traced for another target.
    with target(kind):
        return export.export(jax.jit(lambda *args: fn(*args)), platforms=[platform], disabled_checks=UNCHECKED)(
            *args
        ).mlir_module()


@pytest.mark.parametrize("kind, platform", [("v5e", "tpu"), ("v5p", "tpu"), ("h100", "cuda")])
@pytest.mark.parametrize("g, d", [(8, 128), (2, 64)])
def test_decode_is_one_kernel_that_reads_the_caches_in_place(kind, platform, g, d):
    b, s = 32, 4096
    text = lowered(kind, platform, decode_attention, arguments(b, s, g, 4 * g, d))
    assert text.count(CALLS[platform]) == 1
    # The TPU kernel takes narrow heads transposed, as they lie in a TPU's memory; nothing else may touch a cache.
    made = [line for line in text.splitlines() if "= stablehlo" in line and f"-> tensor<{b}x{s}x" in line]
    moved = [line for line in made if "transpose" not in line or "dims = [0, 1, 2, 3]" not in line]
    assert moved == []
    moves = [line for line in text.splitlines() if "stablehlo.transpose" in line and f"x{s}x" in line]
    assert all("dims = [0, 2, 3, 1]" in line for line in moves) and len(moves) == (2 if d == 64 and platform == "tpu" else 0)


@pytest.mark.parametrize("kind, platform", [("v5e", "tpu"), ("h100", "cuda")])
def test_tree_with_its_gradient(kind, platform):
    def loss(*args):
        return tree_attention(*args).astype(jnp.float32).sum()

    text = lowered(kind, platform, jax.grad(loss, (0, 1, 2, 4, 5)), arguments(2, 1024, 4, 16, 128, t=64))
    assert text.count(CALLS[platform]) == 1


@pytest.mark.parametrize(
    "kind, dtype, s, d, picked, reason",
    [
        ("h100", jnp.bfloat16, 64, 128, "hopper", None),
        ("h100", jnp.bfloat16, 63, 128, "cudnn", "cache length 63 is not a multiple of 8"),
        ("h100", np.float16, 64, 256, "cudnn", "head size 256 is not 64 or 128"),
        ("h100", np.float32, 64, 128, "xla", "dtype float32"),
        ("a100", jnp.bfloat16, 64, 128, "cudnn", "it needs a Hopper GPU"),
        ("a100", jnp.bfloat16, 64, 256, "xla", "head size 256 is not a multiple of 8 up to 128"),
        ("v5e", jnp.bfloat16, 63, 80, "tpu", None),
        ("v5e", np.float16, 64, 128, "xla", "Mosaic has no float16 products"),
        ("cpu", np.float32, 64, 128, "xla", "it is for gpu"),
    ],
)
def test_choice(kind, dtype, s, d, picked, reason, monkeypatch):
    # Where there is a cuDNN, here not to be called.
    monkeypatch.setattr(cudnn.fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "forward", lambda q, *_, **__: (q.astype(jnp.float32), q[..., 0].astype(jnp.float32)))
    with target(kind):
        (choice,) = explain(decode_attention, *arguments(2, s, 2, 4, d, dtype))
    assert choice.implementation == picked
    assert reason is None or any(reason in why for _, why in choice.refused), choice


def test_without_cudnn_xla_says_so(monkeypatch):
    def missing():
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(cudnn.fused, "check_cudnn_version", missing)
    with target("a100"):
        (choice,) = explain(decode_attention, *arguments(2, 64, 2, 4, 64))
    assert choice.implementation == "xla" and "no cuDNN here: cuDNN is not detected." in str(choice)


def test_cudnn_gets_the_rows_of_a_head_as_queries(oracle, monkeypatch):
    """A stand-in with cuDNN's calling convention: [b, t, n, h] in, the log-sum-exp [b, n, t], garbage if one has no keys."""

    def stand_in(q, k, v, *, q_seqlen, kv_seqlen, scale, mask_type, return_residual):
        assert mask_type is cudnn.fused.MaskType.PADDING and return_residual and q.shape[2] == k.shape[2]
        past = jnp.arange(k.shape[1]) >= kv_seqlen[:, None, None, None]
        s = jnp.where(past, -jnp.inf, jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32) * scale)
        undefined = (kv_seqlen == 0).any() | (q_seqlen != q.shape[1])
        o = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(s).astype(v.dtype), v)
        lse = jax.nn.logsumexp(s, axis=-1)
        return [jnp.where(undefined[(..., *[None] * (x.ndim - 1))], jnp.nan, x) for x in (o, lse)]

    monkeypatch.setattr(cudnn.fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn.fused, "dot_product_attention", stand_in)
    x = oracle.draw(4, 24, 2, 8, 64, jnp.bfloat16, garbage=False)
    with target("a100"):
        attend = functools.partial(decode_attention, scale=0.2, return_lse=True, implementation="cudnn")
        o, lse = jax.jit(attend)(x.q, x.k_cache, x.v_cache, x.lengths)
    want_o, want_lse = oracle.attention_of_rows(x.q, x.k_cache, x.v_cache, x.lengths, 0.2)
    np.testing.assert_allclose(np.asarray(o, np.float64), want_o, rtol=0, atol=oracle.tolerance(x.v_cache, jnp.bfloat16))
    np.testing.assert_allclose(lse, want_lse, rtol=3e-6, atol=3e-6)
