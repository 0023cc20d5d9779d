"""configs/stree.py: sizes, training, sampling and claim."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgen import cli
from jaxgen import config as config_lib

MODULE = cli.load_config_file(str(Path(__file__).parents[2] / "configs" / "stree.py"))


def test_variants_build_and_survive_json():
    for variant in MODULE.VARIANTS:
        recipe = MODULE.get_config(variant)
        assert config_lib.from_json(config_lib.to_json(recipe.config)) == recipe.config
        assert [stage.name for stage in recipe.stages] == ["generator", "draft"]
    with pytest.raises(ValueError, match="variant 'large' is not one of smoke, small, paper"):
        MODULE.get_config("large")
    bad = {"tree=2,0": r"tree=\(2, 0\)", "drafting.rule=k_seq": "without replacement", "ssm.expand=0": "ssm.expand=0"}
    for edit, error in bad.items():
        with pytest.raises(ValueError, match=error):
            recipe.override([edit])


def test_published_sizes():
    """Mamba2-2.7B has 2.7 billion weights; its two tables are one there."""
    config = MODULE.get_config("paper").config
    shapes = jax.eval_shape(config.build_model().init, jax.random.key(0), np.zeros((1, 4), np.int32))
    count = sum(x.size for x in jax.tree.leaves(shapes)) - config.model.vocab * config.model.width
    assert count / 1e9 == pytest.approx(2.70, abs=0.01)


@pytest.mark.slow
def test_trained_sampled_and_measured():
    claim = MODULE.claim("smoke", log=lambda line: None)[0]
    assert [row["positions a call"] for row in claim.rows] == [1, 3, 5, 5, 5]
    assert claim.rows[0]["tokens a target call"] == 1 and all(row["tokens a target call"] >= 1 for row in claim.rows)
    with pytest.raises(ValueError, match="budget 'none' is not one of smoke, small"):
        MODULE.claim("none")
