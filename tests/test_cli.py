import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from jaxgen import cli
from jaxgen.recipes.next_scale import param_shapes
from jaxgen.train import Interrupted, NonFiniteError, make_mesh, save_config, save_params
from jaxgen.train.mesh import AXES

CONFIG = str(Path(__file__).parents[1] / "configs" / "var.py")


def outcome(main, capsys):
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    return end.value.code, capsys.readouterr().err


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "main, code, line",
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (raising(ValueError("depth=0:\n   must be positive")), 2, "error: depth=0: must be positive\n"),
        (raising(NonFiniteError("step 3: loss nan")), 2, "error: step 3: loss nan\n"),
        (raising(OSError(28, "No space left on device", "/x")), 2, "error: [Errno 28] No space left on device: '/x'\n"),
        (raising(KeyboardInterrupt()), 130, ""),
        (
            raising(Interrupted(signal.SIGTERM, "generator", 7)),
            143,
            "SIGTERM: saved stage 'generator' at step 7; run again to go on\n",
        ),
        (
            raising(Interrupted(signal.SIGINT, "generator", 7)),
            130,
            "SIGINT: saved stage 'generator' at step 7; run again to go on\n",
        ),
    ],
)
def test_exit_codes(main, code, line, capsys):
    assert outcome(main, capsys) == (code, line)


def test_a_mistake_in_the_code_is_not_a_users_error(monkeypatch):
    with pytest.raises(KeyError):
        cli.run(raising(KeyError("x")))
    monkeypatch.setenv("JAXGEN_TRACEBACK", "1")
    with pytest.raises(ValueError, match="whole story"):
        cli.run(raising(ValueError("whole story")))


def test_comma_separated():
    assert cli.comma_separated("0,1,,2,", "--labels") == [0, 1, 2]
    assert cli.comma_separated("0.5, 1", "--box", float) == [0.5, 1.0]
    for text, message in (("1,b", "--labels 1,b: 'b' is not int"), ("1.5", "'1.5' is not int"), (",", "--labels ',': empty")):
        with pytest.raises(ValueError, match=message):
            cli.comma_separated(text, "--labels")


def test_sampling_flags_that_are_left_out_are_the_recipes():
    parser = argparse.ArgumentParser()
    cli.add_sampling_flags(parser)
    others = ["--cfg", "0", "--top_k", "3", "--top_p", "0.5", "--temperature", "2"]
    asked = {"cfg": 0.0, "top_k": 3, "top_p": 0.5, "temperature": 2.0}
    for name, own in (("var", (1.5, 0.96)), ("flowar", (1.5, 0.0)), ("semaim", (0.0, 0.0))):
        recipe = cli.load_config_file(str(Path(CONFIG).with_name(f"{name}.py"))).get_config("smoke")
        plain = {"cfg": own[0], "top_k": 0, "top_p": own[1], "temperature": 1.0}
        assert cli.sampling_settings(parser.parse_args([]), recipe) == plain
        assert cli.sampling_settings(parser.parse_args(others), recipe) == asked


def test_a_configuration_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def get_config(variant):\n    return variant * 2\n")
    assert cli.load_config_file(str(path)).get_config("ab") == "abab"


def test_an_output_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "new" / "x.txt"
    with cli.output_file("--out", str(path)) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".txt"
        temporary.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"
    for error in (OSError(28, "No space left on device"), RuntimeError("stop")):
        with pytest.raises((ValueError, RuntimeError)) as caught, cli.output_file("--out", str(path)) as temporary:
            temporary.write_text("second")
            raise error
        if isinstance(error, OSError):
            assert str(caught.value) == f"--out {path}: cannot be written (No space left on device)"
        assert path.read_text() == "first" and os.listdir(path.parent) == ["x.txt"]


