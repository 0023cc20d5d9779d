"""What scripts/plan.py makes of its flags; what plans say is tested in train/test_four_devices.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import PartitionSpec as P

from jaxgen.plan import Devices

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def planned(monkeypatch):
    """What was to be planned: (recipe, mesh, options) of each call; nothing is compiled."""
    calls = []

    def plan_updates(recipe, devices, mesh=None, **options):
        calls.append((recipe, mesh, options))
        return iter([{"stage": "generator", "fits": len(calls) > 1}])

    monkeypatch.setattr("jaxgen.plan.plan_updates", plan_updates)
    monkeypatch.setattr(Devices, "devices", lambda self: jax.devices()[:1])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return calls


def arguments(config_path, *more):
    return ("plan", "--config", config_path, "--variant", "smoke", "--device", "v5e-1", *more)


def test_what_is_planned_is_what_is_trained(planned, succeeds, config_path):
    edits = ("--set", "run.reduce_dtype=bfloat16", "model_train.batch_size=32")
    shard = ("--shard", "head/head/kernel=-,tensor", "embed=")
    succeeds(*arguments(config_path, "--mesh", "data=1", "--only", "generator", *edits, *shard))
    ((recipe, mesh, options),) = planned
    assert (mesh, options) == ("data=1", {"only": "generator", "reduce_dtype": "bfloat16"})
    rules = (("head/head/kernel", P(None, "tensor")), ("embed", P()))
    assert all(stage.rules[:2] == rules for stage in recipe.stages)
    assert recipe.config.model_train.batch_size == 32


def test_patterns_stay_in_what_is_proposed(planned, succeeds, config_path):
    out = succeeds(*arguments(config_path, "--propose", "--shard", "head/head/kernel="))
    assert "does not fit: --mesh fsdp=1\n" in out and "\nfits: --mesh fsdp=1 --set model.remat=true\n" in out
    assert [recipe.config.model.remat for recipe, *_ in planned] == [False, True]
    for recipe, mesh, options in planned:
        assert mesh == "fsdp=1" and options["reduce_dtype"] is None
        assert all(stage.rules[0] == ("head/head/kernel", P()) for stage in recipe.stages)


@pytest.mark.parametrize(
    "name, drawn, edits",
    [
        ("jpeg_lm", "world", ["data.image_size=32", "codec.size=32"]),
        ("avc_lm", "digits", ["data.height=16", "data.width=32"]),
    ],
)
def test_data_that_are_not_there(planned, succeeds, name, drawn, edits):
    """Are drawn in the shape that was asked for, by this process."""
    config, edits = ROOT / "configs" / f"{name}.py", [*edits, "model_train.batch_size=2", "codec.length=1500"]
    succeeds("plan", "--config", str(config), "--variant", "paper", "--device", "v5e-1", "--set", *edits)
    ((recipe, *_),) = planned
    assert (recipe.config.data.path, recipe.config.data.workers) == (drawn, 0)
    assert next(iter(recipe.stage("generator").data(0, 1)))["tokens"].shape == (2, 1500)


def test_a_pattern_without_a_parameter(planned, refused, config_path):
    said = refused(*arguments(config_path, "--shard", "haed/kernel=tensor"))
    assert said.startswith("--shard pattern 'haed/kernel' matches no parameter") and not planned


def test_the_table_of_the_readme():
    """Two of its rows, planned again: parameters, state and work as told, what the compiler chose within a fifth."""
    page = (ROOT / "README.md").read_text()
    told = {name: cells.split(" | ") for name, cells in re.findall(r"^\| (any_subset|elm) \| (.*) \|$", page, re.MULTILINE)}
    assert set(told) == {"any_subset", "elm"}
    files = [ROOT / "configs" / f"{name}.py" for name in told]
    flags = ["--variant", "paper", "--device", "h100-8", "--mesh", "fsdp=8", "--only", "generator", "--markdown"]
    command = [sys.executable, ROOT / "scripts" / "plan.py", "--config", *files, *flags]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    head, _, *rows = ([cell.strip() for cell in line.strip("| ").split("|")] for line in done.stdout.splitlines())
    assert len(rows) == len(told)
    for row in (dict(zip(head, cells)) for cells in rows):
        parameters, batch, state, temporary, fits, tflop, traffic = told[row["config"]]
        assert (row["batch"], row["fits"]) == (batch, {"yes": "True", "no": "False"}[fits])
        assert float(row["parameters_M"]) == pytest.approx(float(parameters), rel=5e-3)
        held = sum(float(row[f"{part}_GB"]) for part in ("parameters", "optimizer", "frozen"))
        assert held == pytest.approx(float(state), rel=5e-3)
        assert float(row["TFLOP"]) == pytest.approx(float(tflop), rel=5e-3)
        assert float(row["temporary_GB"]) == pytest.approx(float(temporary), rel=0.2)
        assert float(row["traffic_GB"]) == pytest.approx(float(traffic), rel=0.2)
