"""Training a tokenizer: which loss moves which parameters, revival of codes, the perceptual network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.data import DataConfig
from jaxgen.interop.files import write_safetensors
from jaxgen.nn.perceptual import load_perceptual, lpips
from jaxgen.optim import OptimConfig
from jaxgen.quantizers import CodebookState
from jaxgen.recipes.tokenizer import TokenizerTrainConfig, tokenizer_stage
from jaxgen.tokenizers import MultiScaleTokenizer

DATA = DataConfig(path="digits", channels=1)
CONFIG = TokenizerTrainConfig(
    steps=40,
    batch_size=8,
    perceptual_weight=0.0,
    adversarial_weight=0.0,
    revive_every=0,
    l1_weight=3.0,
    l2_weight=0.5,
    optim=OptimConfig(lr=3e-3, schedule="constant", weight_decay=0.0, clip=1.0),
)
START = 4
ADVERSARIAL = dataclasses.replace(
    CONFIG, adversarial_weight=0.5, adversarial_start=START, discriminator_width=8, discriminator_layers=1
)


def small(**fields):
    sizes = dict(channels=1, ch=8, ch_mult=(1,), res_blocks=1, attention=False, groups=8, vocab=16, width=4, phis=1)
    return MultiScaleTokenizer(**sizes | dict(patch_nums=(1, 8)) | fields)


@pytest.fixture(scope="module")
def weights(randomize):
    """(params, state) of an adversarial stage on small digits, all random."""
    params, state = jax.eval_shape(lambda key: tokenizer_stage(ADVERSARIAL, DATA, small()).init(key, {}), jax.random.key(0))
    return jax.tree.map(jnp.asarray, randomize(params)), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)


@pytest.fixture(scope="module")
def losses(weights, batch):
    """`losses[name](step, params) -> (loss, metrics, gradients)` without an adversary, and with its weight once and twice."""

    def jitted(config):
        loss = jax.jit(jax.value_and_grad(tokenizer_stage(config, DATA, small()).loss, has_aux=True))

        def compute(step=START, params=weights[0]):
            (value, (metrics, _)), grads = loss(params, weights[1], batch, jax.random.key(1), step, {})
            return value, metrics, grads

        return compute

    configs = {"plain": CONFIG, "once": ADVERSARIAL, "twice": dataclasses.replace(ADVERSARIAL, adversarial_weight=1.0)}
    return {name: jitted(config) for name, config in configs.items()}


@pytest.fixture(scope="module")
def found(losses):
    return {name: loss() for name, loss in losses.items()} | {"before": losses["once"](START - 1)}


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def test_the_loss_is_the_sum_of_its_terms(found):
    value, m, _ = found["plain"]
    assert value == pytest.approx(float(3 * m["l1"] + 0.5 * m["l2"] + m["vq"]), rel=1e-5)
    assert 0 < m["codebook_use"] <= 1
    value, m, _ = found["once"]
    expected = 3 * m["l1"] + 0.5 * m["l2"] + m["vq"] + 0.5 * m["adaptive_weight"] * m["adversarial"] + m["discriminator"]
    assert value == pytest.approx(float(expected), rel=1e-5)
    assert m["adaptive_weight"] > 0 and np.isfinite(m["adaptive_weight"])


def test_the_discriminator_learns_from_its_own_loss_alone(found):
    """Twice the weight of the generator's term changes the autoencoder's gradient and not the discriminator's."""
    once, twice = found["once"][2], found["twice"][2]
    np.testing.assert_allclose(flat(twice["discriminator"]), flat(once["discriminator"]), rtol=1e-5, atol=1e-7)
    assert np.abs(flat(once["discriminator"])).max() > 1e-3


def test_the_autoencoder_learns_from_the_generators_term_alone(found):
    """Its gradient is linear in that term's weight, from the one without a discriminator on."""
    none, once, twice = (flat(found[name][2]["tokenizer"]) for name in ("plain", "once", "twice"))
    np.testing.assert_allclose(twice - none, 2 * (once - none), atol=1e-4 * np.abs(twice).max())
    assert np.abs(once - none).max() > 1e-2 * np.abs(none).max()


