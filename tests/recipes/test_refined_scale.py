"""S080's recipe: the masked half's loss, its configuration, its schedules and its claim."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import cli
from jaxgen import config as config_lib
from jaxgen.data import pixels
from jaxgen.generators.scale_refiner import masked_logits
from jaxgen.orders import scales
from jaxgen.recipes import claims, markov_scale_claims
from jaxgen.recipes.next_scale import param_shapes, plain
from jaxgen.recipes.refined_scale import RefinerConfig, config_of, mask_scales, read_passes, refiner_stage
from jaxgen.train import train

HMAR = cli.load_config_file(str(Path(__file__).parents[2] / "configs" / "hmar.py"))
CONFIG = HMAR.get_config("smoke").override(["classifier.steps=0", "refiner_train.class_drop=0.0"]).config
KEY = jax.random.key(0)


@pytest.mark.numeric
def test_the_loss_is_the_likelihood_of_masked_tokens(params, batch):
    stage, frozen = refiner_stage(CONFIG), {name: params[name] for name in ("tokenizer", "generator")}
    assert stage.name == "refiner" and stage.needs == ("tokenizer", "generator")
    loss = jax.jit(stage.loss)
    value, (metrics, state) = loss(params["refiner"], (), batch, KEY, 0, frozen)
    masked = mask_scales(jax.random.split(KEY, 3)[2], scales((1, 2, 4)), 8)
    tokenizer, variables = CONFIG.build_tokenizer(), params["tokenizer"]["tokenizer"]

    @jax.jit
    def by_hand(labels):
        tokens = tokenizer.apply(variables, pixels(batch["image"]), method="encode")
        inputs = tokenizer.apply(variables, tokens, method="inputs")
        own = [tokenizer.apply(variables, s, tokens[:, a:b], method="own") for s, a, b in ((1, 1, 5), (2, 5, 21))]
        both = {name: params[name][name] for name in ("generator", "refiner")}
        args = (labels, inputs, jnp.concatenate(own, axis=1), masked)
        return tokens, masked_logits(CONFIG.build_generator(), CONFIG.build_refiner(), both, *args)

    def nll(labels):
        tokens, logits = jax.device_get(by_hand(labels))
        log_p = np.float64(logits[:, 1:]) - np.log(np.exp(np.float64(logits[:, 1:])).sum(-1, keepdims=True))
        picked = -np.take_along_axis(log_p, tokens[:, 1:, None], -1)[..., 0]
        smooth = 0.7 * picked - 0.3 * log_p.mean(-1)
        return [np.mean([row[m].mean() for row, m in zip(x, np.asarray(masked))]) for x in (picked, smooth)]

    plain_, smooth = nll(batch["label"])
    assert state == () and value == pytest.approx(plain_, rel=1e-4) and metrics["masked_nll"] == pytest.approx(plain_, rel=1e-4)
    assert 0 <= metrics["masked_accuracy"] <= 1

    changed = dataclasses.replace(CONFIG.refiner_train, class_drop=1.0, label_smoothing=0.3)
    stage = refiner_stage(dataclasses.replace(CONFIG, refiner_train=changed))
    value, (metrics, _) = jax.jit(stage.loss)(params["refiner"], (), batch, KEY, 0, frozen)
    plain_, smooth = nll(jnp.full((8,), 10))
    assert value == pytest.approx(smooth, rel=1e-4) and metrics["masked_nll"] == pytest.approx(plain_, rel=1e-4)


def test_masks_of_scales():
    order = scales((1, 2, 4))
    masked = np.asarray(mask_scales(KEY, order, 500))
    counts = np.stack([masked[:, :4].sum(1), masked[:, 4:].sum(1)])
    # ceil(4 p) and ceil(16 p) with one p a row: the first follows from the second, and each count is as frequent as any other.
    np.testing.assert_array_equal(counts[0], np.ceil(counts[1] / 4))
    assert set(counts[1]) == set(range(1, 17))
    assert np.abs(np.bincount(counts[0])[1:] / 500 - 0.25).max() < 4 * math.sqrt(0.25 * 0.75 / 500)
    places = masked[:, :4][counts[0] == 1].mean(axis=0)
    assert np.abs(places - 0.25).max() < 0.2  # every position is masked
    half = np.asarray(mask_scales(KEY, order, 3, share=0.5))
    assert half[:, :4].sum(1).tolist() == [2] * 3 and half[:, 4:].sum(1).tolist() == [8] * 3


@pytest.mark.numeric
def test_it_begins_as_the_generators_end(params):
    stage = refiner_stage(CONFIG)
    (made, state) = stage.init(KEY, {name: params[name] for name in ("tokenizer", "generator")})
    inner, theirs = made["refiner"]["params"], params["generator"]["generator"]["params"]
    assert set(made) == {"refiner"} and state == ()
    jax.tree.map(np.testing.assert_array_equal, inner["head"], theirs["head"])
    last = jax.tree.map(lambda x: x[1:], theirs["transformer"]["blocks"])
    jax.tree.map(np.testing.assert_array_equal, inner["transformer"]["blocks"], last)
    shapes = jax.tree.map(lambda x: x.shape, CONFIG.build_refiner().param_shapes())
    assert jax.tree.map(lambda x: x.shape, made["refiner"]) == shapes and float(np.abs(inner["mask_embed"]).max()) > 0


@pytest.mark.numeric
def test_sampling_takes_another_schedule(params):
    recipe, labels = CONFIG.recipe(), np.array([1, 10, 3])
    usual = recipe.sample(params, KEY, labels, cfg=2.0)
    assert usual["images"].shape == (3, 8, 8, 1) and usual["tokens"].shape == (3, 21)
    once = recipe.sample(params, KEY, labels, cfg=2.0, passes=())
    np.testing.assert_array_equal(once["tokens"][:, :1], usual["tokens"][:, :1])
    assert np.any(once["tokens"] != usual["tokens"])
    with pytest.raises(ValueError, match=r"passes\[1\]=\(2, 3\)"):
        recipe.sample(params, KEY, labels, passes=("1", "2+3", "16"))
    less = params | {"refiner": {"refiner": {"params": {"mask_embed": jnp.zeros(16)}}}}
    with pytest.raises(ValueError, match="refiner: params/head/ada/bias has shape none in the checkpoint"):
        recipe.sample(less, KEY, labels)


def test_schedules_are_read():
    order = scales((1, 2, 3))
    assert read_passes(order, ("1", "1+3", "1+1+2+5")) == ((1,), (1, 3), (1, 1, 2, 5))
    assert read_passes(order, ()) == ((1,), (4,), (9,))
    for texts, message in (
        (("1", "1+x", "9"), r"passes=\('1', '1\+x', '9'\): expected counts such as 1\+3"),
        (("1", "4"), "2 entries for 3 scales"),
        (("1", "1+2", "9"), r"passes\[1\]=\(1, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            read_passes(order, texts)
    edited = config_lib.override(CONFIG, ["refiner.passes=1,2+2,16", "refiner.confidence=full", "refiner.cfg=0.5"])
    sampler = edited.build_sampler()
    assert (sampler.passes, sampler.confidence, sampler.refine_cfg) == (((1,), (2, 2), (16,)), "full", 0.5)


def test_variants():
    for variant in HMAR.VARIANTS:
        config = HMAR.get_config(variant).config
        assert config_lib.from_json(config_lib.to_json(config)) == config
        assert [stage.name for stage in config.recipe().stages][:3] == ["tokenizer", "generator", "refiner"]
    assert HMAR.get_config("paper").config == HMAR.get_config("d16").config
    with pytest.raises(ValueError, match="variant 'd17' is not one of smoke"):
        HMAR.get_config("d17")


# The authors' training files: depth, batch, epochs of either half, base learning rate.
PUBLISHED = [(16, 768, 200, 1e-4), (20, 768, 250, 1e-4), (24, 768, 350, 8e-5), (30, 1024, 350, 8e-5)]


@pytest.mark.parametrize("depth, batch, epochs, base", PUBLISHED)
def test_published_models(depth, batch, epochs, base):
    config = HMAR.get_config(f"d{depth}").config
    updates = math.ceil(1_281_167 / batch)
    assert (config.model_train.steps, config.refiner_train.steps) == (epochs * updates, 100 * updates)
    for part in (config.model_train, config.refiner_train):
        assert part.batch_size == batch and part.optim.lr == pytest.approx(base * batch / 256)
    assert config.refiner_train.optim.warmup_steps == 2 * updates
    assert (config.refiner.depth, config.markov.weights, config.markov.window) == (8, "normal", 0)
    sampler = config.build_sampler()
    assert sampler.calls == 14 and sampler.passes[2] == (1, 1, 2, 5)
    c, v = 64 * depth, 4096
    block = 3 * c * c + 2 * c + depth + c * c + c + 8 * c * c + 5 * c + 6 * c * c + 6 * c
    refiner = 8 * block + (2 * c * c + 2 * c) + (c * v + v) + c
    shapes = param_shapes(sampler)["refiner"] if depth == 16 else config.build_refiner().param_shapes()
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == refiner


def test_the_configuration_of_modules():
    """The way back, for checkpoints of others."""
    config = config_lib.override(CONFIG, ["refiner.confidence=full", "refiner.cfg=0.5", "data.image_size=8"])
    back = config_of(config.build_sampler())
    assert back.build_sampler() == config.build_sampler() and config_lib.from_json(config_lib.to_json(back)) == back
    assert [stage.steps for stage in back.recipe().stages] == [0, 0, 0]


def test_bad_configurations():
    for field, value in (("depth", 0), ("cfg", -1.0), ("confidence", "high")):
        with pytest.raises(ValueError, match=f"refiner.{field}={value!r}"):
            RefinerConfig(**{field: value})
    for edit, message in (
        ("refiner.depth=2", "refiner.depth=2 must be below model.depth=2"),
        ("model.shared_adaln=true", "model.shared_adaln=True"),
        ("tokenizer.patch_nums=4", r"tokenizer.patch_nums=\(4,\): the first scale is not refined"),
    ):
        with pytest.raises(ValueError, match=message):
            config_lib.override(CONFIG, [edit])
    with pytest.raises(ValueError, match="3 entries for 2 scales"):
        config_lib.override(CONFIG, ["tokenizer.patch_nums=1,4"]).build_sampler()


def test_the_claim_compares_equals(monkeypatch):
    seen = {}
    monkeypatch.setattr(claims, "compare_generators", lambda systems, **kwargs: seen.update(systems=systems, **kwargs))
    monkeypatch.setattr(markov_scale_claims, "compare_updates", lambda systems, width, **kwargs: seen.update(updates=systems))
    assert len(HMAR.claim("small", seeds=2, edits=["model.width=64"], log=print)) == 2
    var, *ours = seen["systems"].values()
    assert all(plain(config) == var for config in ours) and var.model.width == 64
    same = [dataclasses.replace(config, refiner=RefinerConfig(depth=1)) for config in ours]
    assert same[0] == same[1] == same[2]  # but for the schedule
    assert [config.build_sampler().calls for config in ours] == [4, 8, 13]
    assert list(seen["updates"]) == ["S047 VAR", "S080 HMAR"]
    with pytest.raises(ValueError, match="budget 'huge' is not one of smoke, small"):
        HMAR.claim("huge")


def test_columns_of_the_claim(params):
    row = markov_scale_claims.sampling_columns(CONFIG.recipe(), params)
    counted = sum(x.size for name in ("generator", "refiner") for x in jax.tree.leaves(params[name]))
    assert row == {"parameters M": round(counted / 1e6, 3), "model calls": 4, "cache MB an image": 0.0}


# The whole system is trained and sampled.
@pytest.mark.slow
def test_training_and_sampling(tmp_path):
    recipe = CONFIG.recipe()
    results = train(recipe, str(tmp_path), run=recipe.config.run, log=print)
    params = {name: result.params for name, result in results.items()}
    assert np.isfinite(results["refiner"].metrics["masked_nll"])
    images = recipe.sample(params, KEY, np.arange(10), cfg=1.5)["images"]
    assert images.shape == (10, 8, 8, 1) and np.isfinite(images).all()
