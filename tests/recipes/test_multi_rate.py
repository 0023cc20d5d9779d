"""configs/m2r2.py: sizes, training, sampling and claims."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgen import cli
from jaxgen import config as config_lib
from jaxgen.recipes.multi_rate import expert_hits

MODULE = cli.load_config_file(str(Path(__file__).parents[2] / "configs" / "m2r2.py"))


def test_variants_build_and_survive_json():
    for variant in MODULE.VARIANTS:
        recipe = MODULE.get_config(variant)
        assert config_lib.from_json(config_lib.to_json(recipe.config)) == recipe.config
        assert [stage.name for stage in recipe.stages] == ["generator", "fast"]
    with pytest.raises(ValueError, match="variant 'large' is not one of smoke, small, experts, paper"):
        MODULE.get_config("large")


def test_published_sizes():
    """Gemma-7B has 8.5 billion weights; its heads of 256 are ours of 192."""
    config = MODULE.get_config("paper").config
    shapes = jax.eval_shape(config.build_model().init, jax.random.key(0), np.zeros((1, 4), np.int32))
    m = config.model
    by_hand = m.vocab * m.width + m.depth * (4 * m.width**2 + 3 * m.width * m.hidden)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == pytest.approx(by_hand, rel=1e-3)


@pytest.mark.slow
def test_the_claims_run():
    drafts, experts = MODULE.claim("smoke", log=lambda line: None)
    assert [row["method"] for row in drafts.rows] == ["plain", "early exit after 2", "fast stream"]
    assert experts.rows[0]["block"] == 2 and 0 <= experts.rows[0]["fast stream"] <= 1
    with pytest.raises(ValueError, match="budget 'none' is not one of smoke, small"):
        MODULE.claim("none")
    with pytest.raises(ValueError, match="model.experts=0"):
        expert_hits(MODULE.get_config("small").config, {}, limit=1)
