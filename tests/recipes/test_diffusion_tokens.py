"""S020 D-AR as a recipe: the loss by hand, streams and previews, published sizes, what the claim measures, what is refused."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import d_ar, llamagen
from jaxgen import config as config_lib
from jaxgen.data import digits, pixels
from jaxgen.decoding import Settings
from jaxgen.generators import diffusion_sampler
from jaxgen.quantizers import CodebookState
from jaxgen.recipe import modules
from jaxgen.recipes import diffusion_token_claims

CONFIG = d_ar.build("smoke")


@pytest.fixture(scope="module")
def params(randomize):
    tokenizer, generator = CONFIG.build_tokenizer(), CONFIG.build_generator()
    shapes = jax.eval_shape(tokenizer.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    return jax.device_put(
        {"tokenizer": {"tokenizer": randomize(shapes)}, "generator": {"generator": randomize(generator.param_shapes(), seed=1)}}
    )


@pytest.mark.numeric
def test_stage_and_sampler(raster_recipe_agrees):
    raster_recipe_agrees(config_lib.override(CONFIG, ["model_train.class_drop=0", "model.dropout=0", "model.token_dropout=0"]))


@pytest.mark.numeric
def test_streams_are_the_samples(params, monkeypatch):
    """A preview a group, in one compilation; what is stopped early is the stream's beginning."""
    traces, original = [], diffusion_sampler.draw_tokens
    monkeypatch.setattr(diffusion_sampler, "draw_tokens", lambda *a, **k: traces.append(1) or original(*a, **k))
    sampler, labels, variables = CONFIG.build_sampler(), np.array([3, 1, 10], np.int32), modules(params)
    key, settings = jax.random.key(0), Settings(cfg=1.5, temperature=0.9)
    stream = list(sampler.stream(variables, key, labels, settings))
    again = list(sampler.stream(variables, jax.random.key(1), labels[::-1], Settings(cfg=0.5, top_p=0.9)))
    assert len(traces) == 1 and (stream[-1][0] != again[-1][0]).any()
    images, tokens = sampler(variables, key, labels, settings)
    np.testing.assert_array_equal(stream[-1][0], tokens)
    np.testing.assert_allclose(stream[-1][1], images, atol=1e-4)
    for (some, _), size in zip(stream, (4, 8, 12, 16)):
        np.testing.assert_array_equal(some, tokens[:, :size])
    two = CONFIG.recipe().sample(params, key, labels, groups=2, cfg=1.5, temperature=0.9)
    np.testing.assert_array_equal(two["tokens"], tokens[:, :8])
    np.testing.assert_allclose(two["images"], stream[1][1], atol=1e-4)
    short = dataclasses.replace(sampler, groups=3)
    assert len(list(short.stream(variables, key, labels, settings))) == 3
    for groups in (-1, 5):
        with pytest.raises(ValueError, match=f"groups={groups}: expected 1 to 4"):
            CONFIG.recipe().sample(params, key, labels, groups=groups)
    with pytest.raises(ValueError, match="temperature=0"):
        next(sampler.stream(variables, key, labels, Settings(temperature=0.0)))


@pytest.mark.numeric
def test_the_tokenizer_stage(params):
    """Its loss is the flow's error and that of the codes, at times and noise that its key gives."""
    stage, tokenizer = CONFIG.recipe().stage("tokenizer"), CONFIG.build_tokenizer()
    images = digits("train").images[:4]
    batch, key = {"image": jnp.asarray(images), "label": jnp.zeros(4, jnp.int32)}, jax.random.key(3)
    state = {"codebook": CodebookState.zeros(16, 4, 256)}
    value, (metrics, after) = jax.jit(stage.loss)(params["tokenizer"], state, batch, key, 0, {})
    time_key, noise_key, _ = jax.random.split(key, 3)
    u, noise = jax.random.uniform(time_key, (4,)), jax.random.normal(noise_key, (4, 8, 8, 1))
    out = jax.jit(tokenizer.apply)(params["tokenizer"]["tokenizer"], pixels(batch["image"]), u, noise)
    assert value == pytest.approx(float(out.error.mean() + out.quantized.loss), rel=1e-5)
    assert metrics["flow"] == pytest.approx(float(out.error.mean()), rel=1e-5)
    np.testing.assert_allclose(after["codebook"].usage, 0.01 * out.quantized.counts, rtol=1e-5)
    assert stage.notes == () and stage.after_update is not None
    warned = config_lib.override(CONFIG, ["tokenizer_train.perceptual_weight=0.5"]).recipe().stage("tokenizer")
    assert "perceptual" in warned.notes[0]


