import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from kernels_pallas import explain, target
from kernels_pallas.delta import gated_delta, gated_delta_step, tpu, xla

pytestmark = pytest.mark.numeric

# Of float32: sums of up to 680 products, in orders of no account. Of 16 bits: two roundings, of the scores and of the result.
TOLERANCE = {"float32": 2e-5, "bfloat16": 3 * 2**-8, "float16": 3 * 2**-11}


def arrays(data, *names, dtype=jnp.float32):
    return [jnp.asarray(data[name], dtype) for name in names]


def test_the_adjoint_is_the_derivative(oracle):
    data = oracle.draw(5, beta=1.5, seed=3)
    rng, eps = np.random.default_rng(4), 1e-6
    inputs = [data[name] for name in oracle.names]
    step = [rng.standard_normal(x.shape) for x in inputs]

    def value(sign):
        o, states = oracle.recurrence(*(x + sign * eps * d for x, d in zip(inputs, step)))
        return np.sum(o * data["o_bar"]) + np.sum(states[-1] * data["state_bar"])

    bars = oracle.adjoint(*inputs, data["o_bar"], data["state_bar"])
    for i, bar in enumerate(bars):
        mask = [d if n == i else 0 * d for n, d in enumerate(step)]
        kept, step = step, mask
        np.testing.assert_allclose((value(1) - value(-1)) / (2 * eps), np.sum(bar * mask[i]), rtol=1e-7)
        step = kept


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 333, 680])
@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_matches_the_recurrence(oracle, implementation, length):
    heads = 2 if length == 127 else 1
    oracle.compare(implementation, oracle.draw(length, h=heads), jnp.float32, TOLERANCE["float32"])


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
@pytest.mark.parametrize("beta", [1.0, 2.0])
@pytest.mark.parametrize("cosine", [0.5, 0.95, 0.999])
def test_correlated_keys(oracle, implementation, cosine, beta):
    # Without decay nothing damps an error of the inverse. Inverted by doubling, the same inputs give errors from 9e-2 to 1e7.
    oracle.compare(implementation, oracle.draw(127, cosine=cosine, beta=beta, decay=0.0), jnp.float32, TOLERANCE["float32"])


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
@pytest.mark.parametrize("decay", [5.0, 100.0])
def test_strong_decay(oracle, implementation, decay):
    data = oracle.draw(127, cosine=0.5, decay=decay)
    # Sums of log-decays reach thousands, and between these two tokens little is lost.
    data["log_decay"][:, 60:63] = -0.01
    oracle.compare(implementation, data, jnp.float32, TOLERANCE["float32"])


@pytest.mark.parametrize("implementation, dtype", [("xla", "bfloat16"), ("xla", "float16"), ("tpu", "bfloat16")])
def test_16_bits(oracle, implementation, dtype):
    errors = oracle.compare(implementation, oracle.draw(127, cosine=0.5), jnp.dtype(dtype), TOLERANCE[dtype])
    # Products with the state are split in two: a state rounded to bfloat16 on its way would be off by 2^-9.
    assert errors["last"] < 2**-13


@pytest.mark.parametrize("inverse", [xla.chunk_inverse, tpu._inverse])
def test_inverse(oracle, inverse):
    # Equal keys and beta = 2 are reflections; entries that don't fall off.
    i, j = np.indices((64, 64))
    a = np.where(i > j, 2.0, 0.0).astype(np.float32)
    want = np.where(i == j, 1.0, np.where(i > j, 2.0 * (-1.0) ** (i - j), 0.0))
    np.testing.assert_allclose(want @ (np.eye(64) + a), np.eye(64))
    np.testing.assert_allclose(jax.jit(inverse, compiler_options=oracle.quick)(a), want, atol=1e-6)


def test_steps_are_the_recurrence(oracle):
    data = oracle.draw(9, beta=2.0)
    q, k, v, g, beta, state = arrays(data, *oracle.names)
    want, states = oracle.recurrence(*(data[name] for name in oracle.names))
    for t in range(9):
        o, state = gated_delta_step(q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t], state)
        np.testing.assert_allclose(o, want[:, t], atol=1e-5)
    np.testing.assert_allclose(state, states[-1], atol=1e-5)
    kept = gated_delta_step(q[:, 0], k[:, 0], v[:, 0], None, beta[:, 0], state)
    still = gated_delta_step(q[:, 0], k[:, 0], v[:, 0], 0 * g[:, 0], beta[:, 0], state)
    np.testing.assert_array_equal(kept[1], still[1])


def test_split_and_resume(oracle):
    data = {name: jnp.asarray(x, jnp.float32) for name, x in oracle.draw(127).items()}
    op = oracle.compiled("xla")
    (whole, last), _ = op(data)
    head = {name: x if "state" in name else x[:, :63] for name, x in data.items()}
    tail = {name: x if "state" in name else x[:, 63:] for name, x in data.items()}
    (first, between), _ = op(head)
    (second, resumed), _ = op(tail | {"state": between})
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=1e-5)
    np.testing.assert_allclose(resumed, last, atol=1e-5)


