"""The module, and the stage that trains it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen.nn.classifier import Classifier


@pytest.fixture(scope="module")
def small():
    """A model and random variables, in which nothing hides behind an initial zero."""
    model, rng = Classifier(num_classes=5, width=8), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4, 4, 1)))
    return model, jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), shapes)


@pytest.mark.parametrize("shape", [(2, 8, 8, 1), (1, 28, 28, 1), (1, 64, 48, 3)])
def test_any_image_size_takes_the_same_parameters(shape):
    model = Classifier(num_classes=7, width=8)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4, 4, shape[-1])))
    assert jax.eval_shape(model.apply, variables, images).shape == (shape[0], 7)
    features = functools.partial(model.apply, method="features")
    assert jax.eval_shape(features, variables, images).shape == (shape[0], 32)
    chex.assert_trees_all_equal_shapes(variables, jax.eval_shape(model.init, jax.random.key(0), images))


def test_logits_are_a_linear_map_of_the_features(small):
    model, variables = small
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    features = np.asarray(jax.jit(functools.partial(model.apply, method="features"))(variables, images), np.float64)
    head = variables["params"]["head"]
    want = features @ np.asarray(head["kernel"], np.float64) + np.asarray(head["bias"])
    np.testing.assert_allclose(jax.jit(model.apply)(variables, images), want, atol=1e-5)


def test_each_image_is_judged_alone(small):
    model, variables = small
    images = jax.random.normal(jax.random.key(2), (4, 8, 8, 1))
    apply = jax.jit(model.apply)
    logits, others = apply(variables, images), apply(variables, images.at[1:].multiply(-2))
    np.testing.assert_allclose(logits[0], others[0], atol=1e-5)
    assert float(jnp.abs(logits[1:] - others[1:]).min(axis=0).max()) > 1e-3


def test_fields_change_what_they_name(small):
    _, variables = small
    images = jax.random.normal(jax.random.key(3), (2, 8, 8, 1))

    def shapes(**kwargs):
        tree = jax.eval_shape(Classifier(**{"num_classes": 5, "width": 8} | kwargs).init, jax.random.key(0), images)
        return jax.tree.map(lambda x: x.shape, tree["params"])

    assert shapes()["head"]["kernel"] == (32, 5)
    assert shapes(width=16, num_classes=3)["head"]["kernel"] == (64, 3)
    assert shapes(levels=2)["head"]["kernel"] == (16, 5)
    assert "level2_block1" in shapes(blocks=2)["trunk"] and "level2_block1" not in shapes()["trunk"]
    exact, half = (
        jax.jit(Classifier(num_classes=5, width=8, dtype=dtype).apply)(variables, images) for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert half.dtype == jnp.float32 and 1e-5 < float(jnp.abs(half - exact).max()) < 0.1


def test_dropout_is_for_training_only(small):
    plain, variables = small
    model, images = plain.clone(dropout=0.5), jax.random.normal(jax.random.key(4), (2, 8, 8, 1))

    def train(seed):
        return model.apply(variables, images, train=True, rngs={"dropout": jax.random.key(seed)})

    np.testing.assert_array_equal(model.apply(variables, images), plain.apply(variables, images))
    assert float(jnp.abs(train(0) - train(1)).max()) > 1e-3


def test_bad_images_and_fields(small):
    model, variables = small
    with pytest.raises(ValueError, match="uint8"):
        model.apply(variables, jnp.zeros((1, 8, 8, 1), jnp.uint8))
    with pytest.raises(ValueError, match=r"\(8, 8, 1\)"):
        model.apply(variables, jnp.zeros((8, 8, 1)))
    with pytest.raises(ValueError, match="8x3: levels=3 needs 4"):
        model.apply(variables, jnp.zeros((1, 8, 3, 1)))
    for field, value in (("width", 12), ("num_classes", 0), ("levels", 0), ("blocks", 0)):
        bad = Classifier(**{"num_classes": 5, "width": 8} | {field: value})
        with pytest.raises(ValueError, match=f"{field}={value}"):
            bad.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))


def test_random_shift_is_one_of_the_nine_moves():
    from jaxgen.recipes.classifier import random_shift

    images = np.random.default_rng(0).uniform(-1, 1, (40, 5, 4, 2)).astype(np.float32)
    moved = np.asarray(random_shift(jax.random.key(0), jnp.asarray(images), 1))
    seen = set()
    for image, got in zip(images, moved):
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                y, x = np.clip(np.arange(5) + dy, 0, 4), np.clip(np.arange(4) + dx, 0, 3)
                if np.array_equal(got, image[y][:, x]):
                    seen.add((dy, dx))
                    break
            else:
                continue
            break
        else:
            raise AssertionError("not a shifted copy")
    assert len(seen) == 9
    np.testing.assert_array_equal(random_shift(jax.random.key(0), jnp.asarray(images), 0), images)


def run(stage, steps):
    """A plain loop over the stage: (params, losses)."""
    params, state = jax.jit(stage.init)(jax.random.key(0), {})
    opt_state = stage.optimizer.init(params)

    @jax.jit
    def update(params, opt_state, state, batch, key, step):
        grad = jax.value_and_grad(stage.loss, has_aux=True)
        (value, (metrics, state)), grads = grad(params, state, batch, key, step, {})
        updates, opt_state = stage.optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, state, value, metrics

    losses, batches = [], iter(stage.data(0, 1))
    for step in range(steps):
        key = jax.random.fold_in(jax.random.key(1), step)
        batch = {name: jnp.asarray(x) for name, x in next(batches).items()}
        params, opt_state, state, value, metrics = update(params, opt_state, state, batch, key, step)
        assert metrics["accuracy"].shape == ()
        losses.append(float(value))
    return params, losses


def test_stage_learns_held_out_digits():
    pytest.importorskip("sklearn")
    from jaxgen.data import DataConfig
    from jaxgen.recipes.classifier import classifier_stage

    config = DataConfig(path="digits", image_size=0, channels=1)
    stage = classifier_stage(config, num_classes=10, width=8, steps=80, batch_size=64, lr=1e-2)
    params, losses = run(stage, stage.steps)
    # Zero head: the first loss is that of a uniform guess.
    assert losses[0] == pytest.approx(np.log(10), abs=1e-5)
    evaluate = jax.jit(lambda batch: stage.eval_loss(params, (), batch, jax.random.key(0), {}))
    held_out = [evaluate({k: jnp.asarray(x) for k, x in batch.items()}) for batch in stage.eval_data(0, 1)]
    # Chance is 0.1; 80 steps of a narrow network reach about 0.84, and the defaults 0.98.
    assert np.mean([m["accuracy"] for m in held_out]) > 0.7
    assert np.mean([m["loss"] for m in held_out]) < 0.4 * np.log(10)


def test_stage_arguments():
    pytest.importorskip("sklearn")
    from jaxgen.data import DataConfig
    from jaxgen.recipes.classifier import classifier_stage

    config = DataConfig(path="digits", image_size=0, channels=1)
    stage = classifier_stage(config, num_classes=10, width=8, steps=7, batch_size=6, lr=0.5, shift=0, name="judge")
    assert (stage.name, stage.steps, stage.needs) == ("judge", 7, ())
    batch = next(iter(stage.data(0, 1)))
    assert batch["image"].shape == (6, 8, 8, 1)

    # A random head, since the initial one gives the same loss to any image.
    shapes, state = jax.eval_shape(stage.init, jax.random.key(0), {})
    params = jax.tree.map(lambda x: jnp.asarray(0.3 * np.random.default_rng(0).normal(size=x.shape), x.dtype), shapes)
    for shift, varies in ((0, False), (1, True)):
        shifted = classifier_stage(config, num_classes=10, width=8, steps=7, batch_size=6, lr=0.5, shift=shift)
        loss = jax.jit(lambda key, f=shifted.loss: f(params, state, batch, key, 0, {})[0])
        assert (loss(jax.random.key(0)) != loss(jax.random.key(1))) == varies
    # Adam's first update is lr times the sign of the gradient; the last of the cosine is nearly none.
    opt_state, sizes = stage.optimizer.init(params), []
    for _ in range(8):
        updates, opt_state = stage.optimizer.update(jax.tree.map(jnp.ones_like, params), opt_state, params)
        sizes.append(float(jnp.abs(jax.tree.leaves(updates)[0]).max()))
    assert sizes[0] == pytest.approx(0.5, rel=1e-4) and sizes[7] == 0
    with pytest.raises(ValueError, match="shift=-1"):
        classifier_stage(config, num_classes=10, shift=-1)
