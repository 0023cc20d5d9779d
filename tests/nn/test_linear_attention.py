import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.nn import GatedDeltaNet, GatedLinearAttention, LinearAttention, Mamba2, Retention
from jaxgen.nn.recurrent import RecurrentState, ShortConv, selective_decay

pytestmark = pytest.mark.numeric

B, T, D = 2, 12, 24
LAYERS = {
    "elu": LinearAttention(3),
    "relu": LinearAttention(2, head_size=4, feature_map="relu"),
    "identity": LinearAttention(3, feature_map="identity", normalise=False),
    "gla": GatedLinearAttention(2, rank=4, temperature=2.0),
    "retention": Retention(3),
    "delta": GatedDeltaNet(3, head_size=4),
    "delta_plain": GatedDeltaNet(2, expand_v=0.5, conv_size=None, negative_eigenvalues=True),
    "mamba2": Mamba2(state_size=5, head_size=8, groups=2, conv_size=3),
}
OTHERS = {
    "bidirectional": LinearAttention(3, causal=False),
    "blocks": LinearAttention(3, block_size=4),
    "blocks_plain": LinearAttention(3, block_size=4, feature_map="relu", normalise=False),
}


TRACED = []


@pytest.fixture(scope="module", autouse=True)
def all_compile_quickly(quick_compiles):
    """Nothing here is large, so that compiling takes longer than running."""


@functools.partial(jax.jit, static_argnums=0)
def apply(layer, params, x, state=None):
    TRACED.append(layer)
    return layer.apply(params, x, state)


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)


@pytest.fixture(scope="module")
def made(x, randomize):
    """(layer, random parameters, output and state of x at once), by name, each made once."""

    @functools.cache
    def make(name):
        layer = (LAYERS | OTHERS)[name]
        params = randomize(jax.eval_shape(layer.init, jax.random.key(0), x), seed=1)
        return layer, params, *apply(layer, params, x)

    return make


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.log1p(np.exp(x))


def rms(x, axes=-1):
    return x / np.sqrt(np.square(x).mean(axes, keepdims=True) + 1e-5)


def convolve(p, x):
    """A causal depthwise convolution, a token and a tap at a time."""
    w, y = p["kernel"].shape[0], np.zeros_like(x)
    for t in range(x.shape[1]):
        for back in range(min(w, t + 1)):
            y[:, t] += p["kernel"][w - 1 - back] * x[:, t - back]
    return y + p.get("bias", 0)


def recurrence(q, k, v, decay, sees=None):
    """o_t = (sum of what t sees of k v^T, decayed since) q_t, summed pair by pair; decay [b, t, h, dk] in (0, 1]."""
    out = np.zeros(v.shape)
    for i in range(q.shape[1]):
        for j in range(q.shape[1]):
            if sees[i, j] if sees is not None else j <= i:
                since = np.prod(decay[:, j + 1 : i + 1], axis=1)
                out[:, i] += np.sum(q[:, i] * since * k[:, j], -1, keepdims=True) * v[:, j]
    return out


