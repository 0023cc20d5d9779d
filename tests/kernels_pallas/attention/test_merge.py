"""Attention over parts of the keys, put together, is attention over all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import block_sparse_attention
from kernels_pallas.attention import merge, merge_parts

pytestmark = pytest.mark.numeric


def in_parts(mask, cuts, q, k, v):
    """Attention over keys cut at `cuts`."""
    parts = []
    for a, b in zip((0, *cuts), (*cuts, k.shape[1])):
        parts.append(block_sparse_attention(q, k[:, a:b], v[:, a:b], mask[:, a:b], return_lse=True))
    return merge_parts(parts) if len(parts) != 2 else merge(*parts[0], *parts[1])


@pytest.mark.parametrize("cuts", [(64,), (30, 100)])
def test_merged_parts_are_the_whole(checks, masks, cuts):
    """Values and gradients, with queries that are dead in one part, in another, and in all."""
    mask = masks["dead"]
    q, k, v, do, dlse = checks.draw(mask, b=1)

    @checks.jit
    def both(q, k, v, do, dlse):
        (o, lse), vjp = jax.vjp(lambda *x: in_parts(mask, cuts, *x), q, k, v)
        return o, lse, *vjp((do, jnp.nan_to_num(dlse)))

    checks.compare(both(q, k, v, do, dlse), (q, k, v, do, dlse), mask.dense(), 0.25)


def test_known_values():
    o, lse = merge(jnp.array([[4.0], [4.0]]), jnp.log(jnp.array([1.0, 3.0])), jnp.array([[8.0], [8.0]]), jnp.zeros(2))
    np.testing.assert_allclose(o, [[6.0], [5.0]], rtol=1e-6)
    np.testing.assert_allclose(lse, np.log([2.0, 4.0]), rtol=1e-6)


def test_parts_without_keys_count_nothing_to_the_bit():
    rng = np.random.default_rng(0)
    o, lse = jnp.asarray(rng.standard_normal((5, 3)), jnp.bfloat16), jnp.asarray(rng.standard_normal(5) * 100, jnp.float32)
    none = jnp.zeros_like(o), jnp.full(5, -jnp.inf)
    jitted = jax.jit(merge_parts)
    for got in (jitted([(o, lse), none]), jitted([none, (o, lse), none]), jitted([(o, lse)])):
        assert got[0].dtype == jnp.bfloat16 and got[1].dtype == jnp.float32
        np.testing.assert_array_equal(got[0], o)
        np.testing.assert_array_equal(got[1], lse)


def test_dead_in_all_parts():
    none = jnp.zeros((5, 3)), jnp.full(5, -jnp.inf)
    (o, lse), vjp = jax.vjp(jax.jit(merge), *none, *none)
    assert not o.any() and np.isneginf(lse).all()
    assert all(np.isfinite(g).all() for g in vjp((jnp.ones((5, 3)), jnp.ones(5))))


def test_gradient_is_that_of_finite_differences():
    rng = np.random.default_rng(1)
    args = [rng.standard_normal(shape).astype(np.float32) for shape in ((4, 3), (4,), (4, 3), (4,))]
    weights = rng.standard_normal((4, 3)), rng.standard_normal(4)

    def in_float64(o1, lse1, o2, lse2):
        lse = np.logaddexp(lse1, lse2)
        o = np.exp(lse1 - lse)[:, None] * o1 + np.exp(lse2 - lse)[:, None] * o2
        return (o * weights[0]).sum() + (lse * weights[1]).sum()

    grads = jax.jit(jax.grad(lambda *x: sum((y * w).sum() for y, w in zip(merge(*x), weights)), (0, 1, 2, 3)))(*args)
    args = [x.astype(np.float64) for x in args]
    for i, got in enumerate(grads):
        for j in np.ndindex(args[i].shape):
            sides = []
            for step in (1e-6, -1e-6):
                moved = [x.copy() for x in args]
                moved[i][j] += step
                sides.append(in_float64(*moved))
            np.testing.assert_allclose(got[j], (sides[0] - sides[1]) / 2e-6, atol=3e-6)


def test_bad_input():
    x, lse = jnp.zeros((2, 3)), jnp.zeros(2)
    with pytest.raises(ValueError, match=r"parts\[1\]: o \(3, 3\) and lse \(2,\) do not fit o \(2, 3\)"):
        merge(x, lse, jnp.zeros((3, 3)), lse)
    with pytest.raises(ValueError, match=r"parts\[0\]: o \(2, 3\) and lse \(2, 3\)"):
        merge(x, x, x, lse)
    with pytest.raises(ValueError, match="at least one part"):
        merge_parts([])
