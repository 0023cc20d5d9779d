import os
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_recipe import make_stage

from jaxgen.train import Checkpoints, abstract_state, init_state, load_params, make_mesh, save_params

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(None, jax.devices()[:1])


@pytest.fixture(scope="module")
def stage():
    return make_stage("first", ema=0.9, optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam()))


@pytest.fixture(scope="module")
def state(stage, mesh):
    ts = init_state(stage, jax.random.key(0), mesh, {})
    return ts.replace(ema=jax.tree.map(lambda x: x + 1, ts.params))


def iterator(stage, batches=0):
    data = iter(stage.data(0, 1))
    for _ in range(batches):
        next(data)
    return data


def raw(tree):
    return [np.asarray(jax.random.key_data(x) if x.dtype == jax.random.key(0).dtype else x) for x in jax.tree.leaves(tree)]


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(raw(a), raw(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, stage, state):
    """A work directory with a checkpoint of step 3."""
    workdir = tmp_path_factory.mktemp("saved")
    with Checkpoints(workdir, "first") as checkpoints:
        checkpoints.save(3, state, iterator(stage, 3))
    return workdir


def test_round_trip(saved, stage, state, mesh):
    data = iterator(stage)
    with Checkpoints(saved, "first") as checkpoints:
        assert checkpoints.steps() == [3] and checkpoints.latest() == 3
        assert checkpoints.has_training_state()
        same(checkpoints.restore(abstract_state(stage, mesh, {}), data), state)
    np.testing.assert_array_equal(next(data)["x"], next(iterator(stage, 3))["x"])


def test_load_params_gives_the_average_if_one_is_kept(tmp_path, saved, state, stage):
    params, other = load_params(saved, "first")
    same(params, state.ema)
    same(other, state.state)
    with Checkpoints(tmp_path, "first") as checkpoints:
        checkpoints.save(1, state.replace(ema=None), iterator(stage))
    same(load_params(tmp_path, "first")[0], state.params)


def test_keeps_the_last_n_and_the_best(tmp_path, stage, state):
    with Checkpoints(tmp_path, "first", keep=2) as checkpoints:
        assert checkpoints.best_loss() == np.inf
        for step, loss in enumerate([np.nan, 1.0, None, 3.0, None], start=1):
            checkpoints.save(step, state, iterator(stage), None if loss is None else {"loss": loss, "psnr": -loss})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 4, 5]
        assert checkpoints.best_loss() == 1.0
        checkpoints.save(6, state.replace(ema=state.params), iterator(stage), {"loss": 0.5})
        checkpoints.wait()
        assert checkpoints.steps() == [5, 6]
        checkpoints.save(7, state, iterator(stage))
    same(load_params(tmp_path, "first", "best")[0], state.params)
    same(load_params(tmp_path, "first", 6)[0], state.params)
    same(load_params(tmp_path, "first")[0], state.ema)


def test_a_step_that_is_not_there(tmp_path, saved):
    with pytest.raises(ValueError, match=f"no checkpoint in {tmp_path}/checkpoints/first"):
        load_params(tmp_path, "first")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"no checkpoint of step 4 in .*; there are \[3\]"):
        load_params(saved, "first", 4)
    with pytest.raises(ValueError, match=r"none of the checkpoints \[3\] .* was evaluated"):
        load_params(saved, "first", "best")


def test_a_model_that_does_not_fit(saved, stage, mesh):
    def wider(key, frozen):
        params, state = stage.init(key, frozen)
        params["params"]["out"] = {"kernel": jnp.zeros((8, 3)), "bias": jnp.zeros(3)}
        del params["params"]["in"]["bias"]
        return params, {"seen": jnp.zeros((), jnp.float32)}

    other = make_stage("first", init=wider, optimizer=optax.sgd(0.1), ema=0.9)
    with Checkpoints(saved, "first") as checkpoints, pytest.raises(ValueError) as error:
        checkpoints.restore(abstract_state(other, mesh, {}), iterator(stage))
    message = str(error.value)
    assert str(saved / "checkpoints/first/3") in message and "\n" not in message
    assert "ema/params/out/kernel is float32[8, 2] in the checkpoint and float32[8, 3] in the model" in message
    assert "ema/params/out/bias float32[3] is not in the checkpoint" in message
    assert "ema/params/in/bias float32[8] is not in the model" in message
    assert message.endswith(" more")