@pytest.mark.numeric
def test_the_tokenizer_is_aligned_with_an_encoder(params, randomize):
    """By hand: patches of the decoder's midst, averaged where they are smaller, projected, and their angles to the features."""
    edits = "tokenizer.decoder_depth=2 features.grid=2 features.patch=4 tokenizer_train.align_weight=0.7"
    config = config_lib.override(CONFIG, [*edits.split(), "tokenizer_train.align_after=2"])
    plain = config_lib.override(config, ["tokenizer_train.align_weight=0"])
    assert [stage.name for stage in plain.recipe().stages] == [stage.name for stage in CONFIG.recipe().stages]
    assert [stage.name for stage in config.recipe().stages][:3] == ["encoder", "tokenizer", "generator"]
    stage, base, tokenizer = config.recipe().stage("tokenizer"), plain.recipe().stage("tokenizer"), config.build_tokenizer()
    assert stage.needs == ("encoder",) and base.needs == ()
    encoder = jax.eval_shape(config.recipe().stage("encoder").init, jax.random.key(0), {})[0]["encoder"]
    frozen = {"encoder": {"encoder": jax.device_put(randomize(encoder, seed=5))}}
    shapes, state = jax.eval_shape(stage.init, jax.random.key(0), frozen)
    ours = jax.device_put(randomize(shapes, seed=6))
    alone = {"tokenizer": ours["tokenizer"]}
    assert jax.tree.structure(jax.eval_shape(base.init, jax.random.key(0), {})[0]) == jax.tree.structure(alone)
    state = {"codebook": CodebookState.zeros(16, 4, 256)}
    batch, key = {"image": jnp.asarray(digits("train").images[:4]), "label": jnp.zeros(4, jnp.int32)}, jax.random.key(3)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def added(params):
        """The gradient of what the alignment adds, with both losses."""
        value, (metrics, _) = stage.loss(params, state, batch, key, 0, frozen)
        without, _ = base.loss({"tokenizer": params["tokenizer"]}, state, batch, key, 0, {})
        return value - without, (value, without, metrics["alignment"])

    grads, (value, without, alignment) = jax.device_get(added(ours))

    @jax.jit
    def by_hand():
        time_key, noise_key, _ = jax.random.split(key, 3)
        u, noise = jax.random.uniform(time_key, (4,)), jax.random.normal(noise_key, (4, 8, 8, 1))
        images = pixels(batch["image"])  # as large as the encoder's patches
        hidden = tokenizer.apply(ours["tokenizer"], images, u, noise, after=2).hidden
        return hidden, config.features.build(1).apply(frozen["encoder"]["encoder"], images)

    hidden, told = (np.asarray(x, np.float64) for x in by_hand())
    x = hidden.reshape(4, 2, 2, 2, 2, 16).mean((2, 4)).reshape(4, 4, 16)
    for i in range(3):
        layer = ours["projector"]["params"][f"Dense_{i}"]
        x = x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"], np.float64)
        x = x / (1 + np.exp(-x)) if i < 2 else x
    cosine = ((x * told[:, 1:]).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(told[:, 1:], axis=-1)).mean()
    assert alignment == pytest.approx(cosine, abs=1e-5)
    assert value == pytest.approx(float(without) + 0.7 * (1 - cosine), rel=1e-5)

    # Its gradient reaches all that makes the hidden states, and not what reads them.
    largest = jax.tree.map(lambda x: np.abs(x).max(), {"projector": grads["projector"]} | grads["tokenizer"]["params"])
    for name in ("patches", "queries", "encoder", "to_codes", "from_codes", "causal", "projector"):
        assert max(jax.tree.leaves(largest[name])) > 1e-4, name
    assert max(jax.tree.leaves(largest["decoder"]["blocks_1"]["mlp"])) > 1e-4
    assert max(jax.tree.leaves(largest["decoder"]["out"])) < 1e-6


# Of the Llamas, in millions, as in the paper's table.
PUBLISHED_M = {"paper": 343, "xl": 775}


@pytest.mark.parametrize("variant", d_ar.VARIANTS)
def test_every_variant_builds_and_survives_json(variant):
    config = d_ar.get_config(variant).config
    assert config_lib.from_json(config_lib.to_json(config)) == config
    sampler = config.build_sampler()
    assert sampler.generator.shape == (sampler.tokenizer.length,)
    if variant in PUBLISHED_M:
        size = sum(math.prod(x.shape) for x in jax.tree.leaves(sampler.generator.param_shapes()))
        assert size / 1e6 == pytest.approx(PUBLISHED_M[variant], rel=0.01)
        assert (config.tokenizer.length, config.tokenizer.groups, config.tokenizer.vocab) == (256, 8, 16384)
        shapes = jax.eval_shape(sampler.tokenizer.init, jax.random.key(0), jnp.zeros((1, 256, 256, 3)))
        size = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
        assert size / 1e6 == pytest.approx(300, rel=0.02)  # of the tokenizer, as the authors say
        other = llamagen.build({"paper": "large", "xl": "xl"}[variant])
        assert config.model == other.model and config.model_train == other.model_train
        train, encoder = config.tokenizer_train, config.features.build(3)
        assert train.aligned and (train.align_weight, train.align_after, train.align_hidden) == (0.5, 8, 2048)
        assert (encoder.patch, encoder.positions, config.features.grid, encoder.width) == (14, 37, 16, 768)
    else:
        assert not config.tokenizer_train.aligned
        aligned = config_lib.override(config, ["tokenizer_train.align_weight=0.5"])
        assert aligned.recipe().stage("encoder").steps == config.features_train.steps > 0


