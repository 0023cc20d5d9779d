import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_recipe import init, loss, make_stage, noisy_loss, source

from jaxgen.train import abstract_state, init_state, make_mesh, make_step, shard_batch

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(None, jax.devices()[:1])


@pytest.fixture(scope="module")
def batches(mesh):
    data = iter(source(batch=16)(0, 1))
    return [shard_batch(mesh, next(data)) for _ in range(4)]


def start(stage, mesh, frozen=None):
    frozen = frozen or {}
    state = init_state(stage, jax.random.key(3), mesh, frozen)
    return state, make_step(stage, mesh, frozen)


def host(tree):
    """A copy that survives donation."""
    return jax.tree.map(lambda x: np.array(x), tree)


def linear_init(key, frozen):
    return {"w": jnp.asarray([0.5, -1.0, 0.25, 2.0])}, ()


def linear_loss(params, state, batch, key, step, frozen):
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2), ({}, state)


def linear_gradient(w, batch):
    """Of the mean of (x w - y)^2, in float64."""
    x, y = (np.asarray(batch[k], np.float64) for k in "xy")
    return 2 * x.T @ (x @ w - y) / len(y)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_update_is_gradient_descent(mesh, batches, accumulate):
    stage = make_stage(init=linear_init, loss=linear_loss, optimizer=optax.sgd(0.1), rules=(), accumulate=accumulate)
    ts, step = start(stage, mesh)
    w = np.asarray([0.5, -1.0, 0.25, 2.0])
    for batch in batches:
        gradient = linear_gradient(w, batch)
        expected_loss = np.mean((np.asarray(batch["x"]) @ w - np.asarray(batch["y"])) ** 2)
        w = w - 0.1 * gradient
        ts, metrics = step(ts, batch, {})
        assert float(metrics["grad_norm"]) == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
        assert float(metrics["loss"]) == pytest.approx(expected_loss, rel=1e-5)
        assert bool(metrics["finite"])
        np.testing.assert_allclose(ts.params["w"], w, rtol=1e-5, atol=1e-6)
    assert int(ts.step) == len(batches)


def test_accumulation_equals_one_large_batch(mesh, batches):
    results = []
    for accumulate in (1, 2, 8):
        ts, step = start(make_stage(accumulate=accumulate, ema=0.5), mesh)
        for batch in batches:
            ts, metrics = step(ts, batch, {})
        assert int(ts.state["seen"]) == 16 * len(batches)  # every micro-batch went through the state
        results.append((host((ts.params, ts.ema)), float(metrics["loss"])))
    for tree, value in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), tree, results[0][0])
        assert value == pytest.approx(results[0][1], rel=1e-5)


def test_accumulation_has_to_divide_the_batch(mesh, batches):
    ts, step = start(make_stage(accumulate=3), mesh)
    with pytest.raises(ValueError, match="batch of 16 .* accumulate=3"):
        step(ts, batches[0], {})


def test_randomness_changes_with_step_and_micro_batch_but_not_between_runs(mesh, batches):
    def draws():
        ts, step = start(make_stage(loss=noisy_loss), mesh)
        values = []
        for _ in range(4):
            ts, metrics = step(ts, batches[0], {})
            values.append(float(metrics["target"]))
        return values

    assert len(set(draws())) == 4
    assert draws() == draws()
    micro_keys = []

    def recording(params, state, batch, key, step, frozen):
        jax.debug.callback(lambda k: micro_keys.append(tuple(k.tolist())), jax.random.key_data(key))
        return loss(params, state, batch, key, step, frozen)

    ts, step = start(make_stage(accumulate=4, loss=recording), mesh)
    jax.block_until_ready(step(ts, batches[0], {}))
    jax.effects_barrier()
    assert len(set(micro_keys)) == 4


def test_state_is_donated(mesh, batches):
    ts, step = start(make_stage(ema=0.9), mesh)
    new, _ = step(ts, batches[0], {})
    assert all(x.is_deleted() for x in jax.tree.leaves((ts.params, ts.opt_state, ts.ema)))
    assert not any(x.is_deleted() for x in jax.tree.leaves(new))


