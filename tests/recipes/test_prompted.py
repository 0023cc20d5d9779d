"""S018's recipe: its variants and baseline, the loss by hand, greedy samples, and what is refused."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import llamagen, vf_prompt
from jaxgen import config as config_lib
from jaxgen.data import pixels
from jaxgen.recipes.image_llama import ImageLlamaConfig
from jaxgen.recipes.prompted import unprompted
from jaxgen.recipes.retrieval import images_of

SHAPE = ("tokenizer.ch=4", "tokenizer.groups=2", "tokenizer.z_channels=4", "model_train.class_drop=0")


@pytest.mark.numeric
def test_stage_and_sampler(raster_recipe_agrees):
    raster_recipe_agrees(config_lib.override(vf_prompt.build("smoke"), SHAPE))


@pytest.mark.numeric
def test_prompts_of_the_class(randomize, batch):
    """The loss by hand, with the images that the stage keeps, and samples that follow the prompts which are given."""
    config = config_lib.override(vf_prompt.build("smoke"), (*SHAPE, "model.prompt=class", "class_images=300"))
    recipe, tokenizer, generator = config.recipe(), config.build_tokenizer(), config.build_generator()
    stage = recipe.stage("generator")
    abstract = jax.eval_shape(tokenizer.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    variables = jax.device_put(randomize(abstract))
    params = {"tokenizer": {"tokenizer": variables}}
    shapes, prompts = jax.eval_shape(stage.init, jax.random.key(0), params)
    params["generator"] = jax.device_put(randomize(shapes, seed=1))
    kept, encode = stage.fill(params), jax.jit(lambda x: tokenizer.apply(variables, x, method="encode"))
    assert jax.tree.map(jnp.shape, kept) == jax.tree.map(lambda x: x.shape, prompts) and kept.tokens.shape == (300, 16)
    images, labels = map(np.concatenate, zip(*images_of(config.data, (), 300)))
    for place, label in ((0, 0), (int(kept.first[7]) + 2, 7)):
        image = images[labels == label][place - int(kept.first[label])]
        np.testing.assert_array_equal(kept.tokens[place], encode(np.repeat(pixels(image[None]), 8, 0))[0])

    key, tokens, evaluate = jax.random.key(3), encode(pixels(batch["image"])), jax.jit(stage.eval_loss)
    cond = np.concatenate([batch["label"][:, None], kept.draw(key, batch["label"], tokens)], 1)
    logits = jax.jit(generator.apply)(params["generator"]["generator"], cond, tokens)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)
    got = evaluate(params["generator"], kept, batch, key, params)
    assert got["loss"] == pytest.approx(float(nll.mean()), rel=1e-5)
    # Training is the same likelihood: with one prompt to draw it does not depend on the key.
    one = kept._replace(tokens=jnp.broadcast_to(kept.tokens[:1], kept.tokens.shape))
    value, (_, state) = jax.jit(stage.loss)(params["generator"], one, batch, key, 0, params)
    assert value == pytest.approx(float(evaluate(params["generator"], one, batch, key, params)["loss"]), rel=1e-4)
    np.testing.assert_array_equal(state.tokens, one.tokens)

    def sample(**options):
        return recipe.sample(params, jax.random.key(0), np.asarray(batch["label"]), top_k=1, **options)

    made = sample()
    assert made["images"].shape == (8, 8, 8, 1)
    np.testing.assert_array_equal(sample(prompts=kept)["tokens"], made["tokens"])
    assert np.any(sample(prompts=one)["tokens"] != made["tokens"])


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
        ("model.prompt=images", "prompt='images' is not one of learned, codes, class"),
        ("model.prompt=class model.prompts=4", "prompts=4: a prompt of kind 'class' is an image, 16 tokens"),
        ("model.prompt=class data.tokens=cache", "data.tokens='cache': prompts of the kind 'class' are images"),
        ("class_images=1", "class_images=1: expected at least 2"),
        ("tokenizer.patch_nums=2,4", "next-token models take one scale"),
    ],
)
def test_bad_configurations(edit, message):
    with pytest.raises(ValueError, match=message):
        config_lib.override(vf_prompt.build("smoke"), edit.split())
    with pytest.raises(ValueError, match="variant 'd17' is not one of smoke"):
        vf_prompt.get_config("d17")
    with pytest.raises(ValueError, match="budget 'large' is not one of smoke, small"):
        vf_prompt.claim("large")


@pytest.mark.slow  # it trains a tokenizer, a classifier and three generators
def test_the_claim_at_its_smallest():
    (claim,) = vf_prompt.claim("smoke", seeds=1, log=lambda line: None)
    assert [row["vectors before the image"] for row in claim.rows] == [17, 17, 17, 1]
    assert all(0 < row["test nats a token"] < 2 * np.log(16) for row in claim.rows)
