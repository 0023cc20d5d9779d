"""Packing: words as documented, nearest values, scales that lose least."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import target
from kernels_pallas.int4 import group_scales, nearest, pack_int4, pack_values, relayout, unpack_int4
from kernels_pallas.int4.pack import nests

pytestmark = pytest.mark.numeric
SIZES = [(256, 5, 128), (128, 130, 32), (1920, 3, 128), (384, 7, 96), (24, 1, 8), (1024, 2, 1024)]


def values(k, n, group, *lead):
    rng = np.random.default_rng(k + n)
    q = rng.integers(-8, 8, (*lead, k, n)).astype(np.int8)
    return q, rng.uniform(0.5, 2, (*lead, k // group, n)).astype(np.float32)


@pytest.mark.parametrize("k, n, group", SIZES)
def test_words_hold_the_integers(k, n, group, decode):
    q, scales = values(k, n, group)
    packed = pack_values(jnp.asarray(q), jnp.asarray(scales), layout="kn")
    assert packed.words.shape == (k // 8, n) and packed.words.dtype == jnp.int32
    assert (packed.k, packed.n, packed.group) == (k, n, group) and nests(group, packed.tile) and k % (4 * packed.tile) == 0
    other = relayout(packed, "nk")
    assert other.words.shape == (-(-n // 64) * 64, k // 8) and other.scales.shape == (k // group, other.words.shape[0])
    assert not other.words[n:].any() and not other.scales[:, n:].any()
    for layout in (packed, other):
        integers, weights = decode(layout)
        np.testing.assert_array_equal(integers, q)
        np.testing.assert_array_equal(weights, q.astype(np.float64) * np.repeat(scales, group, axis=0))
        np.testing.assert_array_equal(unpack_int4(layout), q)
    back = relayout(other, "kn")
    assert jax.tree.structure(back) == jax.tree.structure(packed)
    jax.tree.map(np.testing.assert_array_equal, back, packed)
    assert packed.nbytes == k * n // 2 + 4 * k // group * n


def test_stacks_are_packed_layer_by_layer():
    q, scales = values(64, 6, 16, 2, 3)
    for layout in ("kn", "nk"):
        stack = pack_values(jnp.asarray(q), jnp.asarray(scales), layout=layout)
        np.testing.assert_array_equal(unpack_int4(stack), q)
        one = pack_values(jnp.asarray(q[1, 2]), jnp.asarray(scales[1, 2]), layout=layout)
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[1, 2], y), stack, one)
        inner = jax.vmap(jax.vmap(unpack_int4))(stack)
        np.testing.assert_array_equal(inner, q)


def test_the_layout_is_the_devices():
    w = jnp.ones((16, 4))
    for kind, layout in (("cpu", "kn"), ("v5e", "kn"), ("h100", "nk"), ("a100", "nk")):
        with target(kind):
            assert pack_int4(w, 8).layout == layout
            assert pack_int4(w, 8, layout="kn").layout == "kn"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("clip", ["max", "mse"])
def test_no_other_integer_is_nearer(dtype, clip):
    """All sixteen are tried in float64."""
    w = np.random.default_rng(0).standard_t(3, (64, 9)).astype(np.float32)
    packed = pack_int4(jnp.asarray(w), 16, scale_dtype=dtype, clip=clip)
    assert packed.scales.dtype == dtype
    scales = np.repeat(np.asarray(packed.scales).astype(np.float64), 16, axis=0)
    errors = np.abs(np.arange(-8, 8)[:, None, None] * scales - w)
    chosen = np.take_along_axis(errors, np.asarray(unpack_int4(packed)).astype(int)[None] + 8, axis=0)[0]
    assert (chosen <= errors.min(axis=0) + 1e-6 * np.abs(w)).all()
    if clip == "max" and dtype == "float32":
        np.testing.assert_allclose(packed.scales, np.abs(w).reshape(4, 16, 9).max(axis=1) / 7, rtol=1e-6)


def test_clipping_loses_least():
    """Against every share of the range on a finer grid; and never worse than none."""
    w = np.random.default_rng(1).standard_t(3, (128, 40)).astype(np.float64)

    def error(scales):
        q = np.clip(np.round(w / scales), -8, 7)
        return np.square(q * scales - w).sum(axis=0)

    found = error(np.asarray(group_scales(jnp.asarray(w, jnp.float32), 128), np.float64))
    full = np.abs(w).max(axis=0) / 7
    best = np.min([error(share * full) for share in np.linspace(0.35, 1, 400)], axis=0)
    assert (found <= error(full) * (1 + 1e-6)).all() and found.sum() < 0.8 * error(full).sum()
    assert (found <= 1.1 * best).all()


def test_zeros_and_their_neighbours_survive():
    w = jnp.zeros((16, 2)).at[8:, 1].set(1.0)
    for dtype in ("float32", "bfloat16", "float16"):
        packed = pack_int4(w, 8, scale_dtype=dtype)
        assert (packed.scales > 0).all() and jnp.isfinite(packed.scales).all()
        q = unpack_int4(packed)
        assert not q[:, 0].any() and not q[:8, 1].any()
        np.testing.assert_allclose(q[8:, 1] * packed.scales[1, 1].astype(jnp.float32), 1.0, rtol=4e-3)


def test_rounding_in_a_jitted_function_is_the_same():
    w = jax.random.normal(jax.random.key(0), (64, 10))
    jitted = jax.jit(lambda w: pack_int4(w, 32))(w)
    np.testing.assert_array_equal(nearest(w, jitted.scales), unpack_int4(pack_int4(w, 32)))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda w: pack_int4(w, 48), "group=48 must be a multiple of 8 that divides the 64 rows"),
        (lambda w: pack_int4(w, 4), "group=4 must be a multiple of 8"),
        (lambda w: pack_int4(w, 128), "group=128 must be a multiple of 8 that divides the 64 rows"),
        (lambda w: pack_int4(w, 16.0), "group=16.0 must be"),
        (lambda w: pack_int4(w[0], 16), r"w must be floating \[..., k, n\] with no empty axis, not float32 \(3,\)"),
        (lambda w: pack_int4(w[:, :0], 16), r"not float32 \(64, 0\)"),
        (lambda w: pack_int4(w.astype(jnp.int8), 16), "not int8"),
        (lambda w: pack_int4(w, 16, clip="best"), "clip='best' is not one of max, mse"),
        (lambda w: pack_int4(w, 16, layout="km"), "layout='km' is not one of kn, nk"),
        (lambda w: pack_int4(w, 16, scale_dtype="int8"), "scale_dtype=int8 is not one of"),
        (lambda w: relayout(pack_int4(w, 16), "km"), "layout='km' is not one of kn, nk"),
        (lambda w: pack_values(w.astype(jnp.int8), jnp.ones((5, 3))), r"q \(64, 3\) and scales \(5, 3\)"),
        (lambda w: pack_values(w.astype(jnp.int8), jnp.ones((4, 2))), r"q \(64, 3\) and scales \(4, 2\)"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call(jnp.ones((64, 3)))


def test_static_fields_are_part_of_the_structure():
    packed = pack_int4(jnp.ones((64, 3)), 16)
    assert jax.tree.structure(packed) != jax.tree.structure(dataclasses.replace(packed, group=8))
    assert len(jax.tree.leaves(packed)) == 2
