"""A generator's loss on cached tokens is its loss on the images that they were made of."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cspd, flexvar, var
from jaxgen.data import digits
from jaxgen.data.token_cache import TokenSource
from jaxgen.recipes import token_cache
from jaxgen.recipes.token_cache import cache_tokens, check_codes
from jaxgen.train import save_params, train


def smoke(module, folder=""):
    config = module.get_config("smoke").config.resolve()
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokens=str(folder)))


def random_stages(config, randomize):
    """Random parameters of the stages tokenizer and generator."""
    recipe, params = config.recipe(), {}
    for name in ("tokenizer", "generator"):
        shapes, _ = jax.eval_shape(recipe.stage(name).init, jax.random.key(0), params)
        params[name] = jax.device_put(randomize(shapes, seed=len(params)))
    return params


@pytest.fixture(scope="module")
def made(randomize, tmp_path_factory):
    """A next-scale recipe's configuration, parameters, and cache."""
    config, folder, lines = smoke(var), tmp_path_factory.mktemp("tokens"), []
    params = random_stages(config, randomize)
    cache_tokens(config, params, folder, batch_size=50, per_shard=700, log=lines.append)
    assert {"train: encoded 3 of 3 shards of 700 images", "test: encoded 1 of 1 shards of 700 images"} <= set(lines)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokens=str(folder))), params, folder


def test_losses_are_those_of_the_images(made):
    config, params, folder = made
    cached, plain = (c.recipe().stage("generator") for c in (config, dataclasses.replace(config, data=smoke(var).data)))
    batch = next(iter(cached.data(0, 1)))
    assert set(batch) == {"tokens", "view", "label"}
    source, train = TokenSource(str(folder / "train")), digits("train")
    where = {tuple(source[i]["tokens"][0]): i for i in range(len(source))}
    index = [where[tuple(tokens)] for tokens in batch["tokens"].tolist()]
    images = {"image": jnp.asarray(train.images[index]), "label": batch["label"]}
    args = (params["generator"], ())
    values = [jax.jit(stage.loss)(*args, b, jax.random.key(0), 0, params)[0] for stage, b in ((cached, batch), (plain, images))]
    assert values[0] == pytest.approx(float(values[1]), rel=1e-5) and values[0] > 0.5
    test = next(iter(cached.eval_data(0, 1)))
    got = jax.jit(cached.eval_loss)(*args, test, jax.random.key(0), params)
    assert np.isfinite(got["loss"])
    # Each host has its share of the same batch.
    halves = [next(iter(cached.data(i, 2)))["tokens"] for i in range(2)]
    assert sorted(np.concatenate(halves).tolist()) == sorted(batch["tokens"].tolist())


def test_another_tokenizer_is_refused(made):
    config, params, _ = made
    stage = config.recipe().stage("generator")
    stage.check(params)
    other = {**params, "tokenizer": jax.tree.map(lambda x: x * 1.001, params["tokenizer"])}
    with pytest.raises(ValueError, match="tokens of a tokenizer .* and not of this one"):
        stage.check(other)
    check_codes(dataclasses.replace(config.data, tokens=""), other)  # nothing to agree with


def test_a_cache_that_is_not_there(tmp_path):
    config = smoke(var, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="nowhere/train: no token cache"):
        config.recipe().stage("generator").data(0, 1)


def test_systems_that_make_their_own_tokens_say_so(tmp_path):
    with pytest.raises(ValueError, match="data.tokens=.*random lists of scales"):
        smoke(flexvar, tmp_path).recipe()


def test_continuous_tokens(randomize, tmp_path):
    config = smoke(cspd)
    cache_tokens(config, {}, tmp_path, splits=("test",), batch_size=60, log=lambda line: None)
    tokenizer = config.build_tokenizer()
    first = TokenSource(str(tmp_path / "test"))[4]["tokens"][0]
    image = jnp.asarray(digits("test").images[4:5]) / 127.5 - 1
    np.testing.assert_allclose(tokenizer.apply({}, image, method="encode")[0], first, atol=1e-6)
    stage = smoke(cspd, tmp_path).recipe().stage("generator")
    batch = next(iter(stage.eval_data(0, 1)))
    assert batch["tokens"].dtype == np.float32
    params, _ = jax.eval_shape(stage.init, jax.random.key(0), {})
    shapes = jax.eval_shape(stage.eval_loss, params, (), batch, jax.random.key(0), {})
    assert shapes["loss"].shape == ()


@pytest.mark.slow  # a training, however short, compiles its steps
def test_training_from_a_cache_never_decodes_an_image(made, tmp_path, monkeypatch):
    config, params, _ = made
    config = dataclasses.replace(
        config,
        tokenizer_train=dataclasses.replace(config.tokenizer_train, steps=0),
        model_train=dataclasses.replace(config.model_train, steps=3),
        classifier=dataclasses.replace(config.classifier, steps=0),
    )
    save_params(tmp_path, "tokenizer", params["tokenizer"])
    monkeypatch.setattr(token_cache, "image_batches", None)
    done = train(config.recipe(), tmp_path, log=lambda line: None)
    assert done["generator"].step == 3 and np.isfinite(done["generator"].metrics["loss"])
