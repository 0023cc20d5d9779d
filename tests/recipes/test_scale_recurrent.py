"""configs/m_var.py: sizes, bad input, and the systems that its claim compares."""

import math
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from jaxgen import cli
from jaxgen import config as config_lib
from jaxgen.recipes import claims
from jaxgen.recipes.next_scale import RULES
from jaxgen.recipes.next_scale_costs import parameters
from jaxgen.train import train
from jaxgen.train.mesh import AXES, path_name, shardings

pytestmark = pytest.mark.usefixtures("quick_compiles")

M_VAR = cli.load_config_file(str(Path(__file__).parents[2] / "configs" / "m_var.py"))

# Depth, parameters in millions (the paper; it calls the largest d32), epochs, batch, alng, final learning rate and weight decay
# (the authors' README and the defaults of their arguments, which are VAR's).
PUBLISHED = {
    "d12": (12, 199, 200, 768, 1e-3, 0.1, 0.05),
    "d16": (16, 464, 200, 768, 1e-3, 0.1, 0.05),
    "d20": (20, 900, 250, 768, 1e-3, 0.1, 0.05),
    "d24": (24, 1550, 350, 768, 1e-4, 0.01, 0.05),
    "d30": (30, 3000, 350, 1024, 1e-5, 0.01, 0.08),
}


@pytest.mark.parametrize("variant", M_VAR.VARIANTS)
def test_every_variant_builds_and_survives_json(variant):
    config = M_VAR.get_config(variant).config
    assert config_lib.from_json(config_lib.to_json(config)) == config
    no_decay = config.model_train.optim.no_decay
    assert {"mixer/A_log", "mixer/D", "position", "log_scale"} <= set(no_decay)


@pytest.mark.parametrize("variant", PUBLISHED)
def test_published_models(variant):
    depth, millions, epochs, batch, gate_init, lr_end, decay_end = PUBLISHED[variant]
    config = M_VAR.get_config(variant).config
    generator = config.build_generator()
    assert (generator.depth, generator.width, generator.heads) == (depth, 64 * depth, depth)
    assert (generator.state_size, generator.state_head, generator.expand, generator.conv_size) == (64, 64, 2, 4)
    assert generator.l2_norm == (depth > 20) and generator.gate_init == gate_init
    assert generator.drop_path_rate == pytest.approx(0.1 * depth / 24)
    assert parameters(generator.param_shapes(32)) / 1e6 == pytest.approx(millions, rel=0.01)
    train_config = config.model_train
    assert (train_config.batch_size, train_config.optim.lr_end) == (batch, lr_end)
    assert train_config.optim.weight_decay_end == decay_end
    assert train_config.steps == epochs * math.ceil(1_281_167 / batch)
    if variant == "d24":
        assert M_VAR.get_config("paper").config == config


def test_large_parameters_are_split_over_every_axis():
    shapes = M_VAR.get_config("d16").config.build_generator().param_shapes(32)
    mesh = AbstractMesh((1, 4, 2, 1), AXES, axis_types=(AxisType.Auto,) * 4)
    placed = jax.tree_util.tree_leaves_with_path(shardings(mesh, shapes, RULES))
    kernels = {path_name(path): s for path, s in placed if "/blocks/" in path_name(path) and path_name(path).endswith("kernel")}
    for name, sharding in kernels.items():
        axes = {axis for entry in sharding.spec if entry for axis in ([entry] if isinstance(entry, str) else entry)}
        assert axes == (set() if "conv" in name else {"fsdp", "tensor"}), name


def test_bad_input():
    for edit, message in (
        ("mixer.state_size=0", "mixer.state_size=0: expected at least 1"),
        ("mixer.state_head=24", "mixer.state_head=24: does not divide 32, which is mixer.expand=2 times the width"),
    ):
        with pytest.raises(ValueError, match=message):
            M_VAR.get_config("smoke").override([edit])
    with pytest.raises(ValueError, match="variant 'large' is not one of smoke, demo"):
        M_VAR.get_config("large")
    with pytest.raises(ValueError, match="budget 'huge' is not one of smoke, small"):
        M_VAR.claim("huge")


def test_the_claim_compares_equal_sizes(monkeypatch):
    seen = {}

    def compare(systems, **kwargs):
        seen.update(systems=systems, **kwargs)

    monkeypatch.setattr(claims, "compare_generators", compare)
    monkeypatch.setattr(M_VAR, "_published_costs", lambda sizes, log: sizes)
    M_VAR.claim("small", seeds=2, edits=["model_train.steps=7"])
    theirs, ours = seen["systems"].values()
    assert seen["seeds"] == 2 and ours.model_train == theirs.model_train and ours.model_train.steps == 7
    assert ours.tokenizer == theirs.tokenizer and ours.data == theirs.data
    sizes = [parameters(config.build_generator().param_shapes(config.tokenizer.width)) for config in (theirs, ours)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.03)
    assert type(theirs.build_generator()).__name__ == "NextScaleTransformer"


@pytest.mark.slow
def test_smoke_trains_and_samples(tmp_path):
    """The stages after one another, and a picture at the end: compiling them all takes most of a minute."""
    recipe = M_VAR.get_config("smoke")
    results = train(recipe, tmp_path, run=recipe.config.run, log=lambda line: None)
    params = {name: result.params for name, result in results.items()}
    out = recipe.sample(params, jax.random.key(0), np.array([1, 2], np.int32))
    assert out["images"].shape == (2, 8, 8, 1) and np.isfinite(out["images"]).all()
    assert np.isfinite(results["generator"].metrics["nll"])