def test_the_discriminators_gradient_is_that_of_its_loss(found, losses, weights):
    """Finite differences of the reported discriminator loss along the gradient."""
    params, grads = weights[0], found["once"][2]["discriminator"]
    norm = np.linalg.norm(flat(grads))

    def at(t):
        moved = jax.tree.map(lambda p, g: p + t * g / norm, params["discriminator"], grads)
        return losses["once"](params=params | {"discriminator": moved})[1]["discriminator"]

    slope = (float(at(3e-3)) - float(at(-3e-3))) / 6e-3
    assert slope == pytest.approx(norm, rel=0.05)


def test_the_adaptive_weight_balances_the_last_layer(found):
    """At that layer the weighted adversarial gradient is as large as that of the reconstruction."""

    def last(name):
        return np.asarray(found[name][2]["tokenizer"]["params"]["decoder"]["conv_out"]["kernel"], np.float64)

    adversarial = np.linalg.norm(last("twice") - last("plain"))
    assert adversarial == pytest.approx(np.linalg.norm(last("plain")), rel=0.01)


def test_the_adversary_waits_for_its_start(found):
    later, plain = found["before"], found["plain"]
    assert later[0] == pytest.approx(float(plain[0]), rel=1e-6)
    np.testing.assert_allclose(flat(later[2]["tokenizer"]), flat(plain[2]["tokenizer"]), rtol=1e-5, atol=1e-6)
    assert not flat(later[2]["discriminator"]).any()


def test_dead_codes_move_and_used_ones_stay(weights):
    """At 8 images of 65 tokens a code is chosen 32.5 times a batch on average; below a tenth of that it is dead."""
    config = dataclasses.replace(CONFIG, steps=40, revive_every=5, revive_threshold=0.1)
    stage = tokenizer_stage(config, DATA, small())
    usage = jnp.where(jnp.arange(16) % 4 == 0, 3.24, 3.26)
    candidates = 100 + jnp.arange(256 * 4, dtype=jnp.float32).reshape(256, 4)
    before, state = weights[0], {"codebook": CodebookState(usage, candidates)}
    codes = np.asarray(before["tokenizer"]["params"]["quantizer"]["codebook"])

    def after(step):
        params, new = jax.jit(stage.after_update)(before, state, jax.random.key(0), step)
        moved = np.asarray(params["tokenizer"]["params"]["quantizer"]["codebook"])
        params["tokenizer"]["params"]["quantizer"]["codebook"] = codes
        jax.tree.map(np.testing.assert_array_equal, params, before)
        return moved, new["codebook"]

    moved, codebook = after(10)
    dead = np.arange(16) % 4 == 0
    np.testing.assert_array_equal(moved[~dead], codes[~dead])
    distance = np.linalg.norm(moved[dead][:, None] - np.asarray(candidates), axis=-1).min(1)
    assert (moved[dead] > 50).all() and (distance < 50).all()  # candidates span a thousand, jitter a hundredth of that
    np.testing.assert_allclose(codebook.usage, np.where(dead, 2 * 3.25, 3.26), rtol=1e-6)
    np.testing.assert_array_equal(after(11)[0], codes)
    assert (after(35)[0][dead] > 50).all()
    np.testing.assert_array_equal(after(40)[0], codes)  # codes keep still in the last tenth
    assert tokenizer_stage(CONFIG, DATA, small()).after_update is None


