"""S018's recipe: its variants and baseline, the loss by hand, greedy samples, and what is refused."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from configs import llamagen, vf_prompt
from jaxgen import config as config_lib
from jaxgen.recipes.image_llama import ImageLlamaConfig
from jaxgen.recipes.prompted import unprompted

SHAPE = ("tokenizer.ch=4", "tokenizer.groups=2", "tokenizer.z_channels=4", "model_train.class_drop=0")


@pytest.mark.numeric
def test_stage_and_sampler(raster_recipe_agrees):
    raster_recipe_agrees(config_lib.override(vf_prompt.build("smoke"), SHAPE))


@pytest.mark.parametrize("variant", vf_prompt.VARIANTS)
def test_every_variant_builds_and_survives_json(variant):
    """A prompt is as long as the image, and all that it adds to the model."""
    config = vf_prompt.get_config(variant).config
    assert config_lib.from_json(config_lib.to_json(config)) == config
    ours, base = config.build_generator(), llamagen.build(variant).build_generator()
    assert ours.told == 1 + ours.length and ours.prompts == config.tokenizer.patch_nums[0] ** 2
    sizes = [sum(math.prod(x.shape) for x in jax.tree.leaves(model.param_shapes())) for model in (ours, base)]
    assert sizes[0] - sizes[1] == ours.length * ours.width
    assert config.build_sampler().generator == ours


def test_the_baseline_is_llamagen():
    ours = vf_prompt.build("demo")
    other = unprompted(ours)
    assert type(other) is ImageLlamaConfig and other.model == llamagen.build("demo").model
    assert dataclasses.replace(other, model_train=llamagen.build("demo").model_train) == llamagen.build("demo")


@pytest.mark.parametrize(
    "edit, message",
    [
        ("model.prompts=0", "prompts=0: expected at least 1"),
        ("model.prompt=images", "prompt='images' is not one of learned, codes"),
        ("tokenizer.patch_nums=2,4", "next-token models take one scale"),
    ],
)
def test_bad_configurations(edit, message):
    with pytest.raises(ValueError, match=message):
        config_lib.override(vf_prompt.build("smoke"), [edit])
    with pytest.raises(ValueError, match="variant 'd17' is not one of smoke"):
        vf_prompt.get_config("d17")
    with pytest.raises(ValueError, match="budget 'large' is not one of smoke, small"):
        vf_prompt.claim("large")


@pytest.mark.slow  # it trains a tokenizer, a classifier and three generators
def test_the_claim_at_its_smallest():
    (claim,) = vf_prompt.claim("smoke", seeds=1, log=lambda line: None)
    assert [row["vectors before the image"] for row in claim.rows] == [17, 17, 1]
    assert all(0 < row["test nats a token"] < 2 * np.log(16) for row in claim.rows)
