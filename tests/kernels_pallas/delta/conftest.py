"""The gated delta rule token by token in float64, with its adjoint, and inputs that are hard for chunks."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import target
from kernels_pallas.delta import gated_delta

# These programs run for milliseconds: spend little on making them faster.
QUICK = {"xla_backend_optimization_level": 0}
NAMES = ("q", "k", "v", "log_decay", "beta", "state")


def recurrence(q, k, v, log_decay, beta, state):
    """Outputs and all states, the first before any token, straight from the definition."""
    states, outputs = [state], []
    for t in range(q.shape[1]):
        kt, vt, b = k[:, t, :, :, None], v[:, t, :, None, :], beta[:, t, :, None, None]
        erased = states[-1] - b * kt * np.sum(kt * states[-1], axis=2, keepdims=True)
        states.append(np.exp(log_decay[:, t, :, None, None]) * erased + b * kt * vt)
        # The write is not scaled by the decay: arXiv:2412.06464, equation 10.
        outputs.append(np.einsum("bhk,bhkv->bhv", q[:, t], states[-1]))
    return np.stack(outputs, 1), states


def adjoint(q, k, v, log_decay, beta, state, o_bar, state_bar):
    """Cotangents of all inputs, from the last token to the first."""
    _, states = recurrence(q, k, v, log_decay, beta, state)
    bars = [np.zeros_like(x) for x in (q, k, v, log_decay, beta)]
    for t in reversed(range(q.shape[1])):
        before, kt = states[t], k[:, t]
        a, b = np.exp(log_decay[:, t])[..., None], beta[:, t][..., None]
        read = np.einsum("bhk,bhkv->bhv", kt, before)
        state_bar = state_bar + q[:, t][..., None] * o_bar[:, t][:, :, None]
        along = np.einsum("bhk,bhkv->bhv", kt, state_bar)
        bars[0][:, t] = np.einsum("bhkv,bhv->bhk", states[t + 1], o_bar[:, t])
        # S' = a S + b k (v - a read)^T with read = S^T k.
        bars[1][:, t] = b * np.einsum("bhkv,bhv->bhk", state_bar, v[:, t] - a * read)
        bars[1][:, t] -= b * a * np.einsum("bhkv,bhv->bhk", before, along)
        bars[2][:, t] = b * along
        erased = before - b[..., None] * kt[..., None] * read[:, :, None]
        bars[3][:, t] = a[..., 0] * np.einsum("bhkv,bhkv->bh", state_bar, erased)
        bars[4][:, t] = np.einsum("bhv,bhv->bh", along, v[:, t] - a * read)
        state_bar = a[..., None] * (state_bar - b[..., None] * kt[..., None] * along[:, :, None])
    return (*bars, state_bar)


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def draw(length, *, cosine=0.0, beta=1.0, decay=0.1, b=1, h=2, dk=16, dv=24, seed=0):
    """Inputs in float64; keys have unit length and pairwise cosines around `cosine`."""
    rng = np.random.default_rng(seed)
    own, common = (_unit(rng.standard_normal((b, n, h, dk))) for n in (length, 1))
    return {
        "q": rng.standard_normal((b, length, h, dk)) / dk**0.5,
        "k": _unit(np.sqrt(cosine) * common + np.sqrt(1 - cosine) * own),
        "v": rng.standard_normal((b, length, h, dv)),
        "log_decay": -decay * rng.uniform(size=(b, length, h)),
        "beta": beta * (1 - 0.2 * rng.uniform(size=(b, length, h))),
        "state": rng.standard_normal((b, h, dk, dv)),
        "o_bar": rng.standard_normal((b, length, h, dv)),
        "state_bar": rng.standard_normal((b, h, dk, dv)),
    }


def cast(data, dtype):
    """`draw`'s arrays as the op takes them; what rounding changes is not its error, so they also come back in float64."""
    narrow = {name: x.astype(dtype if name in ("q", "k", "v", "o_bar") else np.float32) for name, x in data.items()}
    return narrow, {name: np.asarray(x, np.float64) for name, x in narrow.items()}


@functools.cache
def compiled(implementation):
    """Outputs, last state and cotangents in one compiled program; the TPU kernels interpreted."""

    def fn(x):
        op = functools.partial(gated_delta, implementation=implementation)
        out, back = jax.vjp(op, *(x[name] for name in NAMES))
        return out, back((x["o_bar"].astype(out[0].dtype), x["state_bar"]))

    jitted = jax.jit(fn, compiler_options=QUICK)

    def call(x):
        if implementation == "tpu":
            with target("v5e", interpret=True):
                return jitted(x)
        return jitted(x)

    return call


def compare(implementation, data, dtype, tolerance):
    """Asserts on the largest error of each output and cotangent, relative to its largest value; returns these errors."""
    narrow, wide = cast(data, dtype)
    (o, state), bars = compiled(implementation)({name: jnp.asarray(x) for name, x in narrow.items()})
    inputs = [wide[name] for name in NAMES]
    want_o, want_states = recurrence(*inputs)
    want = [want_o, want_states[-1], *adjoint(*inputs, wide["o_bar"], wide["state_bar"])]
    assert o.dtype == bars[0].dtype == bars[2].dtype == dtype and state.dtype == bars[5].dtype == jnp.float32
    errors = {}
    for name, x, y in zip(("o", "last", *NAMES), (o, state, *bars), want):
        x = np.asarray(x, np.float64)
        assert x.shape == y.shape, name
        # A gradient that is zero in exact numbers (of a state that nothing of is left) has no scale of its own.
        errors[name] = float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-3))
    assert max(errors.values()) <= tolerance, errors
    return errors


@pytest.fixture(scope="session")
def oracle():
    """What this file defines."""
    return types.SimpleNamespace(
        recurrence=recurrence, adjoint=adjoint, draw=draw, compiled=compiled, compare=compare, names=NAMES, quick=QUICK
    )