def test_damaged_checkpoints(tmp_path, saved, stage, state, mesh, capfd):
    """Each file of a checkpoint, removed or cut in half: read as before, or an error of one line that names the checkpoint."""
    broken = tmp_path / "checkpoints" / "first" / "3"
    files = sorted(p.relative_to(saved) for p in saved.rglob("*") if p.is_file() and p.name != "commit_success.txt")
    files = [file for file in files if "ocdbt.process_0" not in file.parts]  # empty but for arrays of more than 1 kB
    abstract = abstract_state(stage, mesh, {})
    failures = set()
    for file in files:
        for damage in ("removed", "cut"):
            shutil.rmtree(tmp_path)
            shutil.copytree(saved, tmp_path)
            path = tmp_path / file
            path.unlink() if damage == "removed" else os.truncate(path, path.stat().st_size // 2)
            for read in ("restore", "load_params"):
                try:
                    if read == "load_params":
                        same(load_params(tmp_path, "first")[0], state.ema)
                    else:
                        with Checkpoints(tmp_path, "first") as checkpoints:
                            same(checkpoints.restore(abstract, iterator(stage)), state)
                except ValueError as error:
                    assert str(broken) in str(error) and "\n" not in str(error), str(error)
                    assert len(str(error)) < 500
                    failures.add((file.name if file.parent.name != "d" else "d", damage, read))
    for damage in ("removed", "cut"):
        for read in ("restore", "load_params"):
            assert {("manifest.ocdbt", damage, read), ("d", damage, read), ("_METADATA", damage, read)} <= failures
        assert ("process_0-of-1.json", damage, "restore") in failures
    assert "Traceback" not in "".join(capfd.readouterr())


def test_the_damaged_parameter_is_named(tmp_path, mesh):
    save_params(tmp_path, "first", {"embed": {"kernel": np.random.default_rng(0).normal(size=(64, 64)).astype("f4")}})
    load_params(tmp_path, "first")
    largest = max((p for p in tmp_path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    assert largest.stat().st_size > 10_000
    os.truncate(largest, 9_000)
    with pytest.raises(ValueError, match="is cut short at 9000 bytes; it holds params.embed.kernel"):
        load_params(tmp_path, "first")


def test_what_a_killed_save_left_does_not_count(tmp_path, saved, stage, state, mesh):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    directory = tmp_path / "checkpoints" / "first"
    half = directory / "5.orbax-checkpoint-tmp"
    shutil.copytree(directory / "3", half)
    lines = []
    same(load_params(tmp_path, "first")[0], state.ema)
    with Checkpoints(tmp_path, "first", log=lines.append) as checkpoints:
        assert checkpoints.latest() == 3
    assert lines == [f"removing the incomplete checkpoint {half}"] and not half.exists()
    shutil.rmtree(directory / "3")
    half.mkdir()
    with pytest.raises(ValueError, match="5.orbax-checkpoint-tmp is incomplete"):
        load_params(tmp_path, "first")


def test_full_disk(tmp_path, stage, state, caplog):
    """A limit on the size of files stands for a full disk; it reaches tensorstore's threads in the same way."""
    large = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(0).normal(size=(300, 300))), state.params)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path, "first", keep=1) as checkpoints:
        checkpoints.save(1, state, iterator(stage, 1))
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(ValueError) as error:
                checkpoints.save(2, state.replace(ema=large), iterator(stage, 2))
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert f"cannot save a checkpoint in {tmp_path}/checkpoints/first (the one of step 1 is intact)" in str(error.value)
        assert str(error.value).endswith("File too large")
        assert not caplog.records
        assert checkpoints.steps() == [1]
        assert not list(checkpoints.directory.glob("*tmp*"))
        same(load_params(tmp_path, "first")[0], state.ema)
    with Checkpoints(tmp_path, "first", keep=1) as checkpoints:  # once there is room, the next run goes on
        checkpoints.save(2, state.replace(ema=large), iterator(stage, 2))
        checkpoints.wait()
        assert checkpoints.steps() == [2]


def test_save_params(tmp_path, stage, state, mesh):
    params = jax.tree.map(np.asarray, state.ema)
    save_params(tmp_path, "first", params, {"seen": np.int32(7)})
    got, other = load_params(tmp_path, "first")
    same(got, state.ema)
    assert int(other["seen"]) == 7
    with pytest.raises(ValueError, match=r"already holds the checkpoints \[0\]"):
        save_params(tmp_path, "first", params)
    with Checkpoints(tmp_path, "first") as checkpoints:
        assert not checkpoints.has_training_state()
        got, other = checkpoints.restore_weights(abstract_state(stage, mesh, {}))
        same(got, state.ema)
        assert int(other["seen"]) == 7
    save_params(tmp_path, "bare", params)
    assert load_params(tmp_path, "bare")[1] == ()
    with Checkpoints(tmp_path, "bare") as checkpoints:
        assert checkpoints.restore_weights(abstract_state(stage, mesh, {}))[1] is None
    save_params(tmp_path, "other", {"unknown": params["params"]})
    with Checkpoints(tmp_path, "other") as checkpoints:
        with pytest.raises(ValueError, match=r"params/unknown/in/bias float32\[8\] is not in the model"):
            checkpoints.restore_weights(abstract_state(stage, mesh, {}))


def test_saved_arrays_may_be_donated(tmp_path, stage, state):
    ts = state.replace(params=jax.tree.map(jnp.copy, state.params), ema=None)
    overwrite = jax.jit(lambda p: jax.tree.map(lambda x: x * 0 - 1, p), donate_argnums=0)
    with Checkpoints(tmp_path, "first") as checkpoints:
        checkpoints.save(1, ts, iterator(stage))
        overwrite(ts.params)
    same(load_params(tmp_path, "first")[0], state.params)
