"""Oracles in float64 numpy: the recurrence a token at a time and its adjoint, and dense masks for blocks."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# LLVM without optimisation: compiling is most of the time of these tests.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
NAMES = ("o", "state", "dq", "dk", "dv", "dlog_decay", "dstate")


def shaped(log_decay):
    """exp(log_decay) [b, h] or [b, h, dk] as a factor of a state [b, h, dk, dv]."""
    decay = np.exp(log_decay)
    return decay[..., None] if decay.ndim == 3 else decay[..., None, None]


def recurrence(q, k, v, log_decay, state):
    """Outputs and all t + 1 states."""
    o, states = np.zeros(v.shape), [state]
    for n in range(q.shape[1]):
        if log_decay is not None:
            state = shaped(log_decay[:, n]) * state
        state = state + k[:, n, :, :, None] * v[:, n, :, None, :]
        o[:, n] = np.einsum("bhk,bhkv->bhv", q[:, n], state)
        states.append(state)
    return o, states


def adjoint(q, k, v, log_decay, state, do, dstate):
    """The recurrence, then its transpose from the last token to the first: values in the order of NAMES."""
    o, states = recurrence(q, k, v, log_decay, state)
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    dlog_decay = None if log_decay is None else np.zeros(log_decay.shape)
    for n in reversed(range(q.shape[1])):
        dq[:, n] = np.einsum("bhkv,bhv->bhk", states[n + 1], do[:, n])
        dstate = dstate + q[:, n, :, :, None] * do[:, n, :, None, :]
        dk[:, n] = np.einsum("bhkv,bhv->bhk", dstate, v[:, n])
        dv[:, n] = np.einsum("bhkv,bhk->bhv", dstate, k[:, n])
        if log_decay is not None:
            dstate = shaped(log_decay[:, n]) * dstate
            each = dstate * states[n]
            dlog_decay[:, n] = each.sum(-1) if log_decay.ndim == 4 else each.sum((-2, -1))
    return o, states[-1], dq, dk, dv, dlog_decay, dstate


def dense(q, k, v, sees, state, do, dstate):
    """The same for a mask `sees` [t, t] without decay."""
    a = np.einsum("bihk,bjhk->bhij", q, k) * sees
    da = np.einsum("bihv,bjhv->bhij", do, v) * sees
    return (
        np.einsum("bhij,bjhv->bihv", a, v) + np.einsum("bihk,bhkv->bihv", q, state),
        state + np.einsum("bjhk,bjhv->bhkv", k, v),
        np.einsum("bhij,bjhk->bihk", da, k) + np.einsum("bihv,bhkv->bihk", do, state),
        np.einsum("bhij,bihk->bjhk", da, q) + np.einsum("bjhv,bhkv->bjhk", v, dstate),
        np.einsum("bhij,bihv->bjhv", a, do) + np.einsum("bjhk,bhkv->bjhv", k, dstate),
        None,
        dstate + np.einsum("bihk,bihv->bhkv", q, do),
    )


def float64(x):
    return None if x is None else np.asarray(x.astype(jnp.float32), np.float64)


def inputs(b, t, h, dk, dv, *, decay="none", regime="mild", dtype="float32", seed=0):
    """q, k, v, log_decay, state, do, dstate. Regimes of decay: a little, 20 to 50 a token, or mostly a little but now and then
    so much that all before is forgotten."""
    rng = np.random.default_rng(seed)
    q, k, v, do = (jnp.asarray(rng.normal(size=(b, t, h, d)), dtype) for d in (dk, dk, dv, dv))
    state, dstate = (jnp.asarray(rng.normal(size=(b, h, dk, dv)), "float32") for _ in range(2))
    shape = {"none": None, "scalar": (b, t, h), "channel": (b, t, h, dk)}[decay]
    if shape is None:
        return q, k, v, None, state, do, dstate
    little = -0.05 * rng.uniform(size=shape)
    much = rng.choice([-20.0, -50.0, -1000.0, -np.inf], size=shape)
    log_decay = {
        "mild": little,
        "strong": -rng.uniform(20, 50, size=shape),
        "mixed": np.where(rng.uniform(size=shape) < 0.1, much, little),
    }[regime]
    return q, k, v, jnp.asarray(log_decay, "float32"), state, do, dstate


def differentiated(fn):
    """jit of (q, k, v, log_decay, state, do, dstate) -> values in the order of NAMES, of fn(q, k, v, log_decay, state)."""

    def both(*args):
        out, pull = jax.vjp(fn, *args[:5])
        return *out, *pull(args[5:])

    return jit(both)


def check(got, args, *, sees=None, roundings=64):
    """Every element is within `roundings` unit roundoffs of the float64 value, relative to the sum of its terms' magnitudes.

    64 for float32, whose sums have a few hundred terms. For 16 bits every term is rounded at most 4 times: two factors of a score
    or of what is written and read, the score or the state, and the result; sums are float32.
    """
    args = [float64(x) for x in args]
    magnitudes = [x if i == 3 or x is None else np.abs(x) for i, x in enumerate(args)]
    run = adjoint if sees is None else (lambda q, k, v, _, *rest: dense(q, k, v, sees, *rest))
    # Of the inputs' type, also for states: what is added to them was rounded to it.
    roundoff = float(jnp.finfo(got[0].dtype).eps) / 2
    for name, x, want, magnitude in zip(NAMES, got, run(*args), run(*magnitudes)):
        if want is None:
            assert x is None
            continue
        assert x.shape == want.shape, name
        error = np.abs(float64(x) - want)
        worst = (error / (roundings * roundoff * magnitude + 1e-30)).max()
        assert worst < 1, f"{name} is off by {worst:.2g} times what {roundings} roundings explain"


@pytest.fixture(scope="session")
def oracle():
    return types.SimpleNamespace(
        inputs=inputs, jit=jit, differentiated=differentiated, check=check, recurrence=recurrence, float64=float64
    )
