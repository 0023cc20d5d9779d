"""configs/multi_token.py: sizes, training, sampling and claim."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgen import cli
from jaxgen import config as config_lib
from jaxgen.train import train

MODULE = cli.load_config_file(str(Path(__file__).parents[2] / "configs" / "multi_token.py"))


def test_variants_build_and_survive_json():
    for variant in MODULE.VARIANTS:
        recipe = MODULE.get_config(variant)
        assert config_lib.from_json(config_lib.to_json(recipe.config)) == recipe.config
        assert [stage.name for stage in recipe.stages] == ["generator", "multi_token"]
    with pytest.raises(ValueError, match="variant 'large' is not one of smoke, small, paper"):
        MODULE.get_config("large")


def test_published_sizes():
    """Llama-3-8B has 8.03 billion weights."""
    config = MODULE.get_config("paper").config
    shapes = jax.eval_shape(config.build_model().init, jax.random.key(0), np.zeros((1, 4), np.int32))
    assert sum(x.size for x in jax.tree.leaves(shapes)) / 1e9 == pytest.approx(8.03, abs=0.01)
    added = jax.eval_shape(config.build_target().init, jax.random.key(0), shapes)
    assert added["adapters"]["transformer/blocks_0/attention/qkv"]["a"].shape == (4096, 128)


@pytest.mark.slow
def test_trained_and_sampled(tmp_path):
    recipe = MODULE.get_config("smoke")
    results = train(recipe, tmp_path, run=recipe.config.run, log=lambda line: None)
    params = {stage: result.params for stage, result in results.items()}
    out = recipe.sample(params, jax.random.key(0), ["In the"], length=20)
    assert out["length"].tolist() == [20] and bytes(out["tokens"][0, :6].astype(np.uint8)) == b"In the"
    assert {"loss", "nll", "nll_base", "distance", "accuracy_1", "accuracy_2"} <= results["multi_token"].metrics.keys()


@pytest.mark.slow
def test_the_claim_runs():
    (claim,) = MODULE.claim("smoke", log=lambda line: None)
    assert [row["method"] for row in claim.rows] == ["plain", "2 masks", "2 masks, coupled"] * 2
    assert all(row["tokens a target call"] == 1 for row in claim.rows[::3])
    with pytest.raises(ValueError, match="budget 'none' is not one of smoke, small"):
        MODULE.claim("none")
