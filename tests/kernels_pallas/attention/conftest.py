"""What all attention backends are checked with: masks, a float64 reference in numpy, and one function that compares."""

import contextlib
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import BlockMask, target
from kernels_pallas.attention import block_sparse_attention
from kernels_pallas.mosaic_gpu import can_interpret

# Where each implementation runs in these tests: as it is, or in its interpreter with a head size that it takes.
PLACES = {
    "xla": (None, 16),
    "split": (None, 16),
    "tpu": ("v5e", 128),
    "splash": ("v5e", 128),
    "hopper": ("h100", 64),
}

# These programs run once: most of their time would be LLVM's optimisation.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def not_later(q, k):
    return q[0] >= k[0]


def same(q, k):
    return q[0] == k[0]


def near(q, k):
    return (q[0] - k[0] <= 20) & (k[0] - q[0] <= 5)


def noisy_and_clean(q, k):
    """Row 0 is the block, row 1 says clean."""
    clean = k[1] == 1
    return (clean & (k[0] < q[0])) | ((q[0] == k[0]) & (q[1] == k[1]))


def scales(n):
    """The scale of every token of a next-scale order with 1, 4, 9, ... tokens, cut at n."""
    return np.repeat(np.arange(30), np.arange(1, 31) ** 2)[None, :n]


