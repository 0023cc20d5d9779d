"""configs/skip_decode.py and configs/ffn_skip.py: sizes, training, sampling and claims."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgen import cli
from jaxgen import config as config_lib
from jaxgen.train import train

CONFIGS = Path(__file__).parents[2] / "configs"
MODULES = {name: cli.load_config_file(str(CONFIGS / f"{name}.py")) for name in ("skip_decode", "ffn_skip")}


@pytest.mark.parametrize("name", MODULES)
def test_variants_build_and_survive_json(name):
    for variant in MODULES[name].VARIANTS:
        recipe = MODULES[name].get_config(variant)
        assert config_lib.from_json(config_lib.to_json(recipe.config)) == recipe.config and recipe.modality == "text"
    with pytest.raises(ValueError, match="variant 'large' is not one of smoke, small, paper"):
        MODULES[name].get_config("large")


@pytest.mark.parametrize("name, millions", [("skip_decode", 1815), ("ffn_skip", 6738)])
def test_published_sizes(name, millions):
    """Counted by hand: blocks 4 d^2 + 3 d h, two tables; SwiGLU has one matrix more than OPT's MLP."""
    config = MODULES[name].get_config("paper").config
    shapes = jax.eval_shape(config.build_model().init, jax.random.key(0), np.zeros((1, 4), np.int32))
    count = sum(x.size for x in jax.tree.leaves(shapes)) / 1e6
    m = config.model
    by_hand = m.depth * (4 * m.width**2 + 3 * m.width * m.hidden) + 2 * m.vocab * m.width
    assert count == pytest.approx(by_hand / 1e6, rel=1e-3) and count == pytest.approx(millions, rel=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_trained_sampled_and_measured(name, tmp_path):
    recipe = MODULES[name].get_config("smoke")
    results = train(recipe, tmp_path, run=recipe.config.run, log=lambda line: None)
    params = {stage: result.params for stage, result in results.items()}
    out = recipe.sample(params, jax.random.key(0), ["In the"], length=20)
    assert out["length"].tolist() == [20] and bytes(out["tokens"][0, :6].astype(np.uint8)) == b"In the"
    (claim,) = MODULES[name].claim("smoke", log=lambda line: None)
    assert claim.rows[0]["method"] == "plain" and len(claim.rows) >= 2 and np.isfinite(claim.rows[1]["test nll"])
    with pytest.raises(ValueError, match="budget 'none' is not one of smoke, small"):
        MODULES[name].claim("none")