def test_average_has_its_closed_form(mesh, batches):
    decay = 0.8
    ts, step = start(make_stage(ema=decay), mesh)
    history = [host(ts.params)]
    for batch in batches:
        ts, _ = step(ts, batch, {})
        history.append(host(ts.params))
    n = len(batches)
    weights = [decay**n] + [(1 - decay) * decay ** (n - k) for k in range(1, n + 1)]
    assert sum(weights) == pytest.approx(1)
    expected = jax.tree.map(lambda *ps: sum(w * p.astype(np.float64) for w, p in zip(weights, ps)), *history)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), host(ts.ema), expected)
    assert ts.weights is ts.ema
    plain, _ = start(make_stage(), mesh)
    assert plain.ema is None and plain.weights is plain.params


def test_an_update_that_is_not_finite_is_undone(mesh, batches):
    ts, step = start(make_stage(ema=0.9, after_update=lambda p, s, k, t: (p, {"seen": s["seen"] + 1})), mesh)
    ts, _ = step(ts, batches[0], {})
    before = host((ts.params, ts.state, ts.opt_state, ts.ema))
    bad = {**batches[1], "y": batches[1]["y"].at[5].set(jnp.nan)}
    ts, metrics = step(ts, bad, {})
    assert not bool(metrics["finite"]) and np.isnan(float(metrics["loss"]))
    jax.tree.map(np.testing.assert_array_equal, host((ts.params, ts.state, ts.opt_state, ts.ema)), before)
    assert int(ts.step) == 2
    ts, metrics = step(ts, batches[2], {})
    assert bool(metrics["finite"])
    assert not np.array_equal(ts.params["params"]["in"]["kernel"], before[0]["params"]["in"]["kernel"])


def test_a_gradient_that_is_not_finite_is_undone_too(mesh, batches):
    def steep(params, state, batch, key, step, frozen):
        return jnp.sqrt(jnp.sum(params["w"] * 0.0)), ({}, state)  # 0, with an infinite slope times 0

    stage = make_stage(init=linear_init, loss=steep, rules=())
    ts, step = start(stage, mesh)
    before = host(ts.params)
    ts, metrics = step(ts, batches[0], {})
    assert float(metrics["loss"]) == 0 and not bool(metrics["finite"])
    np.testing.assert_array_equal(ts.params["w"], before["w"])


def test_after_update_runs_in_the_step(mesh, batches):
    def after(params, state, key, step):
        return {"w": jnp.where(step == 1, jnp.zeros(4), params["w"])}, state

    stage = make_stage(init=linear_init, loss=linear_loss, rules=(), after_update=after)
    ts, step = start(stage, mesh)
    ts, _ = step(ts, batches[0], {})
    assert np.all(np.asarray(ts.params["w"]) != 0)
    ts, _ = step(ts, batches[1], {})
    np.testing.assert_array_equal(ts.params["w"], np.zeros(4))


def test_frozen_parameters_reach_init_and_loss(mesh, batches):
    frozen = {"first": init(jax.random.key(0), {})[0]}

    def copying(key, frozen):
        return {"params": jax.tree.map(lambda x: 2 * x, frozen["first"]["params"])}, {"seen": jnp.zeros((), jnp.int32)}

    ts, step = start(make_stage(init=copying), mesh, frozen)
    np.testing.assert_array_equal(ts.params["params"]["in"]["kernel"], 2 * np.asarray(frozen["first"]["params"]["in"]["kernel"]))
    _, with_frozen = step(ts, batches[0], frozen)
    ts, step = start(make_stage(init=copying), mesh, frozen)
    _, with_zeros = step(ts, batches[0], jax.tree.map(jnp.zeros_like, frozen))
    assert float(with_frozen["loss"]) != float(with_zeros["loss"])


def test_abstract_state_matches_the_real_one(mesh):
    stage = make_stage(ema=0.5)
    abstract, (ts, _) = abstract_state(stage, mesh, {}), start(stage, mesh)
    assert jax.tree.structure(abstract) == jax.tree.structure(ts)
    for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(ts)):
        assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)
