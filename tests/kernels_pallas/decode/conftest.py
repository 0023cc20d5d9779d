"""Caches with ragged lengths and garbage past them, and float64 oracles that visit one query after another."""

import contextlib
import types

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import mosaic_gpu, target
from kernels_pallas.decode import tpu


def softmax_attention(q, k, v, scale):
    """float64 o [d], lse of one query [d] over keys and values [s, d]; 0 and -inf where there are none."""
    if len(k) == 0:
        return np.zeros_like(q), -np.inf
    s = k @ q * scale
    m = s.max()
    p = np.exp(s - m)
    return p @ v / p.sum(), m + np.log(p.sum())


def attention_of_rows(q, k_cache, v_cache, lengths, scale=None):
    """float64 o [b, h, d], lse [b, h] of q [b, h, d] over caches [b, s, g, d]."""
    q, k_cache, v_cache = (np.asarray(x, np.float64) for x in (q, k_cache, v_cache))
    (b, h, d), g = q.shape, k_cache.shape[2]
    o, lse = np.zeros((b, h, d)), np.zeros((b, h))
    for i, j in np.ndindex(b, h):
        n, head = int(lengths[i]), j * g // h
        keys, values = k_cache[i, :n, head], v_cache[i, :n, head]
        o[i, j], lse[i, j] = softmax_attention(q[i, j], keys, values, d**-0.5 if scale is None else scale)
    return o, lse


def gradients_of_rows(q, k_cache, v_cache, lengths, do, dlse):
    """float64 cotangents of q, k_cache and v_cache, from the softmax's Jacobian written out as a matrix."""
    q, k_cache, v_cache, do, dlse = (np.asarray(x, np.float64) for x in (q, k_cache, v_cache, do, dlse))
    b, h, d = q.shape
    g, scale = k_cache.shape[2], d**-0.5
    dq, dk, dv = np.zeros(q.shape), np.zeros(k_cache.shape), np.zeros(v_cache.shape)
    for i, j in np.ndindex(b, h):
        n, head = int(lengths[i]), j * g // h
        if n == 0:
            continue
        keys, values = k_cache[i, :n, head], v_cache[i, :n, head]
        s = keys @ q[i, j] * scale
        p = np.exp(s - s.max())
        p /= p.sum()
        ds = (np.diag(p) - np.outer(p, p)) @ (values @ do[i, j]) + p * dlse[i, j]
        dq[i, j] += ds @ keys * scale
        dk[i, :n, head] += np.outer(ds, q[i, j]) * scale
        dv[i, :n, head] += np.outer(p, do[i, j])
    return dq, dk, dv


def draw(b, s, g, h, d, dtype=np.float32, *, t=None, lengths=None, seed=0, garbage=True):
    """q [b, h, d] ([b, t, h, d]), caches whose values past `lengths` are NaN and inf, and lengths, or 0, 1, s and between."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    q = normal(b, h, d) if t is None else normal(b, t, h, d)
    lengths = [0, 1, s, s // 2, *rng.integers(1, s + 1, max(0, b - 4))][:b] if lengths is None else lengths
    lengths = np.array(lengths, np.int32)
    k_cache, v_cache = normal(b, s, g, d), normal(b, s, g, d)
    if garbage:
        past = (np.arange(s) >= lengths[:, None])[:, :, None, None]
        bad = np.where(np.arange(s) % 2, np.nan, np.inf)[None, :, None, None]
        k_cache, v_cache = (jnp.where(past, bad.astype(dtype), x) for x in (k_cache, v_cache))
    return types.SimpleNamespace(q=q, k_cache=k_cache, v_cache=v_cache, lengths=lengths, normal=normal)


def tolerance(v, dtype):
    """Of o: probabilities and o are rounded to `dtype` (half an epsilon of the largest value each), sums to float32."""
    largest = float(np.nanmax(np.where(np.isfinite(v), np.abs(v), 0)))
    rounding = 0 if dtype == np.float32 else float(jnp.finfo(dtype).eps)
    return largest * (rounding + 16 * float(np.finfo(np.float32).eps))


@pytest.fixture(scope="session")
def oracle():
    """What the tests of this folder compute with."""
    return types.SimpleNamespace(
        softmax_attention=softmax_attention,
        attention_of_rows=attention_of_rows,
        gradients_of_rows=gradients_of_rows,
        draw=draw,
        tolerance=tolerance,
    )


@pytest.fixture
def on(monkeypatch):
    """`on(backend)`: a context that picks "xla", or interprets "tpu" (in steps of 128 positions and 16 rows) or "hopper"."""

    def enter(backend):
        if backend == "xla":
            return contextlib.nullcontext()
        if backend == "tpu":
            monkeypatch.setattr(tpu, "static_choice", lambda problem, device: tpu.Blocks(positions=128, rows=16))
            return target("v5e", interpret=True)
        if not mosaic_gpu.can_interpret():
            pytest.skip("this jax does not interpret Mosaic GPU kernels; 0.11 does")
        return target("h100", interpret=True)

    return enter
