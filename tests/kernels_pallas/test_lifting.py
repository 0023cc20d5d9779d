"""A toy Pallas kernel, interpreted, with a plan over batch and heads: lifted, it must do what numpy does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from kernels_pallas.device import Device, partitioned
from kernels_pallas.lifting import lift

pytestmark = pytest.mark.numeric
DEVICE = Device("tpu", "v5e", interpret=True)


def toy(q, k, w=None):
    """o[b, s, h, d] = q[b, s, h, d] * k[b, s, h // r, d] * w[d], and its sum over d."""
    b, s, h, d = q.shape
    r = h // k.shape[2]
    w = jnp.ones((d,)) if w is None else w

    def body(q_ref, k_ref, w_ref, o_ref, l_ref):
        o = q_ref[0, :, 0] * k_ref[0, :, 0] * w_ref[...]
        o_ref[0, :, 0] = o
        l_ref[0, :, 0] = o.sum(-1)

    return tuple(
        pl.pallas_call(
            body,
            grid=(b, h),
            in_specs=[
                pl.BlockSpec((1, s, 1, d), lambda i, j: (i, 0, j, 0)),
                pl.BlockSpec((1, s, 1, d), lambda i, j: (i, 0, jax.lax.div(j, r), 0)),
                pl.BlockSpec((d,), lambda i, j: (0,)),
            ],
            out_specs=[pl.BlockSpec((1, s, 1, d), lambda i, j: (i, 0, j, 0)), pl.BlockSpec((1, s, 1), lambda i, j: (i, 0, j))],
            out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(q.shape[:3], q.dtype)],
            interpret=True,
        )(q, k, w)
    )


def want(q, k, w=1.0):
    o = q * np.repeat(k, q.shape[-2] // k.shape[-2], axis=-2) * w
    return o, o.sum(-1)


def arrays(*lead):
    rng = np.random.default_rng(0)
    return rng.normal(size=(*lead, 4, 5, 4, 8)).astype("float32"), rng.normal(size=(*lead, 4, 5, 2, 8)).astype("float32")


AXES = "bshd bsgd _ -> bshd bsh"


def check(got, expected):
    for a, b in zip(got, expected):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_plain_and_nested_vmap():
    f = lift(toy, AXES, DEVICE)
    q, k = arrays()
    check(f(q, k, None), want(q, k))
    q, k = arrays(3, 2)
    check(jax.jit(jax.vmap(jax.vmap(lambda q, k: f(q, k, None))))(q, k), want(q, k))
    # Keys shared along the inner axis, and the outer one in the middle of q.
    moved = np.moveaxis(q, 0, 2)
    got = jax.vmap(jax.vmap(lambda q, k: f(q, k, None), in_axes=(0, None)), in_axes=(2, 0))(moved, k[:, 0])
    check(got, want(q, k[:, :1]))


def test_arrays_without_a_batch_are_looped_over():
    f = lift(toy, "bshd bsgd d -> bshd bsh", DEVICE)
    q, k = arrays(3)
    w = np.random.default_rng(1).normal(size=(3, 8)).astype("float32")
    check(jax.vmap(f)(q, k, w), want(q, k, w[:, None, None, None]))
    check(jax.vmap(f, in_axes=(0, 0, None))(q, k, w[0]), want(q, k, w[0]))


def test_scan_and_remat():
    f = lift(toy, AXES, DEVICE)
    q, k = arrays()
    got = jax.jit(lambda q: jax.lax.scan(lambda c, _: (f(c, k, None)[0], None), q, length=2)[0])(q)
    check([got], [want(want(q, k)[0], k)[0]])
    check(jax.jit(jax.checkpoint(lambda q: f(q, k, None)))(q), want(q, k))


def test_wrong_number_of_arguments():
    with pytest.raises(TypeError, match="2 arguments for axes"):
        lift(toy, AXES, DEVICE)(*arrays())


def test_axes_of_the_mesh_split_batch_and_heads_once_each():
    mesh = jax.make_mesh((1,), ("data",))
    with pytest.raises(ValueError, match="share an axis"):
        with partitioned(mesh, batch=("data",), heads=("data",)):
            pass
    with partitioned(mesh) as partition:
        assert partition is None  # nothing to split on one device
