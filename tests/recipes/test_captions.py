"""LlamaGen of captions as a recipe: the loss by hand, guidance, prompts, measures, and what is refused."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType

from configs import llamagen_captions
from jaxgen import config as config_lib
from jaxgen.data import World, WorldConfig, pixels
from jaxgen.data.captions import caption_array
from jaxgen.nn import Context
from jaxgen.recipes.caption_quality import caption_likelihoods, evaluate_captions, world_agreement
from jaxgen.train.mesh import AXES, shardings

CONFIG = config_lib.override(llamagen_captions.build("smoke"), ["model_train.class_drop=0.5", "model.width=24"])
WORLD = World(WorldConfig(height=16, width=16), "test")


@pytest.fixture(scope="module")
def system(randomize):
    """(Recipe, random parameters by stage)."""
    recipe = CONFIG.recipe()
    shapes = jax.eval_shape(CONFIG.build_tokenizer().init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    params = {"tokenizer": {"tokenizer": jax.device_put(randomize(shapes))}}
    shapes, _ = jax.eval_shape(recipe.stage("generator").init, jax.random.key(0), params)
    return recipe, params | {"generator": jax.device_put(randomize(shapes, seed=1))}


@pytest.fixture(scope="module")
def batch():
    said = [WORLD.caption(i) for i in range(8)]
    return {"image": np.stack([WORLD[i]["image"] for i in range(8)]), "caption": caption_array(said, 120)}


@jax.jit
def words_and_logits(params, tokens, captions, dropped):
    words = CONFIG.build_text().apply(params["text"], captions)
    generator = CONFIG.build_generator()
    told = generator.apply(params["generator"], words, dropped, method="drop")
    return words, generator.apply(params["generator"], told, tokens)


def nll(logits, tokens):
    return -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits), np.float64), tokens[..., None], -1)[..., 0].mean(1)


@pytest.mark.numeric
def test_the_loss_drops_whole_captions(system, batch):
    recipe, params = system
    stage, own = recipe.stage("generator"), params["generator"]
    tokenizer = CONFIG.build_tokenizer()
    tokens = np.asarray(tokenizer.apply(params["tokenizer"]["tokenizer"], pixels(batch["image"]), method="encode"))
    assert set(own) == {"generator", "text"}
    told, untold = (nll(words_and_logits(own, tokens, batch["caption"], np.full(8, drop))[1], tokens) for drop in (False, True))
    # Some rows without their caption, the others with it; and what is learnt is the text encoder, too.
    grad = jax.jit(jax.grad(lambda own, key: stage.loss(own, (), batch, key, 0, params)[0]))(own, jax.random.key(3))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves((grad["text"], grad["generator"]["params"]["no_caption"])))
    loss, losses = jax.jit(lambda key: stage.loss(own, (), batch, key, 0, params)[0]), set()
    choices = {round(float(np.where(np.array(mask), untold, told).mean()), 4) for mask in np.ndindex((2,) * 8)}
    for seed in range(4):
        losses.add(round(float(loss(jax.random.key(seed))), 4))
    assert len(losses) > 1 and all(min(abs(found - choice) for choice in choices) < 2e-4 for found in losses)
    value = jax.jit(lambda: stage.eval_loss(own, (), batch, jax.random.key(0), params))()
    assert value["loss"] == pytest.approx(told.mean(), rel=1e-4)


@pytest.mark.numeric
def test_prompts_of_any_length_share_a_program(system):
    recipe, params = system
    captions = recipe.prompts(["a", "one red circle; " * 6 + "no crosses"])
    made = recipe.sample(params, jax.random.key(0), captions, cfg=2.0, top_k=1)
    sampler = CONFIG.build_sampler()
    before = type(sampler)._sample._cache_size()
    recipe.sample(params, jax.random.key(0), recipe.prompts(["no", "one"]), cfg=1.0)
    assert type(sampler)._sample._cache_size() == before
    # Greedy tokens are what guided logits say of them.
    tokens = np.asarray(made["tokens"])
    logits = [words_and_logits(params["generator"], tokens, captions, np.full(2, drop))[1] for drop in (False, True)]
    np.testing.assert_array_equal((3 * logits[0] - 2 * logits[1]).argmax(-1), tokens)
    words = words_and_logits(params["generator"], tokens, captions, np.full(2, False))[0]
    assert isinstance(words, Context) and words.mask.sum(1).tolist() == [1, 14]
    with pytest.raises(ValueError, match="prompt: 'aaa.*' has 121 bytes; expected at most 120"):
        recipe.prompts(["a" * 121])


@pytest.mark.numeric
def test_measures(system, monkeypatch):
    recipe, params = system
    result, images = evaluate_captions(recipe, params, jax.random.key(0), num=6, batch_size=4, settings={}, limit=20)
    assert images.shape == (6, 16, 16, 3) and result["reconstruction"]["images"] == result["likelihood"]["images"] == 20
    agreement = result["generation"]["agreement"]
    assert set(agreement) == {"samples", "reconstructions", "real"} and agreement["real"]["right"] == 1
    variables = {name: tree for stage in params.values() for name, tree in stage.items()}
    found = caption_likelihoods(CONFIG, variables, limit=4)
    other = caption_likelihoods(CONFIG, variables | {"text": jax.tree.map(jnp.zeros_like, variables["text"])}, limit=4)
    assert found["nll"] != found["nll_shuffled"] and found["images"] == 4
    assert other["nll"] == pytest.approx(other["nll_shuffled"], abs=0.02)  # what is left is how long a caption is


def test_agreement():
    pictures = [WORLD.example(i) for i in range(30)]
    images, said = np.stack([p["picture"]["image"] for p in pictures]), [str(p["caption"]) for p in pictures]
    right = world_agreement(images, said)
    assert right["right"] == 1 and right["attributes"]["colour"]["right"] == 1
    by_hand = [p["caption"].holds(q["scene"]) for p, q in zip(pictures, [pictures[-1], *pictures[:-1]])]
    assert right["shuffled"] == pytest.approx(np.mean(by_hand)) and 0 < right["shuffled"] < 0.6
    assert world_agreement(np.roll(images, 1, axis=0), said)["right"] == pytest.approx(right["shuffled"])
    with pytest.raises(ValueError, match="30 images and 1 captions"):
        world_agreement(images, said[:1])


@pytest.mark.parametrize("variant", llamagen_captions.VARIANTS)
def test_every_variant_builds_and_survives_json(variant):
    config = llamagen_captions.get_config(variant).config
    assert config_lib.from_json(config_lib.to_json(config)) == config
    assert config.build_tokenizer().image_size == (config.data.image_size,) * 2
    if variant == "paper":
        # LlamaGen-XL, with the projection of captions in place of classes.
        shapes = config.build_generator().param_shapes()["params"]
        size, d = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)), 1280
        assert size == 36 * (4 * d * d + 3 * d * 3584 + 2 * d) + 2 * 16384 * d + d + 2048 * d + d * d + 120 * 2048


def test_the_text_encoder_is_placed():
    config = llamagen_captions.build("paper")
    stage = config.recipe().stage("generator")
    inputs = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    shapes = jax.eval_shape(config.init_generator, jax.random.key(0), inputs)
    mesh = AbstractMesh((1, 2, 4, 1), AXES, axis_types=(AxisType.Auto,) * 4)
    blocks = shardings(mesh, shapes, stage.rules)["text"]["params"]["blocks"]["blocks_0"]
    kernels = (blocks["attention"]["qkv"], blocks["attention"]["proj"], blocks["mlp"]["fc1"], blocks["mlp"]["fc2"])
    assert all({"fsdp", "tensor"} <= set(kernel["kernel"].spec) for kernel in kernels)


@pytest.mark.parametrize(
    "edit, message",
    [
        ("data.captions=0", "data.captions=0: expected the bytes of the longest caption, a multiple of text.stride=8"),
        ("data.captions=12", "data.captions=12: expected"),
        ("text.stride=0", "text.stride=0: expected at least 1"),
        ("text.heads=3", "text.heads=3 does not divide text.width=16"),
        ("text.dtype=int8", "text.dtype='int8'"),
        ("classifier.steps=1", "classifier.steps=1: samples of captions have no classes"),
    ],
)
def test_bad_configurations(edit, message):
    with pytest.raises(ValueError, match=message):
        config_lib.override(CONFIG, [edit])
    with pytest.raises(ValueError, match="variant 'd17' is not one of smoke, small, paper"):
        llamagen_captions.get_config("d17")


def test_data_that_do_not_fit():
    assert CONFIG.resolve() == CONFIG
    data = dataclasses.replace(CONFIG.data, path="digits")
    with pytest.raises(ValueError, match=r"data.captions=120: digits\[0\] has no caption"):
        dataclasses.replace(CONFIG, data=data).resolve()
    with pytest.raises(ValueError, match="images of 32x32"):
        config_lib.override(CONFIG, ["data.image_size=32"]).resolve()


@pytest.mark.numeric
def test_what_captions_say_is_learnt():
    """A few captions of several lengths, each with an image of its own, by the stage's own loss; then sampled."""
    config = config_lib.override(llamagen_captions.build("smoke"), ["model.width=32"])
    recipe, rng = config.recipe(), np.random.default_rng(0)
    stage = recipe.stage("generator")
    said = ["a", "one red circle", "one blue circle", "a circle above a cross", "a cross above a circle", "no crosses"]
    batch = {"caption": recipe.prompts(said), "tokens": jnp.asarray(rng.integers(0, 16, (6, 16)), jnp.int32)}
    shapes = jax.eval_shape(config.build_tokenizer().init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    frozen = {"tokenizer": {"tokenizer": jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)}}
    params, _ = jax.jit(stage.init)(jax.random.key(0), frozen)
    steps = 300
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    @jax.jit
    def train(params):
        def step(i, carry):
            params, state = carry
            grad = jax.grad(lambda p: stage.loss(p, (), batch, jax.random.key(i), i, frozen)[0])(params)
            updates, state = optimizer.update(grad, state)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, steps, step, (params, optimizer.init(params)))[0]

    trained = frozen | {"generator": train(params)}
    made = recipe.sample(trained, jax.random.key(0), batch["caption"], cfg=1.0, top_k=1)
    np.testing.assert_array_equal(made["tokens"], batch["tokens"])