def test_what_is_missing_is_said():
    for fields, said in (({"perceptual_weight": 1.0}, True), ({}, False)):
        notes = tokenizer_stage(dataclasses.replace(CONFIG, **fields), DATA, small()).notes
        assert bool(notes) == said
    notes = tokenizer_stage(dataclasses.replace(CONFIG, perceptual_weight=1.0), DATA, small()).notes
    assert "no perceptual network" in notes[0] and "tokenizer_train.perceptual_path" in notes[0]


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """A file with the names and layout of torchvision's VGG16, but few channels."""
    rng, tensors, index, channels = np.random.default_rng(0), {}, 0, 3
    for width, depth in zip((4, 4, 8, 8, 8), (2, 2, 3, 3, 3)):
        for _ in range(depth):
            tensors[f"features.{index}.weight"] = rng.normal(0, (9 * channels) ** -0.5, (width, channels, 3, 3))
            tensors[f"features.{index}.bias"] = rng.normal(0, 0.1, width)
            index, channels = index + 2, width
        index += 1
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    write_safetensors(path, {name: x.astype(np.float32) for name, x in tensors.items()})
    return str(path)


def test_the_perceptual_term(vgg, randomize):
    tokenizer = small(patch_nums=(1, 16))  # 16 pixels, the least that VGG takes
    config = dataclasses.replace(CONFIG, perceptual_weight=2.0, perceptual_path=vgg)
    stage = tokenizer_stage(config, dataclasses.replace(DATA, image_size=16), tokenizer)
    assert stage.notes == ()
    params, _ = jax.eval_shape(lambda key: stage.init(key, {}), jax.random.key(0))
    params = jax.tree.map(jnp.asarray, randomize(params))
    state = {"codebook": CodebookState.zeros(16, 4, 256), "perceptual": load_perceptual(vgg)}
    images = np.random.default_rng(1).integers(0, 256, (4, 16, 16, 1)).astype(np.uint8)
    batch = {"image": jnp.asarray(images), "label": jnp.zeros(4, jnp.int32)}
    value, (m, new_state) = jax.jit(stage.loss)(params, state, batch, jax.random.key(0), 0, {})
    assert value == pytest.approx(float(3 * m["l1"] + 0.5 * m["l2"] + m["vq"] + 2 * m["perceptual"]), rel=1e-5)
    pixels = images.astype(np.float32) / 127.5 - 1
    output = jax.jit(tokenizer.apply)(params["tokenizer"], pixels).images
    assert m["perceptual"] == pytest.approx(float(jax.jit(lpips)(state["perceptual"], pixels, output).mean()), rel=1e-3)
    assert m["perceptual"] > 0.01
    jax.tree.map(np.testing.assert_array_equal, new_state["perceptual"], state["perceptual"])


@pytest.mark.parametrize(
    "field, value", [("batch_size", 0), ("accumulate", 0), ("l1_weight", -1.0), ("revive_every", -1), ("ema", 1.5)]
)
def test_fields_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"tokenizer_train.{field}={value}"):
        TokenizerTrainConfig(**{field: value})


@pytest.mark.numeric
def test_a_short_training_learns_to_reconstruct(weights, batch):
    """One batch, again and again: the error falls to a fraction, and evaluation agrees with training."""
    stage = tokenizer_stage(dataclasses.replace(CONFIG, revive_every=10), DATA, small(codebook_init=0.1))
    params = {"tokenizer": weights[0]["tokenizer"]}
    state = {"codebook": weights[1]["codebook"]}
    opt_state = stage.optimizer.init(params)

    @jax.jit
    def update(params, state, opt_state, step):
        key = jax.random.fold_in(jax.random.key(0), step)
        grads, (metrics, state) = jax.grad(stage.loss, has_aux=True)(params, state, batch, key, step, {})
        updates, opt_state = stage.optimizer.update(grads, opt_state, params)
        params = jax.tree.map(jnp.add, params, updates)
        params, state = stage.after_update(params, state, key, step)
        return params, state, opt_state, metrics

    losses = []
    for step in range(60):
        params, state, opt_state, metrics = update(params, state, opt_state, step)
        losses.append(float(3 * metrics["l1"] + 0.5 * metrics["l2"]))
    assert min(losses[-5:]) < 0.35 * losses[0]
    evaluated = jax.jit(stage.eval_loss)(params, state, batch, jax.random.key(0), {})
    assert float(evaluated["loss"]) < 0.4 * losses[0]
    assert evaluated["loss"] == pytest.approx(float(3 * evaluated["l1"] + 0.5 * evaluated["l2"]), rel=1e-5)
