import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import masks
from jaxgen.nn.llama import LlamaTransformer
from jaxgen.nn.rope import rotate
from jaxgen.orders import raster

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]


def turned(x, pos, theta):
    """Every pair as a complex number times exp(i angle), in float64."""
    d = x.shape[-1]
    pairs = x[..., 0::2] + 1j * x[..., 1::2]
    pairs = pairs * np.exp(1j * pos[..., None] * theta ** (-np.arange(0, d, 2) / d))
    return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)


def test_rotation_is_a_complex_product():
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 8))
    pos = np.array([[0, 1, 2, 7, 300], [4, 4, 0, 1, 9]])
    want = np.stack([turned(row, p[:, None], 1000.0) for row, p in zip(x, pos)])
    np.testing.assert_allclose(rotate(jnp.float32(x), pos, theta=1000.0), want, atol=2e-5)
    np.testing.assert_allclose(rotate(jnp.float32(x), pos[0])[0], rotate(jnp.float32(x), pos)[0], atol=1e-6)


def test_two_coordinates_turn_a_half_each():
    x = np.random.default_rng(1).normal(size=(1, 4, 1, 8))
    pos = np.array([[[0, 5], [1, 2], [3, 0], [2, 2]]])
    halves = [turned(x[0, ..., i : i + 4], pos[0, :, i // 4, None], 10000.0) for i in (0, 4)]
    np.testing.assert_allclose(rotate(jnp.float32(x), pos)[0], np.concatenate(halves, -1), atol=2e-5)


def test_time_turns_what_three_coordinates_leave():
    """Of 8 numbers 2 for a row, 2 for a column and the other 4 for the frame."""
    x = np.random.default_rng(2).normal(size=(1, 3, 1, 8))
    pos = np.array([[[0, 5, 1], [1, 2, 0], [3, 0, 7]]])
    parts = [turned(x[0, ..., a:b], pos[0, :, i, None], 10000.0) for i, (a, b) in enumerate([(0, 4), (4, 6), (6, 8)])]
    np.testing.assert_allclose(rotate(jnp.float32(x), pos)[0], np.concatenate(parts, -1), atol=2e-5)


def test_positions_that_do_not_fit():
    x = jnp.ones((2, 5, 1, 8))
    for pos in (jnp.arange(4), jnp.zeros((3, 5)), jnp.zeros((5, 2))):
        with pytest.raises(ValueError, match="do not fit x"):
            rotate(x, pos)
    for size, coordinates in ((7, 1), (4, 3)):
        with pytest.raises(ValueError, match=f"head size {size}: expected an even number, at least 2 for each of {coordinates}"):
            rotate(x[..., :size], jnp.zeros((1, 5, coordinates)))


LENGTH = 6
STACK = LlamaTransformer(width=16, heads=4, kv_heads=2, hidden=24, depth=3, mask=masks.block_causal(raster(LENGTH)))


@pytest.fixture(scope="module")
def made():
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, 16))
    params = STACK.init(jax.random.key(1), x, jnp.arange(LENGTH))
    return x, jax.tree.map(lambda p: p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape), params)


def by_hand(params, x):
    """The equations of the block in numpy, a row and a head at a time."""
    x = np.asarray(x, np.float64)
    for i in range(3):
        p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"][f"blocks_{i}"])

        def norm(x, scale):
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale["scale"]

        h = norm(x, p["attention_norm"])
        qkv = p["attention"]["qkv"]["kernel"]  # two queries, a key and a value for each of two heads
        q = np.einsum("bld,dhk->blhk", h, qkv[:, :, :2].reshape(16, 4, 4))
        k, v = (np.einsum("bld,dhk->blhk", h, qkv[:, :, part]) for part in (2, 3))
        place = np.arange(LENGTH)[:, None]
        q, k = (np.stack([turned(row, place, 10000.0) for row in part]) for part in (q, k))
        out = np.zeros_like(q)
        for head in range(4):
            scores = np.einsum("bqk,bsk->bqs", q[:, :, head], k[:, :, head // 2]) / 2
            scores = np.where(np.tril(np.ones((LENGTH, LENGTH), bool)), scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, :, head] = weights / weights.sum(-1, keepdims=True) @ v[:, :, head // 2]
        x = x + np.einsum("blhk,hkd->bld", out, p["attention"]["o"]["kernel"])
        h, mlp = norm(x, p["mlp_norm"]), p["mlp"]
        gate, up = (h @ mlp["w13"]["kernel"][:, part] for part in (0, 1))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ mlp["w2"]["kernel"]
    return x


def test_the_stack_is_its_equations(made):
    x, params = made
    got, cache = STACK.apply(params, x, jnp.arange(LENGTH))
    assert cache is None
    np.testing.assert_allclose(got, by_hand(params, x), rtol=1e-4, atol=1e-4)


def test_scanned_blocks_are_the_unrolled_ones(made):
    x, params = made
    layers = [params["params"][f"blocks_{i}"] for i in range(3)]
    stacked = {"params": {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}}
    want, _ = STACK.apply(params, x, jnp.arange(LENGTH))
    for remat in (False, True):
        scanned = dataclasses.replace(STACK, scan_layers=True, remat=remat)
        np.testing.assert_allclose(scanned.apply(stacked, x, jnp.arange(LENGTH))[0], want, atol=1e-5)
    with pytest.raises(ValueError, match=r"layers=\(0, 2\): scanned blocks run all together"):
        scanned.apply(stacked, x, jnp.arange(LENGTH), layers=(0, 2))


def test_ranges_of_blocks_compose(made):
    x, params = made
    want, _ = STACK.apply(params, x, jnp.arange(LENGTH))
    early, _ = STACK.apply(params, x, jnp.arange(LENGTH), layers=(0, 1))
    assert np.abs(early - want).max() > 0.1
    got, _ = STACK.apply(params, early, jnp.arange(LENGTH), layers=(1, 3))
    np.testing.assert_allclose(got, want, atol=1e-5)
    with pytest.raises(ValueError, match=r"layers=\(2, 4\)"):
        STACK.apply(params, x, jnp.arange(LENGTH), layers=(2, 4))


def test_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="kv_heads=3 must divide heads=4"):
        dataclasses.replace(STACK, kv_heads=3).init(jax.random.key(0), jnp.ones((1, 2, 16)), jnp.arange(2))