def test_sizes_are_checked_in_every_stage_before_any_is_trained():
    recipe = cli.load_config_file(CONFIG).get_config("smoke")
    mesh = make_mesh("data=1", jax.devices()[:1])
    cli.check_stages(recipe, mesh)
    for edit, message in (("model.heads=3", "heads=3"), ("classifier.width=12", "width=12"), ("tokenizer.groups=5", "groups=5")):
        with pytest.raises(ValueError, match=message):
            cli.check_stages(recipe.override([edit]), mesh)


def test_a_mesh_that_does_not_divide_heads_or_batches():
    recipe = cli.load_config_file(CONFIG).get_config("smoke")
    mesh = AbstractMesh((1, 1, 4, 1), AXES, axis_types=(AxisType.Auto,) * 4)
    text = r"generator/.*/attention/\w+/kernel: shape \(.*\) has a dimension 2 that tensor=4 does not divide"
    with pytest.raises(ValueError, match=text):
        cli.check_stages(recipe.override(["model.heads=2"]), mesh)
    mesh = make_mesh("data=1", jax.devices()[:1])
    odd = recipe.override(["model_train.batch_size=9", "model_train.accumulate=2"])
    with pytest.raises(ValueError, match="stage 'generator': a batch of 9 examples cannot be split into accumulate=2"):
        cli.check_stages(odd, mesh)


def test_shard_patterns_come_before_the_recipes_own():
    recipe = cli.load_config_file(CONFIG).get_config("smoke")
    mesh = make_mesh("data=1", jax.devices()[:1])
    found = cli.check_stages(recipe, mesh, ["generator/.*head/head/kernel=-,tensor"])
    assert [stage.rules[0] for stage in found.stages] == [("generator/.*head/head/kernel", P(None, "tensor"))] * len(found.stages)
    assert [stage.rules[1:] for stage in found.stages] == [stage.rules for stage in recipe.stages]
    with pytest.raises(ValueError, match="--shard pattern 'haed/kernel' matches no parameter"):
        cli.check_stages(recipe, mesh, ["haed/kernel=tensor"])


def test_a_work_directory_with_other_edits_steps_and_places(tmp_path, randomize):
    recipe = cli.load_config_file(CONFIG).get_config("smoke").override(["classifier.steps=0"])
    shapes = param_shapes(recipe.config.build_sampler())
    for name in shapes:
        save_params(tmp_path, name, {name: randomize(shapes[name])})
    save_config(tmp_path, recipe.config)
    mesh = make_mesh("data=1", jax.devices()[:1])
    for kwargs in ({}, {"step": 0}, {"mesh": mesh}):
        found, params = cli.open_workdir(tmp_path, **kwargs)
        assert found.config == recipe.config and set(params) == {"tokenizer", "generator"}
        jax.tree.map(np.testing.assert_array_equal, params["generator"]["generator"], randomize(shapes["generator"]))
        leaf = jax.tree.leaves(params["generator"])[0]
        assert isinstance(leaf.sharding, jax.sharding.NamedSharding) == ("mesh" in kwargs)
    edited, _ = cli.open_workdir(tmp_path, edits=["data.path=elsewhere"])
    assert edited.config.data.path == "elsewhere"
    with pytest.raises(ValueError, match="no checkpoint of step 3"):
        cli.open_workdir(tmp_path, step=3)


CALLBACK = """
import jax, numpy as np
from jaxgen import cli

def main():
    total = jax.ShapeDtypeStruct((), np.float32)
    print(jax.jit(lambda x: jax.pure_callback(lambda x: np.asarray(x).sum(), total, 2 * x))(np.ones((500, 768), np.float32)))

cli.run(main)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be bound to one core here")
def test_callbacks_to_the_host_end_on_one_core():
    env = {name: value for name, value in os.environ.items() if name != "NPROC"} | {"JAX_PLATFORMS": "cpu"}
    bound = f"import os; os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})\n{CALLBACK}"
    done = subprocess.run([sys.executable, "-c", bound], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "768000.0", done.stderr
