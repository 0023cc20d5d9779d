"""Llamas of the tokens of clips: what the stages train on, samples, judges, published sizes, and what is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import avc_lm, nar_clips
from jaxgen import config as config_lib
from jaxgen.generators import next_token_sampler
from jaxgen.recipes.clip_tokens import ClipLlamaConfig
from jaxgen.recipes.evaluation import evaluate_images
from jaxgen.recipes.neighbours import in_raster_order
from jaxgen.recipes.token_cache import cache_tokens

EDITS = ("tokenizer.ch=4", "tokenizer.groups=2", "tokenizer.z_channels=4", "model_train.class_drop=0", "model_train.batch_size=8")
CONFIG = config_lib.override(nar_clips.build("smoke"), EDITS)
RASTER = in_raster_order(CONFIG, ClipLlamaConfig)


@pytest.fixture(scope="module")
def params(randomize):
    """By system and stage."""
    frame = CONFIG.build_tokenizer().frame
    tokenizer = jax.device_put(randomize(jax.eval_shape(frame.init, jax.random.key(0), jnp.zeros((1, 16, 32, 3)))))
    shapes = jax.eval_shape(CONFIG.recipe().stage("classifier").init, jax.random.key(0), {})[0]
    common = {"tokenizer": {"tokenizer": tokenizer}, "classifier": jax.device_put(randomize(shapes, seed=2))}
    generators = {config: randomize(config.build_generator().param_shapes(), seed=1) for config in (CONFIG, RASTER)}
    return {config: common | {"generator": {"generator": jax.device_put(tree)}} for config, tree in generators.items()}


@pytest.mark.numeric
@pytest.mark.parametrize("config", [CONFIG, RASTER], ids=["neighbours", "raster"])
def test_the_loss_is_that_of_the_tokens_of_clips(config, params):
    """By hand: frames are read one by one, their tokens follow one another, and all weigh the same."""
    stage, params = config.recipe().stage("generator"), params[config]
    batch = next(iter(stage.data(0, 1)))
    assert batch["image"].shape == (8, 2, 16, 32, 3) and batch["image"].dtype == np.uint8 and batch["label"].shape == (8,)
    value = jax.jit(stage.eval_loss)(params["generator"], (), batch, jax.random.key(0), params)["loss"]
    frame, tokenizer = config.build_tokenizer().frame, params["tokenizer"]["tokenizer"]
    pictures = jnp.asarray(batch["image"].reshape(16, 16, 32, 3) / 127.5 - 1, jnp.float32)

    @jax.jit
    def by_hand():
        tokens = frame.apply(tokenizer, pictures, method="encode").reshape(8, -1)
        return tokens, config.build_generator().apply(params["generator"]["generator"], batch["label"], tokens)

    tokens, logits = map(np.asarray, by_hand())
    nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), tokens[..., None], -1)
    assert tokens.shape == (8, 2 * 4 * 8) and value == pytest.approx(nll.mean(), rel=1e-4)


@pytest.mark.numeric
def test_samples_are_clips_in_one_compilation(params, monkeypatch):
    """In f + h + w - 2 calls; new labels and guidance compile nothing. `evaluate_images` reads them frame behind frame."""
    traces, original = [], next_token_sampler.sample_tokens
    monkeypatch.setattr(next_token_sampler, "sample_tokens", lambda *a, **k: traces.append(1) or original(*a, **k))
    recipe, labels = CONFIG.recipe(), np.arange(10, dtype=np.int32)
    found, clips = evaluate_images(recipe, params[CONFIG], jax.random.key(0), num=10, batch_size=10, settings=dict(cfg=0.0))
    out = recipe.sample(params[CONFIG], jax.random.key(1), labels[::-1], cfg=2.0, top_p=0.9)
    assert len(traces) == 1 and clips.shape == out["clips"].shape == (10, 2, 16, 32, 3) and recipe.modality == "video"
    assert CONFIG.build_generator().order.steps == 2 + 4 + 8 - 2 and RASTER.build_generator().order.steps == 64
    assert found["reconstruction"]["images"] == 299 and found["generation"]["frechet"] > found["generation"]["frechet_real"]
    again = CONFIG.build_tokenizer().apply(params[CONFIG]["tokenizer"]["tokenizer"], out["tokens"], method="decode")
    np.testing.assert_allclose(again, out["clips"], atol=1e-5)


def test_tokenizers_train_on_frames_and_judges_on_clips():
    recipe, source = CONFIG.recipe(), CONFIG.data.source("train")
    frames = next(iter(recipe.stage("tokenizer").data(0, 1)))["image"]
    assert frames.shape == (16, 16, 32, 3)
    clips = next(iter(recipe.stage("classifier").data(0, 1)))
    assert clips["image"].shape == (16, 16, 32, 6)
    known = {source[i]["clip"].transpose(1, 2, 0, 3).tobytes(): source[i]["label"] for i in range(len(source))}
    assert all(known[image.tobytes()] == label for image, label in zip(clips["image"], clips["label"]))
    assert sum(len(batch["label"]) for batch in recipe.stage("tokenizer").eval_data(0, 1)) == 2 * len(CONFIG.data.source("test"))


@pytest.mark.parametrize("variant", nar_clips.VARIANTS)
def test_every_variant_builds_and_survives_json(variant):
    config = nar_clips.get_config(variant).config
    assert config_lib.from_json(config_lib.to_json(config)) == config
    model, raster = config.build_generator(), in_raster_order(config, ClipLlamaConfig).build_generator()
    assert model.shape == config.build_tokenizer().grid == raster.shape and model.layers == raster.layers
    if variant == "paper":  # the authors' count, of blocks with another MLP of as many weights
        size = sum(math.prod(x.shape) for x in jax.tree.leaves(model.param_shapes()["params"]))
        assert model.shape == (4, 16, 16) and config.build_tokenizer().image_size == (128, 128)
        assert size / 1e6 == pytest.approx(343, rel=0.1)


def test_what_is_refused():
    for edit, message in (
        ("tokenizer.patch_nums=3", r"frames of 16x32 \(data.path=digits\); the tokenizer's patch_nums=\(3,\).* take 12x24"),
        ("data.height=18", r"frames of 18x32 .* take 16x28"),
        ("model.num_classes=9", "model.num_classes=9: digits has 10 classes"),
        ("data.path=films.npz", "data.path='films.npz': no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            config_lib.override(CONFIG, [edit]).resolve()
    with pytest.raises(ValueError, match="next-token models take one scale"):
        config_lib.override(CONFIG, ["tokenizer.patch_nums=1,4"])
    with pytest.raises(ValueError, match="data of type ClipConfig: tokens are cached of images alone"):
        cache_tokens(CONFIG, {}, "nowhere")
    with pytest.raises(ValueError, match="variant 'tiny' is not one of smoke, small, films, paper"):
        nar_clips.get_config("tiny")
    with pytest.raises(ValueError, match="seeds=0: expected at least 1"):
        nar_clips.claim("smoke", seeds=0)


def test_the_baseline_of_streams_has_their_data_model_and_training():
    config = avc_lm.build("smoke").resolve()
    codes = avc_lm.in_codes(config, smoke=True).resolve()
    for part in ("data", "model", "model_train", "classifier"):
        assert getattr(codes, part) == getattr(config, part)
    assert codes.build_tokenizer().grid == (2, 4, 8)


# Trains both orders, samples and judges.
@pytest.mark.slow
def test_the_claim_trains_samples_and_measures():
    (claim,) = nar_clips.claim("smoke", seeds=1, log=lambda line: None)
    ours, base = claim.rows
    assert (ours["model calls"], base["model calls"]) == (12, 64) and ours["tokens"] == base["tokens"] == 64
    assert ours["PSNR of tokens"] == base["PSNR of tokens"] and ours["Frechet"] > 0 < base["ms/image, batch 1"]
