"""Running the scripts as a user does: in a process of their own, or in this one, where that is all a test needs."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgen import cli
from jaxgen import config as config_lib
from jaxgen.recipes.next_scale import param_shapes
from jaxgen.train import save_config, save_params

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "var.py")

# Runs one script after another in one process: [[path, argument, ...], ...] as JSON.
SEVERAL = """
import json, runpy, sys
for call in json.loads(sys.argv[1]):
    sys.argv = call
    try:
        runpy.run_path(call[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""


@pytest.fixture(scope="module", autouse=True)
def all_compile_quickly(quick_compiles):
    """Nothing here is large."""


@pytest.fixture(scope="session")
def config_path():
    """configs/var.py"""
    return CONFIG


@pytest.fixture(scope="session")
def processes(compile_cache):
    """`processes(call, ..., devices=1)` starts one process that runs the calls, `(script, argument, ...)`, in order."""

    def start(*calls, devices=1):
        calls = [[str(ROOT / "scripts" / f"{call[0]}.py"), *map(str, call[1:])] for call in calls]
        env = os.environ | compile_cache
        env |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)}
        env |= {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"} if devices > 1 else {}
        command = [sys.executable, *calls[0]] if len(calls) == 1 else [sys.executable, "-c", SEVERAL, json.dumps(calls)]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen(command, env=env, **pipes)

    return start


def load_script(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(monkeypatch, capsys):
    """`script(name, argument, ...)` runs it in this process and returns its exit code `code`, and `out` and `err`."""

    def call(name, *args):
        module = load_script(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.run(module.main)
        out, err = capsys.readouterr()
        return types.SimpleNamespace(code=end.value.code, out=out, err=err)

    return call


@pytest.fixture
def refused(script):
    """As `script`, for what a user may get wrong: asserts exit code 2 and returns the one line said about it."""

    def call(name, *args):
        done = script(name, *args)
        assert done.code == 2, done
        assert done.err.startswith("error: ") and done.err.count("\n") == 1 and done.err.endswith("\n"), done.err
        return done.err.removeprefix("error: ").strip()

    return call


@pytest.fixture
def succeeds(script):
    """As `script`, where nothing goes wrong; returns what was printed."""

    def call(name, *args):
        done = script(name, *args)
        assert done.code == 0 and not done.err, done
        return done.out

    return call


@pytest.fixture(scope="session")
def put_weights(randomize):
    """`put_weights(workdir, *edits, config=True)` makes a work directory with random weights, without training; returns
    (configuration, parameters by module)."""

    def put(workdir, *edits, config=True):
        recipe = cli.load_config_file(CONFIG).get_config("smoke")
        made = config_lib.override(recipe.config, ["classifier.steps=0", *edits])
        params = {name: randomize(shapes, seed=len(name)) for name, shapes in param_shapes(made.build_sampler()).items()}
        params = jax.tree.map(np.asarray, params)
        for name, variables in params.items():
            save_params(workdir, name, {name: variables})
        if config:
            save_config(workdir, made)
        return made, params

    return put
