"""The loops over live blocks, which every other backend may be compared with, against float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import BlockMask
from kernels_pallas.attention import block_sparse_attention, xla

pytestmark = pytest.mark.numeric


@pytest.fixture
def small(monkeypatch):
    """Tiles so small that short sequences have many."""
    monkeypatch.setattr(xla, "static_choice", lambda problem, device: xla.Blocks(32, 64))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 333])
def test_lengths(checks, small, length):
    mask = BlockMask.build(checks.not_later, checks.scales(length), checks.scales(length))
    checks.check("xla", mask, b=1, h=2, g=1)


def test_real_tiles(checks):
    mask = BlockMask.build(checks.not_later, checks.scales(680), checks.scales(680))
    checks.check("xla", mask, b=1, h=2, g=2)


@pytest.mark.parametrize("name", ["noisy_and_clean", "dead", "dead_run", "nothing"])
def test_masks(checks, masks, small, name):
    checks.check("xla", masks[name], b=1)


@pytest.mark.parametrize(("h", "g"), [(4, 1), (4, 2), (4, 4)])
def test_groups_of_heads_and_a_scale(checks, masks, small, h, g):
    checks.check("xla", masks["window"], h=h, g=g, scale=-0.4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(checks, masks, small, dtype):
    checks.check("xla", masks["dead"], dtype=dtype)


def test_large_logits(checks, masks, small):
    checks.check("xla", masks["window"], magnitude=30.0)


def test_one_tile_is_dense(checks, masks):
    mask = masks["dead"][30:110, :100]
    checks.check("xla", mask, b=1)
    q, k, v, *_ = checks.draw(mask)
    jaxpr = str(jax.make_jaxpr(lambda *x: block_sparse_attention(*x, mask, implementation="xla"))(q, k, v))
    assert "scan" not in jaxpr and "while" not in jaxpr


def floats(fn, *args):
    """Elements of the largest float array anywhere in the compiled program."""
    text = jax.jit(fn).lower(*args).compile().as_text()
    shapes = re.findall(r"\b(?:f64|f32|bf16|f16)\[([\d,]+)\]", text)
    return max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes)


def test_no_dense_array_of_floats(checks):
    mask = BlockMask.build(checks.not_later, checks.scales(700)[:, :640], checks.scales(700))
    q, k = jnp.ones((1, 640, 1, 8)), jnp.ones((1, 700, 1, 8))

    def loss(attend):
        return lambda q, k, v: attend(q, k, v).sum()

    def sparse(q, k, v):
        return block_sparse_attention(q, k, v, mask, implementation="xla")

    def dense(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, mask=mask.traced()[None, None])

    tile = 128 * 128
    assert floats(sparse, q, k, k) == tile
    assert floats(jax.grad(loss(sparse), (0, 1, 2)), q, k, k) == tile
    assert floats(dense, q, k, k) >= 640 * 700  # so that the count above means something


def test_dead_blocks_are_not_computed(small, checks):
    """Values in blocks that no query of a row of blocks may see do not reach the program's arithmetic: not even NaN."""
    steps = np.arange(128)[None] // 64
    mask = BlockMask.build(checks.same, steps, steps)
    q, k, v, *_ = checks.draw(mask, b=1)
    k, v = (x.at[:, 64:].set(np.nan) for x in (k, v))
    o = checks.jit(lambda *x: block_sparse_attention(*x, mask, implementation="xla"))(q, k, v)
    assert np.isfinite(o[:, :64]).all() and np.isnan(o[:, 64:]).all()
