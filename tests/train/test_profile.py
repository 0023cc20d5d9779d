import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from toy_recipe import make_recipe, make_stage

from jaxgen.train import Profile, RunConfig, make_mesh, train


def test_a_training_leaves_a_trace_of_the_updates_asked_for(tmp_path):
    lines = []
    mesh = make_mesh(None, jax.devices()[:1])
    train(make_recipe(make_stage("first", 4)), tmp_path, mesh=mesh, run=RunConfig(profile=2), log=lines.append)
    assert f"a trace of 2 updates is in {tmp_path / 'profile'}" in lines
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("updates,recorded", [(2, None), (4, 1), (5, 2), (9, 2)])
def test_profile_records_what_there_is(tmp_path, monkeypatch, updates, recorded):
    calls, lines = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: calls.append(path))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    with Profile(tmp_path, 3, 2, lines.append) as profile:
        for _ in range(updates):
            profile.before_update()
    assert calls == ([] if recorded is None else [str(tmp_path), "stop"])
    assert lines == ([] if recorded is None else [f"a trace of {recorded} updates is in {tmp_path}"])


@pytest.mark.parametrize("updates,first,recorded", [(1, 0, 1), (2, 0, 2), (4, 2, 2), (5, 3, 2), (9, 3, 2)])
def test_short_stages_are_recorded_too(tmp_path, monkeypatch, updates, first, recorded):
    started, before, lines = [], [], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: started.append(len(before)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    with Profile(tmp_path, 3, 2, lines.append) as profile:
        profile.fit(updates)
        for update in range(updates):
            profile.before_update()
            before.append(update)
    assert started == [first] and lines == [f"a trace of {recorded} updates is in {tmp_path}"]


def test_no_updates_no_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: 1 / 0)
    with Profile(tmp_path, 0, 0, print) as profile:
        profile.before_update()


COMPILES = """
import sys, jax, jax.numpy as jnp
from jaxgen.train import CompileCache
cache = CompileCache(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.jit(lambda x: jnp.cos(x) * 1234.5).lower(jax.ShapeDtypeStruct((7,), "float32")).compile()
print(cache)
"""


def test_the_compile_cache_counts(tmp_path):
    """In processes of its own, as JAX opens its cache once."""
    command = [sys.executable, "-c", COMPILES, str(tmp_path)]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    said = [subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert said[0].strip() == f"compile cache {tmp_path}: 0 programs read, 1 compiled"
    assert said[1].strip() == f"compile cache {tmp_path}: 1 programs read, 0 compiled"
    assert any(tmp_path.iterdir())