def test_the_claim_compares_equals(monkeypatch):
    monkeypatch.setattr(d_ar, "sharpening", lambda config, **options: (config, options))
    seen = {}
    monkeypatch.setattr(d_ar.claims, "compare_generators", lambda systems, **options: seen.update(systems) or options)
    (first, _), _ = d_ar.claim("smoke", seeds=2)
    ours, aligned, other = seen.values()
    assert first == ours == CONFIG
    assert aligned == config_lib.override(CONFIG, ["tokenizer_train.align_weight=0.5"])
    for part in ("data", "model", "model_train", "classifier"):
        assert getattr(ours, part) == getattr(other, part)
    assert other.tokenizer_train.steps == ours.tokenizer_train.steps and other.tokenizer.vocab == ours.tokenizer.vocab
    assert other.build_generator().length == ours.build_generator().length == 16
    d_ar.claim("smoke", edits=["tokenizer_train.align_weight=0.7"])
    weights = [config.tokenizer_train.align_weight for config in list(seen.values())[:2]]
    assert weights == [0.0, 0.7]


def test_only_tokenizers_of_the_same_encoder_are_shared():
    """In claims; without an alignment the encoder's configuration means nothing."""
    aligned = config_lib.override(CONFIG, ["tokenizer_train.align_weight=0.7"])
    for config, equal in ((CONFIG, True), (aligned, False)):
        other = config_lib.override(config, ["features.depth=3"])
        assert (d_ar.claims._tokenizer_key(config) == d_ar.claims._tokenizer_key(other)) is equal


@pytest.mark.numeric
def test_what_is_measured_of_previews(params, monkeypatch):
    """A row a group; the last is the sample itself. Who is sharper is not this test's to say."""
    judged = {"class_accuracy": 0.5, "frechet": 2.0}
    monkeypatch.setattr(diffusion_token_claims, "measure_samples", lambda *args: judged)
    monkeypatch.setattr(diffusion_token_claims, "held_out", lambda *a, **k: iter([{"image": digits("test").images[:3]}]))
    variables = modules(params) | {"classifier": {}}
    rows = diffusion_token_claims.measure_previews(CONFIG, variables, jax.random.key(0), 3)
    assert len(rows) == 4 and rows[-1]["distance to the sample"] == 0 < rows[0]["distance to the sample"]
    tokenizer = CONFIG.build_tokenizer()
    images = pixels(digits("test").images[:3])

    @jax.jit
    def half(images):
        tokens = tokenizer.apply(variables["tokenizer"], images, method="encode")
        return tokenizer.apply(variables["tokenizer"], tokens[:, :8], method="decode")

    shown = half(images)
    want = np.mean([10 * np.log10(4 / np.square(np.asarray(a - b)).mean()) for a, b in zip(images, shown)])
    assert rows[1]["PSNR, held out"] == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(
    "edit, message",
    [
        ("tokenizer.patch=3", "tokenizer.patch=3: does not divide side=8"),
        ("tokenizer.groups=3", "tokenizer.groups=3: must divide length=16"),
        ("tokenizer.heads=3", "tokenizer.heads=3"),
        ("tokenizer.std=0", "tokenizer.std=0"),
        ("tokenizer.dtype=int8", "tokenizer.dtype='int8'"),
        ("tokenizer_train.revive_every=-1", "tokenizer_train.revive_every=-1"),
        ("tokenizer_train.align_weight=-1", "tokenizer_train.align_weight=-1"),
        ("tokenizer_train.align_weight=1 tokenizer_train.align_after=2", "align_after=2: the decoder has tokenizer.decoder_d"),
        ("tokenizer_train.align_weight=1 features.grid=3", "features.grid=3: does not divide the decoder's 4 patches"),
    ],
)
def test_bad_configurations(edit, message):
    with pytest.raises(ValueError, match=message):
        config_lib.override(CONFIG, edit.split())


def test_what_does_not_fit_the_data():
    with pytest.raises(ValueError, match=r"images of 8x8 \(data.path=digits, data.image_size=0\): tokenizer.side=16"):
        config_lib.override(CONFIG, ["tokenizer.side=16"]).resolve()
    with pytest.raises(ValueError, match="model.num_classes=9: digits has 10 classes"):
        config_lib.override(CONFIG, ["model.num_classes=9"]).resolve()
    for call in (lambda: d_ar.get_config("tiny"), lambda: d_ar.claim("huge")):
        with pytest.raises(ValueError, match="is not one of smoke, small"):
            call()
    with pytest.raises(ValueError, match="seeds=0"):
        d_ar.claim("smoke", seeds=0)


# Trains, compiles and samples every stage of three systems.
@pytest.mark.slow
def test_the_claim_trains_samples_and_measures():
    previews, comparison = d_ar.claim("smoke", seeds=1, log=lambda line: None)
    assert [row["tokens"] for row in previews.rows] == [4, 8, 12, 16]
    assert [row["model calls"] for row in comparison.rows] == [16, 16, 16]