def two_halves(n, block):
    """Blocks of a sequence that stands there twice, first noisy, then clean."""
    ids = np.arange(n // 2) // block
    return np.stack([np.r_[ids, ids], np.arange(n) // (n // 2)])


def dead():
    """Queries 0..69 and 90..94 see nothing, keys 64..139 are seen by nobody: dead rows and dead blocks, also of 32."""
    q = np.r_[np.full(70, -9), np.arange(20), np.full(5, -9), np.arange(6)][None]
    k = np.r_[np.arange(64) // 4, np.full(76, 99)][None]
    return BlockMask.build(not_later, q, k)


def make_masks():
    line = np.arange(150)[None]
    return {
        "block_causal": BlockMask.build(not_later, scales(150), scales(150)),
        "block_diagonal": BlockMask.build(same, scales(150), scales(150)),
        "noisy_and_clean": BlockMask.build(noisy_and_clean, two_halves(160, 20), two_halves(160, 20)),
        "window": BlockMask.build(near, line[:, :131], line),
        "dead": dead(),
        "dead_run": BlockMask.build(same, np.r_[np.zeros(70), np.full(65, 9), np.ones(3)][None], np.r_[np.zeros(66), 1][None]),
        "nothing": BlockMask.build(not_later, np.zeros((1, 40)), np.ones((1, 33))),
        "everything": BlockMask.build(not_later, np.ones((1, 140)), np.zeros((1, 66))),
    }


def draw(mask, *, b=2, h=4, g=2, d=16, dtype="float32", magnitude=1.0, seed=0):
    """q, k, v, do of `dtype` and dlse float32 with NaN at dead queries, which must not matter; queries times `magnitude`."""
    rng = np.random.default_rng(seed)
    sq, sk = mask.shape
    q, k, v, do = (rng.standard_normal(shape) for shape in ((b, sq, h, d), (b, sk, g, d), (b, sk, g, d), (b, sq, h, d)))
    dlse = np.where(mask.dense().any(axis=1)[:, None], rng.standard_normal((b, sq, h)), np.nan)
    return *(jnp.asarray(x, dtype) for x in (q * magnitude, k, v, do)), jnp.asarray(dlse, jnp.float32)


def reference(q, k, v, do, dlse, allowed, scale):
    """o, lse, dq, dk, dv in float64 in closed form, each with what its rounding errors are relative to.

    That is the same sums over absolute values, in which nothing cancels.
    """
    group = q.shape[2] // k.shape[2]
    q, k, v, do = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (q, k, v, do))
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    dlse = np.nan_to_num(np.asarray(dlse, np.float64)).swapaxes(1, 2)[..., None]
    s = np.where(allowed, scale * q @ k.swapaxes(2, 3), -np.inf)
    top = np.where(np.isneginf(s.max(-1, keepdims=True)), 0, s.max(-1, keepdims=True))
    total = np.exp(s - top).sum(-1, keepdims=True)
    p = np.exp(s - top) / np.where(total == 0, 1, total)
    with np.errstate(divide="ignore"):
        lse = top + np.log(total)
    o = p @ v
    ds = p * (do @ v.swapaxes(2, 3) - (do * o).sum(-1, keepdims=True) + dlse)
    size = abs(do) @ abs(v).swapaxes(2, 3) + (abs(do) * (p @ abs(v))).sum(-1, keepdims=True) + abs(dlse)

    def summed(x):
        return x.reshape(x.shape[0], -1, group, *x.shape[2:]).sum(axis=2)

    found = {
        "o": (o, p @ abs(v)),
        "lse": (lse, 1 + abs(np.where(np.isneginf(lse), 0, lse))),
        "dq": (scale * ds @ k, scale * (p * size) @ abs(k)),
        "dk": (summed(scale * ds.swapaxes(2, 3) @ q), summed(scale * (p * size).swapaxes(2, 3) @ abs(q))),
        "dv": (summed(p.swapaxes(2, 3) @ do), summed(p.swapaxes(2, 3) @ abs(do))),
    }
    largest = scale * float((abs(q) @ abs(k).swapaxes(2, 3)).max())
    values = {name: (x.swapaxes(1, 2), size.swapaxes(1, 2)) for name, (x, size) in found.items()}
    return values | {"lse": tuple(x[..., 0] for x in values["lse"])}, largest


def compare(got, inputs, allowed, scale):
    """Every output within two roundings of the reference: of its dtype, and of float32 in the scores, as large as they are."""
    want, largest = reference(*inputs, allowed, scale)
    scores = float(jnp.finfo(jnp.float32).eps) * (1 + largest)
    half = float(jnp.finfo(inputs[0].dtype).eps)
    for (name, (value, size)), x in zip(want.items(), got):
        assert x.shape == value.shape, name
        assert x.dtype == (jnp.float32 if name == "lse" else inputs[0].dtype), name
        x = np.asarray(x, np.float64)
        live = np.isfinite(value)
        np.testing.assert_array_equal(x[~live], value[~live], err_msg=name)
        # Numbers below the smallest normal one of a dtype are lost in it, whatever their relative error.
        tolerance = 2 * ((scores if name == "lse" else half + scores) * size + float(jnp.finfo(inputs[0].dtype).tiny))
        worst = np.max(abs(x[live] - value[live]) / tolerance[live], initial=0)
        assert worst < 1, f"{name}: {worst:.2f} of the tolerance"
    dead_queries = ~allowed.any(axis=1)
    assert not np.asarray(got[0], np.float32)[:, dead_queries].any() and not np.asarray(got[2], np.float32)[:, dead_queries].any()
    assert not np.asarray(got[3], np.float32)[:, ~allowed.any(axis=0)].any()


def place(implementation):
    """The context in which an implementation runs here."""
    kind, _ = PLACES.get(implementation, (None, 16))
    if kind == "h100" and not can_interpret():
        pytest.skip(f"jax {jax.__version__} does not interpret Mosaic GPU kernels")
    return target(kind, interpret=True) if kind else contextlib.nullcontext()


def run(implementation, inputs, mask, scale=None):
    """o, lse, dq, dk and dv of one compiled program."""

    @jit
    def both(q, k, v, do, dlse):
        def f(q, k, v):
            return block_sparse_attention(q, k, v, mask, scale, return_lse=True, implementation=implementation)

        out, vjp = jax.vjp(f, q, k, v)
        return *out, *vjp((do, dlse))

    with place(implementation):
        return both(*inputs)


def check(implementation, mask, *, scale=None, **sizes):
    """Forward pass and all gradients, also that of the log-sum-exp, against the reference."""
    inputs = draw(mask, **({"d": PLACES[implementation][1]} | sizes))
    got = run(implementation, inputs, mask, scale)
    compare(got, inputs, mask.dense(), inputs[0].shape[3] ** -0.5 if scale is None else scale)


@pytest.fixture(scope="session")
def masks():
    """Masks by name."""
    return make_masks()


@pytest.fixture(scope="session")
def checks():
    """`check`, what it is made of, and the predicates of the masks."""
    return types.SimpleNamespace(
        check=check,
        compare=compare,
        draw=draw,
        jit=jit,
        place=place,
        run=run,
        scales=scales,
        not_later=not_later,
        same=same,
        near=near,
        noisy_and_clean=noisy_and_clean,
    )
