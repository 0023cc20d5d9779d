"""Configurations that another version saved."""

import json

import pytest

import jaxgen
from jaxgen.optim import OptimConfig
from jaxgen.train import load_config, save_config

ABSENT = object()


@pytest.fixture
def saved(tmp_path):
    save_config(tmp_path, OptimConfig(lr=0.5))
    path = tmp_path / "config.json"
    return path, json.loads(path.read_text())


def test_the_version_is_noted_and_what_fits_is_read(saved):
    path, tree = saved
    assert tree["jaxgen"] == jaxgen.__version__
    path.write_text(json.dumps(tree | {"jaxgen": "0.0.9"}))
    assert load_config(path.parent) == OptimConfig(lr=0.5)
    save_config(path.parent, OptimConfig(lr=0.5))  # goes on, and from now on is this version's
    assert json.loads(path.read_text()) == tree


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"speed": 3}, "config OptimConfig: unknown fields ['speed']"),
        ({"lr": "fast"}, "config OptimConfig.lr: 'fast' is not of type float"),
        ({"type": "jaxgen.optim:Optimizer"}, "config type 'jaxgen.optim:Optimizer' does not exist in this version"),
        ({"type": "jaxgen.gone:Config"}, "config type 'jaxgen.gone:Config' does not exist in this version"),
    ],
)
@pytest.mark.parametrize("version", ["0.0.9", None, jaxgen.__version__])
def test_file_version_and_field_are_named(saved, change, problem, version):
    path, tree = saved
    tree |= change | {"jaxgen": ABSENT if version is None else version}
    tree = {name: value for name, value in tree.items() if value is not ABSENT}
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError) as error:
        load_config(path.parent)
    here = f"this is {jaxgen.__version__})"
    said = {"0.0.9": f" (saved by jaxgen 0.0.9; {here}", None: f" (saved by a jaxgen that did not note its version; {here}"}
    assert str(error.value).startswith(f"{path}{said.get(version, '')}: {problem}")


def test_another_version_is_named_where_a_run_goes_on_with_another_configuration(saved):
    path, tree = saved
    path.write_text(json.dumps(tree | {"jaxgen": "0.0.9", "gone": 1}))
    text = r"config.json \(saved by jaxgen 0.0.9; this is .*\) is of another run: gone was 1 and is None"
    with pytest.raises(ValueError, match=text):
        save_config(path.parent, OptimConfig(lr=0.5))
    path.write_text("[]")
    with pytest.raises(ValueError, match=f"cannot read {path}: not a configuration"):
        load_config(path.parent)
