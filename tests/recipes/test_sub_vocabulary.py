"""S152's recipe: the loss by hand, greedy samples, its variants, what is compared, and what is refused."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import elm
from jaxgen import config as config_lib
from jaxgen.data import pixels
from jaxgen.recipes import claims
from jaxgen.recipes.sub_vocabulary import compare_parts

SHAPE = ("tokenizer.ch=4", "tokenizer.groups=2", "tokenizer.z_channels=4", "model_train.class_drop=0")

# In millions, with a vocabulary of 2^10 or 2^12 twice; their names for the sizes, "2B" rounded.
PUBLISHED_M = {"paper": 310, "xl": 730, "xxl": 1400, "2b": 1900}


@pytest.mark.numeric
def test_stage_and_sampler(raster_recipe_agrees):
    raster_recipe_agrees(config_lib.override(elm.build("smoke"), SHAPE))


@pytest.fixture(scope="module")
def four_cells(randomize, batch):
    """(Configuration of a masked model of 2 x 2 cells, parameters, tokens, nats of each token given what is not masked)."""
    edits = (*SHAPE, "model.modeling=masked", "reveal.steps=4", "tokenizer.ch_mult=1,1,1", "tokenizer.patch_nums=2")
    config = config_lib.override(elm.build("smoke"), edits)
    tokenizer, generator, stage = config.build_tokenizer(), config.build_generator(), config.recipe().stage("generator")
    shapes = jax.eval_shape(tokenizer.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    params = {"tokenizer": {"tokenizer": jax.device_put(randomize(shapes))}}
    params["generator"] = jax.device_put(randomize(jax.eval_shape(stage.init, jax.random.key(0), params)[0], seed=1))
    tokens = tokenizer.apply(params["tokenizer"]["tokenizer"], pixels(batch["image"]), method="encode")

    @jax.jit
    def nats(hidden):
        noisy = jnp.where(jnp.repeat(hidden, generator.parts), generator.mask, tokens)
        logits = generator.apply(params["generator"]["generator"], batch["label"], noisy)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]

    return config, params, lambda hidden: np.asarray(nats(np.asarray(hidden))).reshape(8, 4, generator.parts)


def mean_over_masks(nats, share):
    """(Mean over images and sets of masked cells of a masked token's nats, spread of one image); `share[k-1]` of k cells."""
    mean, square = 0.0, 0.0
    for k, p in enumerate(share, 1):
        sets = list(itertools.combinations(range(4), k))
        for cells in sets:
            hidden = np.isin(np.arange(4), cells)
            values = nats(hidden)[:, hidden].mean((1, 2))
            mean, square = mean + p * values.mean() / len(sets), square + p * (values**2).mean() / len(sets)
    return mean, (square - mean**2) ** 0.5


def test_the_masked_stage_evaluates_a_bound_over_all_orders(four_cells, batch):
    config, params, nats = four_cells
    stage, keys = config.recipe().stage("generator"), jax.random.split(jax.random.key(7), 400)
    got = np.asarray(jax.jit(jax.vmap(lambda key: stage.eval_loss(params["generator"], (), batch, key, params)["loss"]))(keys))
    want, spread = mean_over_masks(nats, [1 / 4] * 4)
    assert abs(got.mean() - want) < 4 * spread / (8 * 400) ** 0.5
    # An order is a chain of sets: the mean over all 24 of what each pays for an image.
    orders = np.array(list(itertools.permutations(range(4))))
    paid = [nats(np.isin(np.arange(4), order[i:]))[:, order[i]] for order in orders for i in range(4)]
    assert np.mean(paid) == pytest.approx(want, rel=1e-5)


def test_the_masked_stage_trains_on_what_the_passes_meet(four_cells, batch):
    """At n = 4 passes 4, 3.7, 2.8 and 1.5 cells are masked, rounded up; the loss weighs each masked token alike."""
    config, params, nats = four_cells
    stage, keys = config.recipe().stage("generator"), jax.random.split(jax.random.key(8), 400)
    values = np.asarray(jax.jit(jax.vmap(lambda key: stage.loss(params["generator"], (), batch, key, 0, params)[0]))(keys))
    # 8 images, 2 of each count: 4, 4, 3 and 2 cells.
    share = np.array([0, 2, 3, 8]) / 13
    want, spread = mean_over_masks(nats, share)
    assert abs(values.mean() - want) < 4 * spread / (8 * 400) ** 0.5
    one = config_lib.override(config, ["reveal.steps=1"]).recipe().stage("generator")
    value, _ = jax.jit(one.loss)(params["generator"], (), batch, jax.random.key(0), 0, params)
    assert value == pytest.approx(nats(np.ones(4, bool)).mean(), rel=1e-5)


def test_the_masked_recipe_samples_images(four_cells, batch):
    config, params, _ = four_cells
    made = config.recipe().sample(params, jax.random.key(0), np.asarray(batch["label"]), cfg=1.0, top_k=2)
    assert made["images"].shape == (8, 8, 8, 1) and np.isfinite(made["images"]).all()
    assert made["tokens"].shape == (8, 8) and np.asarray(made["tokens"]).max() < config.build_generator().vocab


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
    masked = [f"S152 ELM, 2 of 6 bits, masked, {n} passes" for n in (10, 16)]
    assert list(seen) == ["S152 ELM, 2 of 6 bits", "S152 ELM, 3 of 4 bits", "baseline, one softmax of 12 bits", *masked]
    assert [config.build_generator().vocab for config in seen.values()] == [64, 16, 4096, 64, 64]
    assert [config.masked for config in seen.values()] == [False, False, False, True, True]
    assert [seen[name].build_sampler().steps for name in masked] == [10, 16]
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
        ("model.modeling=bidirectional", "model.modeling='bidirectional' is not one of causal, masked"),
        ("model.modeling=masked reveal.steps=17", "reveal.steps=17: an image has 16 cells"),
        ("reveal.steps=0", "reveal.steps=0: expected at least 1"),
        ("reveal.choice_temperature=-1", "reveal.choice_temperature=-1"),
        ("tokenizer_train.revive_every=5", "tokenizer_train.revive_every=5: bits are no codes to revive, set 0"),
    ],
)
def test_bad_configurations(edit, message):
    with pytest.raises(ValueError, match=message):
        config_lib.override(elm.build("smoke"), edit.split())
    with pytest.raises(ValueError, match="variant 'd17' is not one of smoke"):
        elm.get_config("d17")
    with pytest.raises(ValueError, match="budget 'large' is not one of smoke, small"):
        elm.claim("large")


@pytest.mark.slow  # it trains a tokenizer, a classifier and two generators
def test_the_claim_at_its_smallest():
    (claim,) = elm.claim("smoke", seeds=1, log=lambda line: None)
    assert [row["vocabulary"] for row in claim.rows] == ["2 x 4", "1 x 16", "2 x 4", "2 x 4"]
    assert [row["model calls"] for row in claim.rows] == [16, 16, 10, 16]
    flops = [row["sampling GFLOP/image"] for row in claim.rows]
    assert flops[3] > flops[2] > flops[0]  # no cache: each pass reads all cells
    assert all(0 < row["test nats an image"] < 2 * 16 * np.log(16) for row in claim.rows)
