"""configs/any_subset.py: sizes, training, sampling and claim."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import cli
from jaxgen import config as config_lib
from jaxgen.recipes.any_subset import SubsetConfig
from jaxgen.recipes.claims import reuse, trained

MODULE = cli.load_config_file(str(Path(__file__).parents[2] / "configs" / "any_subset.py"))


def test_variants_build_and_survive_json():
    for variant in MODULE.VARIANTS:
        recipe = MODULE.get_config(variant)
        assert config_lib.from_json(config_lib.to_json(recipe.config)) == recipe.config
        assert [stage.name for stage in recipe.stages] == ["generator"]
    with pytest.raises(ValueError, match="variant 'large' is not one of smoke, small, paper"):
        MODULE.get_config("large")


def test_published_sizes():
    """XLNet-base: 32,000 tokens and 12 blocks of 768; its 117 million weights have one more projection a block."""
    config = MODULE.get_config("paper").config
    (params, _) = jax.eval_shape(config.recipe().stages[0].init, jax.random.key(0), {})
    d, block = 768, 4 * 768**2 + 3 * 768 * 2048 + 2 * 768
    total = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    assert total == 32000 * d + 12 * block + d + d  # embedding, blocks, the last norm, the question
    assert total + 12 * d**2 == pytest.approx(117e6, rel=0.01)
    assert (config.model_train.steps * config.model_train.batch_size, config.data.length + 1) == (120_000_000, 512)


@pytest.mark.slow
def test_what_is_hidden_grows():
    hidden = SubsetConfig(hidden=(0.6, 0.75), warmup=100)
    for step, want in ((0, (0.15, 0.15)), (50, (0.375, 0.45)), (1000, (0.6, 0.75))):
        np.testing.assert_allclose(hidden.range(jnp.int32(step)), want, atol=1e-6)
    np.testing.assert_allclose(SubsetConfig().range(jnp.int32(0)), (0.25, 0.95))
    for bad in (dict(hidden=(0.7, 0.6)), dict(hidden=(0.5,)), dict(ahead=1.5), dict(warmup=-1)):
        with pytest.raises(ValueError, match=f"subset.{next(iter(bad))}="):
            SubsetConfig(**bad)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the smoke model is kept, so that it is trained once."""
    return tmp_path_factory.mktemp("any_subset")


@pytest.mark.slow
def test_trained_and_sampled(folder):
    """Blanks are filled and the end is continued; what was given stays."""
    with reuse(folder):
        recipe, params = trained(MODULE.get_config("smoke").config, 0, lambda line: None)
    out = recipe.sample(params, jax.random.key(0), ["In t_e", "a_"], length=9)
    calls = np.asarray(out["row_calls"])
    assert out["tokens"].shape == (2, 9) and out["length"].tolist() == [9, 9]
    assert bytes(out["tokens"][0, :4].astype(np.uint8)) == b"In t" and out["tokens"][0, 5] == ord("e")
    assert out["tokens"][1, 0] == ord("a") and (1 < calls).all() and (calls <= [4, 8]).all()
    kept = recipe.sample(params, jax.random.key(0), ["In t_e", "a_"], length=9, blank="")
    assert bytes(kept["tokens"][1, :2].astype(np.uint8)) == b"a_"
    with pytest.raises(ValueError, match="length=5: a prompt has 6 bytes"):
        recipe.sample(params, jax.random.key(0), ["In t_e"], length=5)
    with pytest.raises(ValueError, match="blank='__'"):
        recipe.sample(params, jax.random.key(0), ["In t_e"], length=9, blank="__")
    row = json.loads(next(folder.rglob("metrics.jsonl")).read_text().splitlines()[-1])
    assert all(4 < value < 7 for name, value in row.items() if name.endswith(("loss", "nll", "nll_ahead")))
    assert any(name.endswith("nll_ahead") for name in row)


@pytest.mark.slow
def test_the_claim_runs(folder):
    with reuse(folder):
        (claim,) = MODULE.claim("smoke", log=lambda line: None)
    text, plain, *others = claim.rows
    assert text["method"] == "(the text itself)" and plain["calls"] == plain["tokens"] and plain["drafting calls"] == 0
    assert [row["method"] for row in others] == ["ASSD, k=3", "ASSD, k=3, coupled", "bigrams, k=3"]
    assert all(row["calls"] <= plain["calls"] for row in others)
    # Coupled drafts give the tokens of one at a time.
    assert others[1]["nats a token"] == plain["nats a token"]
    with pytest.raises(ValueError, match="budget 'none' is not one of smoke, small"):
        MODULE.claim("none")
