"""S152's recipe: the loss by hand, greedy samples, its variants, what is compared, and what is refused."""

import math

import jax
import numpy as np
import pytest

from configs import elm
from jaxgen import config as config_lib
from jaxgen.recipes import claims
from jaxgen.recipes.sub_vocabulary import compare_parts

SHAPE = ("tokenizer.ch=4", "tokenizer.groups=2", "tokenizer.z_channels=4", "model_train.class_drop=0")

# In millions, with a vocabulary of 2^10 or 2^12 twice; their names for the sizes, "2B" rounded.
PUBLISHED_M = {"paper": 310, "xl": 730, "xxl": 1400, "2b": 1900}


@pytest.mark.numeric
def test_stage_and_sampler(raster_recipe_agrees):
    raster_recipe_agrees(config_lib.override(elm.build("smoke"), SHAPE))


@pytest.mark.parametrize("variant", elm.VARIANTS)
def test_every_variant_builds_and_survives_json(variant):
    config = elm.get_config(variant).config
    assert config_lib.from_json(config_lib.to_json(config)) == config
    generator, tokenizer = config.build_generator(), config.build_tokenizer()
    assert config.build_sampler().generator == generator and generator.vocab == tokenizer.vocab
    assert tokenizer.image_size == (config.data.image_size or 8,) * 2
    if variant in elm.PUBLISHED:
        size = sum(math.prod(x.shape) for x in jax.tree.leaves(generator.param_shapes()))
        d, layers, v = config.model.width, config.model.depth, generator.vocab
        block = 4 * d * d + 3 * d * config.model.hidden + 2 * d
        assert size == layers * block + 4 * v * d + 2 * d * d + 1001 * d + d
        assert size / 1e6 == pytest.approx(PUBLISHED_M[variant], rel=0.05)


def test_one_tokenizer_serves_all_parts(monkeypatch):
    seen = {}
    monkeypatch.setattr(claims, "compare_generators", lambda systems, **kwargs: seen.update(systems) or claims.Claim("", [], ""))
    compare_parts(elm.build("demo"), (2, 3, 1), seeds=1, samples=1, log=print)
    assert list(seen) == ["S152 ELM, 2 of 6 bits", "S152 ELM, 3 of 4 bits", "baseline, one softmax of 12 bits"]
    assert [config.build_generator().vocab for config in seen.values()] == [64, 16, 4096]
    assert len({claims._tokenizer_key(config) for config in seen.values()}) == 1
    assert all(config.build_generator().order.steps == 16 for config in seen.values())


@pytest.mark.parametrize(
    "edit, message",
    [
        ("model.parts=3", "bits=4, parts=3: expected a number of parts that divides the bits"),
        ("model.parts=0", "model.parts=0"),
        ("tokenizer.bits=0", "tokenizer.bits=0"),
        ("tokenizer.code=plain", "code='plain' is not one of bernoulli, spherical"),
        ("tokenizer.patch_nums=2,4", "next-token models take one scale"),
        ("tokenizer.penalty=-1", "tokenizer.penalty=-1"),
        ("tokenizer_train.revive_every=5", "tokenizer_train.revive_every=5: bits are no codes to revive, set 0"),
    ],
)
def test_bad_configurations(edit, message):
    with pytest.raises(ValueError, match=message):
        config_lib.override(elm.build("smoke"), [edit])
    with pytest.raises(ValueError, match="variant 'd17' is not one of smoke"):
        elm.get_config("d17")
    with pytest.raises(ValueError, match="budget 'large' is not one of smoke, small"):
        elm.claim("large")


@pytest.mark.slow  # it trains a tokenizer, a classifier and two generators
def test_the_claim_at_its_smallest():
    (claim,) = elm.claim("smoke", seeds=1, log=lambda line: None)
    assert [row["vocabulary"] for row in claim.rows] == ["2 x 4", "1 x 16"]
    assert [row["model calls"] for row in claim.rows] == [16, 16]
    assert all(0 < row["test nats an image"] < 2 * 16 * np.log(16) for row in claim.rows)
