import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import masks
from jaxgen.decoding import KVCache
from jaxgen.nn import SelfAttention, attend, attend_cached
from jaxgen.orders import raster, scales
from kernels_pallas import BlockMask, explain, target

pytestmark = pytest.mark.numeric

B, Q, S, H, D = 2, 5, 7, 3, 8


def qkv(q=Q, s=S, seed=0, dtype=np.float32, groups=H):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(B, n, h, D)), dtype) for n, h in ((q, H), (s, groups), (s, groups))]


def run(q, k, v, mask=None, **options):
    """`attend`, compiled."""
    if isinstance(mask, BlockMask):
        return jax.jit(functools.partial(attend, mask=mask, **options))(q, k, v)
    return jax.jit(functools.partial(attend, **options))(q, k, v, mask)


def reference(q, k, v, allowed=None, scale=D**-0.5):
    """Softmax attention in float64, a row at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    out = np.zeros(q.shape)
    if allowed is not None:
        allowed = np.broadcast_to(allowed, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
    for b, h, i in np.ndindex(q.shape[0], q.shape[2], q.shape[1]):
        logits = k[b, :, h] @ q[b, i, h] * scale
        if allowed is not None:
            logits = np.where(allowed[b, h, i], logits, -np.inf)
        weights = np.exp(logits - logits.max())
        out[b, i, h] = weights @ v[b, :, h] / weights.sum()
    return out


def test_attend_is_softmax_attention():
    q, k, v = qkv()
    np.testing.assert_allclose(run(q, k, v), reference(q, k, v), atol=2e-6)
    np.testing.assert_allclose(run(q, k, v, scale=1.3), reference(q, k, v, scale=1.3), atol=5e-6)


def test_attend_with_masks():
    q, k, v = qkv()
    rng = np.random.default_rng(1)
    one = rng.random((1, 1, Q, S)) < 0.5
    one[..., 0] = True
    each = rng.random((B, H, Q, S)) < 0.5
    each[..., 2] = True
    for allowed in (one, each):
        np.testing.assert_allclose(run(q, k, v, jnp.asarray(allowed)), reference(q, k, v, allowed), atol=2e-6)


def test_block_mask_is_its_dense_mask():
    mask = masks.block_causal(scales((1, 2, 3)), block=(4, 4))
    q, k, v = qkv(14, 14)
    want = reference(q, k, v, mask.dense()[None, None])
    np.testing.assert_allclose(run(q, k, v, mask), want, atol=2e-6)
    np.testing.assert_allclose(attend(q, k, v, jnp.asarray(mask.dense())[None, None]), want, atol=2e-6)
    assert np.abs(attend(q, k, v) - want).max() > 0.1  # the mask matters


@pytest.mark.parametrize("queries", [1, 3])
def test_lengths_are_how_many_keys_a_row_sees(queries):
    q, k, v = qkv(queries)
    lengths = np.array([4, 7])
    allowed = (np.arange(S) < lengths[:, None])[:, None, None, :]
    got = run(q, k, v, jnp.asarray(lengths))
    np.testing.assert_allclose(got, reference(q, k, v, allowed), atol=2e-6)


def test_heads_share_keys():
    order = raster(5)
    for mask, allowed in (
        (None, None),
        (masks.block_causal(order), np.tri(5, dtype=bool)),
        (jnp.tri(5, dtype=bool), np.tri(5, dtype=bool)),
        (jnp.array([3, 5]), (np.arange(5) < np.array([[3], [5]]))[:, None, None, :]),
    ):
        q, k, v = qkv(5, 5, groups=1)
        np.testing.assert_allclose(run(q, k, v, mask), reference(q, k, v, allowed), atol=2e-6)
    q, k, v = qkv(1, 5, groups=1)
    np.testing.assert_allclose(run(q, k, v, jnp.array([5, 5])), reference(q, k, v), atol=2e-6)


def test_a_query_that_sees_nothing_gets_nothing():
    q, k, v = qkv(4, 4)
    out = run(q, k, v, masks.documents([1, 0, 2, 2]))
    assert not np.any(out[:, 1]) and np.all(np.any(out[:, [0, 2, 3]], axis=(2, 3)))


def test_softmax_is_float32_in_half_precision():
    q, k, v = qkv(dtype=jnp.bfloat16)
    q = q * 8  # logits of tens: their rounding to 8 bits would change the weights by tens of percent
    got = attend(q, k, v)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(np.float32), reference(q, k, v), atol=0.02)


def test_errors():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="implementation='flash' is not one of"):
        attend(q, k, v, implementation="flash")
    with pytest.raises(ValueError, match="'cudnn' cannot run on cpu"):
        attend(q, k, v, implementation="cudnn")
    with target("h100"), pytest.raises(ValueError, match="'cudnn' cannot run on gpu h100: it needs half precision"):
        attend(q, k, v, implementation="cudnn")
    with pytest.raises(ValueError, match="does not fit"):
        attend(q, k, v, masks.block_causal(scales((1, 2))))
    with pytest.raises(ValueError, match="heads=5 does not divide width 12"):
        SelfAttention(5).init(jax.random.key(0), jnp.zeros((1, 2, 12)))


@pytest.mark.parametrize(
    ("dtype", "lengths", "head_size", "masked", "want"),
    [
        ("bfloat16", (16, 16), 64, True, "cudnn"),
        ("bfloat16", (25, 55), 64, False, "cudnn"),
        ("float32", (16, 16), 64, True, "xla"),
        ("bfloat16", (21, 21), 64, True, "xla"),  # cuDNN has no masked training kernel for odd lengths
        ("bfloat16", (16, 16), 640, False, "xla"),  # nor one for heads as wide as the tokenizer's
        ("float16", (16, 16), 20, False, "xla"),
    ],
)
def test_what_a_gpu_gets_when_nothing_is_named(monkeypatch, dtype, lengths, head_size, masked, want):
    seen = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *_, implementation, **__: seen.append(implementation))
    q, k = (jnp.zeros((1, n, 1, head_size), dtype) for n in lengths)
    with target("h100"):
        attend(q, k, k, jnp.ones((1, 1, *lengths), bool) if masked else None)
    assert seen == [want]


def test_what_runs_can_be_explained():
    q, k, v = qkv(14, 14)
    mask = masks.block_causal(scales((1, 2, 3)))
    ops = [explain(attend, q, k, v, m)[0] for m in (mask, None, jnp.ones((14, 14), bool), jnp.array([3, 4]))]
    assert [op.op for op in ops] == ["block_sparse_attention"] + ["dense_attention"] * 3
    (one,) = explain(attend, q[:, :1], k, v, jnp.array([3, 4]))
    assert one.op == "decode_attention"
    x = jax.ShapeDtypeStruct((1, 14, 24), jnp.float32)
    module = SelfAttention(3, mask=mask, implementation="xla")
    (choice,) = explain(module.apply, jax.eval_shape(module.init, jax.random.key(0), x), x)
    assert choice.implementation == "xla" and choice.forced and choice.problem.mask == mask


def projections(params, x):
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    q, k, v = np.moveaxis(np.einsum("bld,dphk->blphk", np.asarray(x, np.float64), p["qkv"]["kernel"]), 2, 0)
    return p, q + p["q_bias"], k, v + p["v_bias"]


def project_out(p, out):
    return np.einsum("blhk,hkd->bld", out, p["proj"]["kernel"]) + p["proj"]["bias"]


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(4).normal(size=(B, 14, 24)), jnp.float32)


def test_self_attention(x, randomize):
    mask = masks.block_causal(scales((1, 2, 3)))
    module = SelfAttention(3, scale=0.2, mask=mask)
    params = randomize(jax.eval_shape(module.init, jax.random.key(0), x))
    out, cache = jax.jit(module.apply)(params, x)
    p, q, k, v = projections(params, x)
    assert cache is None
    np.testing.assert_allclose(out, project_out(p, reference(q, k, v, mask.dense(), scale=0.2)), atol=1e-5)
    default, _ = jax.jit(SelfAttention(3).apply)(params, x)
    np.testing.assert_allclose(default, project_out(p, reference(q, k, v)), atol=1e-5)


def test_l2_norm_has_a_clipped_scale_for_each_head(x, randomize):
    module = SelfAttention(3, l2_norm=True, scale=0.2)  # the scale is for plain attention and is not read here
    params = randomize(jax.eval_shape(module.init, jax.random.key(0), x))
    params["params"]["log_scale"] = np.array([[0.0], [1.5], [6.0]], np.float32)  # exp(6) = 403 is cut to 100
    p, q, k, v = projections(params, x)
    q, k = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
    q = q * np.array([1.0, math.exp(1.5), 100.0])[:, None]
    want = project_out(p, reference(q, k, v, scale=1.0))
    np.testing.assert_allclose(jax.jit(module.apply)(params, x)[0], want, atol=3e-5)
    initial = jax.jit(module.init)(jax.random.key(0), x)["params"]["log_scale"]
    np.testing.assert_allclose(initial, np.full((3, 1), math.log(4)), atol=1e-6)


def test_l2_norm_of_nothing_has_a_gradient(x, randomize):
    module = SelfAttention(3, l2_norm=True)
    params = randomize(jax.eval_shape(module.init, jax.random.key(0), x))
    # Keys have no bias, so the keys of a zero input are zero vectors.
    grads = jax.jit(jax.grad(lambda p, x: jnp.sum(jnp.square(module.apply(p, x)[0])), (0, 1)))(params, jnp.zeros_like(x))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("l2_norm", [False, True])
def test_a_cache_in_pieces_is_the_masked_whole(x, randomize, l2_norm):
    order = scales((1, 2, 3))
    module = SelfAttention(3, l2_norm=l2_norm, mask=masks.block_causal(order))
    params = randomize(jax.eval_shape(module.init, jax.random.key(0), x))
    whole, _ = jax.jit(module.apply)(params, x)
    step = jax.jit(module.apply)
    cache = KVCache.zeros(layers=2, batch=B, capacity=14, heads=3, head_size=8)
    for part, want in zip(order.split(x), order.split(whole)):
        out, cache = step(params, part, cache, 1)
        cache = cache.commit(part.shape[1])
        np.testing.assert_allclose(out, want, atol=2e-6)
    assert not np.any(cache.k[0]) and np.all(np.any(cache.k[1], axis=(0, 2, 3)))


@pytest.mark.parametrize("implementation", [None, "split"])  # "split" serves block masks only; reads of the cache pick their own
def test_tokens_one_by_one_are_the_masked_whole(x, randomize, implementation):
    module = SelfAttention(3, mask=masks.block_causal(raster(14)), implementation=implementation)
    params = randomize(jax.eval_shape(module.init, jax.random.key(0), x))
    whole, _ = jax.jit(module.apply)(params, x)
    step = jax.jit(module.apply)
    cache = KVCache.zeros(layers=1, batch=B, capacity=16, heads=3, head_size=8)
    cache = KVCache(cache.k, cache.v, jnp.zeros(B, jnp.int32))
    for t in range(14):
        out, cache = step(params, x[:, t : t + 1], cache)
        cache = cache.commit(1)
        np.testing.assert_allclose(out, whole[:, t : t + 1], atol=2e-6)
    assert step._cache_size() == 1


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layer", [0, 1])
def test_ragged_rows_read_in_place_are_those_that_are_read_out(masked, layer):
    """Against `KVCache.read` and softmax attention: one more token a row, or three that see one another as a mask says."""
    q_len, heads = (3, 4) if masked else (1, 4)
    keys = iter(jax.random.split(jax.random.key(5), 8))
    q = jax.random.normal(next(keys), (B, q_len, heads, 8))
    k, v = (jax.random.normal(next(keys), (B, q_len, 2, 8)) for _ in "kv")
    buffers = [jax.random.normal(next(keys), (2, B, 9, 2, 8)) for _ in "kv"]
    cache = KVCache(*buffers, jnp.arange(B, dtype=jnp.int32) * 2)
    mask = jnp.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], bool) if masked else None
    got, after = jax.jit(attend_cached)(q, k, v, cache, layer, mask)
    staged = cache.stage(layer, k, v)
    want = jax.jit(lambda q, staged: attend(q, *staged.read(layer, q_len, mask)))(q, staged)
    np.testing.assert_allclose(got, want, atol=2e-6)
    np.testing.assert_array_equal(after.k, staged.k)
    asked, same = jax.jit(attend_cached)(q, None, None, staged, layer, mask)
    np.testing.assert_allclose(asked, want, atol=2e-6)
    np.testing.assert_array_equal(same.v, staged.v)