def test_none_is_no_decay_and_no_state(oracle):
    q, k, v, g, beta, state = arrays(oracle.draw(3), *oracle.names)
    op = jax.jit(gated_delta, compiler_options=oracle.quick)
    for x, y in zip(op(q, k, v, None, beta), op(q, k, v, 0 * g, beta, 0 * state)):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_minus_infinity_forgets(oracle, implementation):
    data = oracle.draw(127, decay=0.1)
    data["log_decay"][:, [5, 70]] = -np.inf
    oracle.compare(implementation, data, jnp.float32, TOLERANCE["float32"])


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_vmap_and_remat_change_nothing(oracle, implementation):
    op = functools.partial(gated_delta, implementation=implementation)
    stacks = [arrays(oracle.draw(3, seed=seed), *oracle.names) for seed in (0, 1)]

    def loss(*x):
        return sum(jnp.sum(jnp.sin(y)) for y in op(*x))

    alone = jax.value_and_grad(loss, (0, 1, 2, 3, 4, 5))
    together = jax.value_and_grad(jax.checkpoint(loss), (0, 1, 2, 3, 4, 5))
    with target("v5e", interpret=True) if implementation == "tpu" else target("cpu"):
        got = jax.jit(jax.vmap(together), compiler_options=oracle.quick)(*(jnp.stack(x) for x in zip(*stacks)))
        jitted = jax.jit(alone, compiler_options=oracle.quick)
        want = [jitted(*x) for x in stacks]
    jax.tree.map(lambda x, *y: np.testing.assert_allclose(x, jnp.stack(y), atol=1e-5), got, *want)


@pytest.mark.parametrize("kind, calls", [("v5e", 3), ("v5p", 3), ("h100", 0)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_lowers(kind, calls, dtype):
    x = jax.ShapeDtypeStruct((2, 333, 3, 64), dtype)
    gate, state = jax.ShapeDtypeStruct((2, 333, 3), jnp.float32), jax.ShapeDtypeStruct((2, 3, 64, 64), jnp.float32)

    def fn(*x):
        out, back = jax.vjp(gated_delta, *x)
        return out, back(out)

    with target(kind):
        lowered = export.export(jax.jit(fn), platforms=["cuda" if kind == "h100" else "tpu"])(x, x, x, gate, gate, state)
    # Forward; then the states between chunks, and the backward pass.
    assert lowered.mlir_module().count("tpu_custom_call") == calls


def test_explain_says_why():
    x, gate = jax.ShapeDtypeStruct((1, 8, 2, 20), jnp.float32), jax.ShapeDtypeStruct((1, 8, 2), jnp.float32)
    with target("v5e"):
        (choice,) = explain(gated_delta, x, x, x, gate, gate)
    assert choice.implementation == "xla"
    assert dict(choice.refused)["tpu"] == "key size 20 is not a multiple of 8 up to 256"


Q, V, GATE = (1, 8, 2, 16), (1, 8, 2, 24), (1, 8, 2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": (8, 2, 16)}, r"q has shape \(8, 2, 16\); expected \[b, t, h, dk\]"),
        ({"v": (1, 8, 24)}, r"v has shape \(1, 8, 24\); expected \[b, t, h, dv\]"),
        ({"k": (1, 8, 2, 8)}, r"k has shape \(1, 8, 2, 8\).*must be \(1, 8, 2, 16\)"),
        ({"k": (1, 8, 1, 16)}, r"k has shape \(1, 8, 1, 16\)"),
        ({"v": (1, 7, 2, 24)}, r"v has shape \(1, 7, 2, 24\).*must be \(1, 8, 2, 24\)"),
        ({"log_decay": (1, 8, 2, 16)}, r"log_decay has shape \(1, 8, 2, 16\)"),
        ({"beta": (1, 9, 2)}, r"beta has shape \(1, 9, 2\)"),
        ({"state": (1, 2, 24, 16)}, r"state has shape \(1, 2, 24, 16\).*must be \(1, 2, 16, 24\)"),
        ({"q": (1, 0, 2, 16), "k": (1, 0, 2, 16), "v": (1, 0, 2, 24), "log_decay": (1, 0, 2), "beta": (1, 0, 2)}, "empty axis"),
    ],
)
def test_bad_shapes(change, message):
    shapes = {"q": Q, "k": Q, "v": V, "log_decay": GATE, "beta": GATE, "state": (1, 2, 16, 24)} | change
    with pytest.raises(ValueError, match=message):
        gated_delta(**{name: jnp.zeros(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize(
    "dtypes, message",
    [
        ({"v": jnp.bfloat16}, "v has dtype bfloat16; q, k and v must share"),
        ({"q": jnp.int32, "k": jnp.int32, "v": jnp.int32}, "q has dtype int32"),
        ({"state": jnp.bfloat16}, "state has dtype bfloat16; it must be float32"),
    ],
)
def test_bad_dtypes(dtypes, message):
    shapes = {"q": Q, "k": Q, "v": V, "log_decay": GATE, "beta": GATE, "state": (1, 2, 16, 24)}
    with pytest.raises(ValueError, match=message):
        gated_delta(**{name: jnp.zeros(shape, dtypes.get(name, jnp.float32)) for name, shape in shapes.items()})


def test_bad_implementation():
    x, gate = jnp.zeros(Q), jnp.zeros(GATE)
    with pytest.raises(ValueError, match="implementation='cuda' is not one of tpu, hopper, xla"):
        gated_delta(x, x, x, gate, gate, implementation="cuda")
    with pytest.raises(ValueError, match="implementation='tpu' cannot run on cpu"):
        gated_delta(x, x, x, gate, gate, implementation="tpu")


def test_bad_step():
    x = jnp.zeros((1, 2, 16))
    with pytest.raises(ValueError, match=r"beta has shape \(1, 3\)"):
        gated_delta_step(x, x, x, None, jnp.zeros((1, 3)), jnp.zeros((1, 2, 16, 16)))
    with pytest.raises(ValueError, match=r"q has shape \(1, 2, 2, 16\); expected \[b, h, dk\]"):
        gated_delta_step(jnp.zeros((1, 2, 2, 16)), x, x, None, jnp.zeros((1, 2)), jnp.zeros((1, 2, 16, 16)))