def reference(layer, params, x):
    """The layer's equations in float64: sums over pairs of tokens, or for the delta rule a step after another."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    x = np.asarray(x, np.float64)

    def heads(name):
        return np.einsum("btd,dhk->bthk", x, p[name]["kernel"])

    def gated_out(o):
        o = rms(o) * p.get("norm", {"scale": 1})["scale"] * silu(heads("gate"))
        return np.einsum("bthv,hvd->btd", o, p["proj"]["kernel"])

    def selective(dt):
        dt = softplus(dt + p["dt_bias"])
        return dt, np.exp(-np.exp(p["A_log"]) * dt)

    if isinstance(layer, LinearAttention):
        phi = {"elu": lambda a: np.where(a > 0, a + 1, np.exp(a)), "relu": lambda a: np.maximum(a, 0), "identity": lambda a: a}
        q, k, v = phi[layer.feature_map](heads("q")), phi[layer.feature_map](heads("k")), heads("v")
        place = np.arange(x.shape[1]) // (layer.block_size or 1) * layer.causal
        sees = place[:, None] >= place[None]
        ones = np.ones_like(q)
        o = recurrence(q, k, v, ones, sees)
        o = o / (recurrence(q, k, ones[..., :1], ones, sees) + 1e-6) if layer.normalise else o * q.shape[-1] ** -0.5
        return np.einsum("bthv,hvd->btd", o, p["proj"]["kernel"])
    if isinstance(layer, GatedLinearAttention):
        q, k, v = heads("q"), heads("k"), heads("v")
        low = np.einsum("btr,rhk->bthk", x @ p["decay_in"]["kernel"], p["decay_out"]["kernel"]) + p["decay_out"]["bias"]
        return gated_out(recurrence(q * q.shape[-1] ** -0.5, k, v, sigmoid(low) ** (1 / layer.temperature)))
    if isinstance(layer, Retention):
        q, k, v = heads("q"), heads("k"), heads("v")
        dk, t = q.shape[-1], x.shape[1]
        turn = np.exp(1j * np.arange(t)[:, None] * 10000.0 ** -np.linspace(0, 1, dk // 2))[:, None]
        q, k = ((a[..., ::2] + 1j * a[..., 1::2]) * turn for a in (q, k))
        o = np.zeros(v.shape)
        for h, i, j in np.ndindex(layer.heads, t, t):
            if j <= i:
                weight = np.sum(q[:, i, h] * np.conj(k[:, j, h]), -1).real * dk**-0.5
                o[:, i, h] += (1 - 2.0 ** (-5 - h)) ** (i - j) * weight[:, None] * v[:, j, h]
        return gated_out(o)
    if isinstance(layer, GatedDeltaNet):
        b, t, h = *x.shape[:2], layer.heads
        dk, dv = layer._sizes(x.shape[-1])
        qkv = x @ p["qkv"]["kernel"]
        qkv = silu(convolve(p["conv"], qkv) if layer.conv_size else qkv)
        q, k, v = (a.reshape(b, t, h, -1) for a in np.split(qkv, (h * dk, 2 * h * dk), -1))
        q, k = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
        beta = sigmoid(x @ p["beta"]["kernel"]) * (2 if layer.negative_eigenvalues else 1)
        _, decay = selective(x @ p["dt"]["kernel"])
        o, s = np.zeros((b, t, h, dv)), np.zeros((b, h, dk, dv))
        for i in range(t):
            kk = np.einsum("bhk,bhl->bhkl", k[:, i], k[:, i])
            s = decay[:, i, :, None, None] * (s - beta[:, i, :, None, None] * kk @ s)
            s += beta[:, i, :, None, None] * np.einsum("bhk,bhv->bhkv", k[:, i], v[:, i])
            o[:, i] = np.einsum("bhkv,bhk->bhv", s, q[:, i]) * dk**-0.5
        return gated_out(o)
    b, t, width = x.shape
    inner, h = layer._sizes(width)
    g, n = layer.groups, layer.state_size
    z, xbc, dt = np.split(x @ p["in"]["kernel"], (inner, 2 * inner + 2 * g * n), -1)
    v, k, q = np.split(silu(convolve(p["conv"], xbc)), (inner, inner + g * n), -1)
    v = v.reshape(b, t, h, -1)
    q, k = (a.reshape(b, t, g, n)[:, :, np.arange(h) // (h // g)] for a in (q, k))
    dt, decay = selective(dt)
    y = recurrence(q, k, v * dt[..., None], np.broadcast_to(decay[..., None], q.shape)) + p["D"][:, None] * v
    y = rms((y.reshape(b, t, inner) * silu(z)).reshape(b, t, g, -1)) * p["norm"]["scale"]
    return y.reshape(b, t, inner) @ p["out"]["kernel"]


@pytest.mark.parametrize("name", LAYERS | OTHERS)
def test_equations(made, x, name):
    layer, params, out, _ = made(name)
    want = reference(layer, params, x)
    assert out.shape == x.shape and out.dtype == jnp.float32
    np.testing.assert_allclose(out, want, atol=2e-5 * np.abs(want).max())


def assert_in_pieces(made, x, name, size):
    layer, params, want, last = made(name)
    state, outs = layer.init_state(B, D), []
    before = len(TRACED)
    for t in range(0, T, size):
        out, state = apply(layer, params, x[:, t : t + size], state)
        outs.append(out)
    assert len(TRACED) - before <= 1
    np.testing.assert_allclose(np.concatenate(outs, 1), want, atol=1e-5 * np.abs(want).max())
    for got, leaf in zip(jax.tree.leaves(state), jax.tree.leaves(last), strict=True):
        assert got.shape == leaf.shape and got.dtype == leaf.dtype
        np.testing.assert_allclose(got, leaf, atol=1e-5 * max(1, np.abs(leaf).max()))


@pytest.mark.parametrize("name", LAYERS)
def test_token_by_token_is_the_sequence_at_once(made, x, name):
    assert_in_pieces(made, x, name, 1)


@pytest.mark.parametrize("name", ["retention", "delta", "mamba2", "blocks"])
def test_pieces_are_the_sequence_at_once(made, x, name):
    assert_in_pieces(made, x, name, 4)


@pytest.mark.parametrize("name", LAYERS | OTHERS)
def test_who_sees_whom(made, x, name):
    layer, params, out, _ = made(name)
    moved = np.abs(apply(layer, params, x.at[:, 5].set(1.0))[0] - out).max((0, 2)) > 1e-6
    first = {"bidirectional": 0, "blocks": 4, "blocks_plain": 4}.get(name, 5)
    assert moved.tolist() == [t >= first for t in range(T)]


def test_bidirectional_reads_a_state_besides(made, x):
    layer, params, out, _ = made("bidirectional")
    _, state = apply(layer, params, x[:, :6])
    np.testing.assert_allclose(apply(layer, params, x[:, 6:], state)[0], out[:, 6:], atol=1e-5)


@pytest.mark.parametrize("name", ["elu", "gla", "retention", "delta", "mamba2"])
def test_every_parameter_and_the_state_have_a_gradient(made, x, name):
    layer, params, _, state = made(name)

    def loss(params, floats):
        out, after = layer.apply(params, x, floats._replace(position=state.position))
        return jnp.sum(jnp.square(out)) + jnp.sum(after.memory)

    grads = jax.jit(jax.grad(loss, (0, 1)))(params, state._replace(position=None))
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all() and np.abs(grad).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", ["gla", "delta", "mamba2"])
def test_half_precision_keeps_the_state_in_single(made, x, name):
    layer, params, want, _ = made(name)
    half = layer.clone(dtype=jnp.bfloat16)
    out, state = apply(half, params, x)
    assert out.dtype == jnp.bfloat16 and state.memory.dtype == jnp.float32
    assert state.conv is None or state.conv.dtype == jnp.bfloat16
    # Inputs, weights and products are rounded to 8 bits: a few percent of the largest output.
    np.testing.assert_allclose(out.astype(np.float32), want, atol=0.06 * np.abs(want).max())
    assert jax.eval_shape(lambda: half.init_state(B, D)) == jax.eval_shape(lambda: state)


@pytest.mark.parametrize("name", LAYERS)
def test_equal_layers_are_one_program(made, x, name):
    layer, params, *_ = made(name)
    before = len(TRACED)
    apply(layer.clone(), params, x + 1)
    assert len(TRACED) == before


def test_shapes_of_options(x):
    def shapes(layer):
        params = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
        return {"/".join(k.key for k in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    assert shapes(LinearAttention(2, head_size=5))["q/kernel"] == (D, 2, 5)
    gla = shapes(GatedLinearAttention(2, expand_k=0.25, expand_v=2.0, rank=3))
    assert gla["k/kernel"] == (D, 2, 3) and gla["v/kernel"] == (D, 2, 24) and gla["decay_out/kernel"] == (3, 2, 3)
    assert shapes(Retention(2, expand_v=1.0))["gate/kernel"] == (D, 2, 12)
    delta = shapes(GatedDeltaNet(2, head_size=6, expand_v=1.5, conv_size=5))
    assert delta["conv/kernel"] == (5, 2 * (6 + 6 + 9)) and delta["norm/scale"] == (9,)
    mamba = shapes(Mamba2(state_size=4, head_size=6, expand=3, groups=2))
    assert mamba["in/kernel"] == (D, 2 * 72 + 2 * 8 + 12) and mamba["norm/scale"] == (2, 36) and mamba["D"] == (12,)


def test_initial_decay_rates():
    class Decay(nn.Module):
        @nn.compact
        def __call__(self, x):
            return selective_decay(self, x, rates=(1.0, 16.0))

    params = jax.jit(Decay().init)(jax.random.key(0), jnp.zeros((1, 1, 256)))["params"]
    rates, dt = np.exp(params["A_log"]), np.log1p(np.exp(params["dt_bias"]))
    assert rates.shape == (256,) and 1 <= rates.min() < 2 and 15 < rates.max() <= 16
    assert 0.000999 <= dt.min() < 0.0012 and 0.085 < dt.max() < 0.1001
    assert abs(np.mean(np.log(dt)) - np.log(0.01)) < 0.3  # log-uniform


def test_short_conv_alone():
    x = jnp.arange(1.0, 6.0).reshape(1, 5, 1)
    params = {"params": {"kernel": jnp.array([[100.0], [10.0], [1.0]]), "bias": jnp.array([0.5])}}
    y, tail = apply(ShortConv(3), params, x)
    assert y[0, :, 0].tolist() == [1.5, 12.5, 123.5, 234.5, 345.5] and tail[0, :, 0].tolist() == [4.0, 5.0]
    y, tail = apply(ShortConv(3), params, x[:, :1] + 5, tail)
    assert y[0, :, 0].tolist() == [456.5] and tail[0, :, 0].tolist() == [5.0, 6.0]
    with pytest.raises(ValueError, match="size=0"):
        ShortConv(0).init(jax.random.key(0), x)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (LinearAttention(5), "heads=5 does not divide"),
        (LinearAttention(2, feature_map="tanh"), "feature_map='tanh' is not one of"),
        (LinearAttention(2, feature_map="identity"), "normalise=True"),
        (LinearAttention(2, block_size=0), "block_size=0"),
        (LinearAttention(2, block_size=2, causal=False), "causal=False"),
        (GatedLinearAttention(7), "expand_k=0.5 of width 24 is 12.0, which heads=7"),
        (GatedLinearAttention(2, expand_v=0.3), "expand_v=0.3"),
        (Retention(8), "rotation needs an even one"),
        (GatedDeltaNet(2, head_size=3, expand_v=1.5), "expand_v=1.5"),
        (GatedDeltaNet(2, conv_size=0), "conv_size=0"),
        (Mamba2(head_size=8, conv_size=0), "conv_size=0"),
        (Retention(0), "heads=0"),
        (Mamba2(groups=0), "groups=0"),
        (Mamba2(head_size=7), "whole heads of head_size=7"),
        (Mamba2(head_size=8, groups=4), "groups=4"),
        (GatedLinearAttention(2, implementation="magic"), "'magic' is not one of"),
        (GatedDeltaNet(2, implementation="magic"), "'magic' is not one of"),
        (Mamba2(head_size=8, implementation="magic"), "'magic' is not one of"),
    ],
)
def test_bad_options(x, layer, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(layer.init, jax.random.key(0), x)


def test_bad_states(made, x):
    layer, params, _, state = made("elu")
    with pytest.raises(ValueError, match="does not fit LinearAttention and x"):
        layer.apply(params, x[:1], state)
    with pytest.raises(ValueError, match="normaliser"):
        layer.apply(params, x, RecurrentState(state.memory))
    with pytest.raises(ValueError, match=r"tail \(1, 3, 2\) must be \(1, 2, 2\)"):
        ShortConv(3).init(jax.random.key(0), jnp.zeros((1, 4, 2)), jnp.zeros((1, 3, 2)))
