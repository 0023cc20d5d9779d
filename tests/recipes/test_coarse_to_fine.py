"""S019's recipe: clusters of the trained codebook, the loss by hand, variants and baseline, and what is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import ctf, llamagen
from jaxgen import config as config_lib
from jaxgen.data import digits, pixels
from jaxgen.quantizers import cluster_codes
from jaxgen.recipes.coarse_to_fine import flat, replaced_codes
from jaxgen.recipes.image_llama import ImageLlamaConfig

SHAPE = ("tokenizer.ch=4", "tokenizer.groups=2", "tokenizer.z_channels=4", "model_train.class_drop=0")


@pytest.mark.numeric
def test_stage_and_sampler(randomize):
    config = config_lib.override(ctf.build("smoke"), SHAPE)
    recipe, tokenizer, generator = config.recipe(), config.build_tokenizer(), config.build_generator()
    stage = recipe.stage("generator")
    abstract = jax.eval_shape(tokenizer.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    params = {"tokenizer": {"tokenizer": jax.device_put(randomize(abstract))}}
    made = jax.jit(lambda: stage.init(jax.random.key(0), params)[0])()
    codes = params["tokenizer"]["tokenizer"]["params"]["quantizer"]["codebook"]
    clusters = np.asarray(cluster_codes(codes / np.linalg.norm(codes, axis=-1, keepdims=True), 4))
    np.testing.assert_array_equal(made["generator"]["params"]["cluster"], clusters)

    random = randomize(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), made["generator"]))
    params["generator"] = {"generator": jax.device_put(generator.with_labels(random, clusters))}
    source = digits("train")
    batch = {"image": jnp.asarray(source.images[:8]), "label": jnp.asarray(source.labels[:8])}
    value, _ = jax.jit(stage.loss)(params["generator"], (), batch, jax.random.key(0), 0, params)

    @jax.jit
    def law():
        tokens = tokenizer.apply(params["tokenizer"]["tokenizer"], pixels(batch["image"]), method="encode")
        return tokens, generator.apply(params["generator"]["generator"], batch["label"], tokens)

    tokens, logits = law()
    assert value == pytest.approx(-float(jnp.take_along_axis(logits, tokens[..., None], -1).mean()), rel=1e-4)

    labels = np.asarray(batch["label"])
    images = recipe.sample(params, jax.random.key(0), labels)["images"]
    assert images.shape == (8, 8, 8, 1)
    greedy = [recipe.sample(params, jax.random.key(0), labels, top_k=1, fine=dict(top_k=k))["tokens"] for k in (0, 1)]
    np.testing.assert_array_equal(clusters[greedy[0]], clusters[greedy[1]])
    assert np.any(np.asarray(greedy[0]) != greedy[1])

    found = replaced_codes(recipe, params)
    assert found["PSNR, other codes of the cluster"] > found["PSNR, other codes of the codebook"]


@pytest.mark.parametrize("variant", ctf.VARIANTS)
def test_every_variant_builds_and_survives_json(variant):
    config = ctf.get_config(variant).config
    assert config_lib.from_json(config_lib.to_json(config)) == config
    generator = config.build_generator()
    assert config.build_sampler().generator == generator
    shapes = generator.param_shapes()["params"]
    assert shapes["cluster"].shape == (config.tokenizer.vocab,)
    if variant == "paper":  # LlamaGen-B twice, but for the embeddings and heads
        size = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
        d, v, k = 768, 16384, 512
        assert size == 2 * (12 * (4 * d * d + 3 * d * 2048 + 2 * d) + 1001 * d + d) + v * d + 3 * k * d + v


def test_the_baseline_has_as_many_blocks():
    ours = ctf.build("demo")
    other = flat(ours)
    assert type(other) is ImageLlamaConfig and other.model == llamagen.build("demo").model
    assert (other.data, other.tokenizer, other.model_train) == (ours.data, ours.tokenizer, ours.model_train)
    assert (ours.model.depth, ours.model.fine_depth) == (2, 1)
    codes = {variant: (c.tokenizer.vocab, c.model.clusters) for variant in ctf.VARIANTS if (c := ctf.build(variant))}
    assert codes == ctf.SIZES | {variant: (16384, 512) for variant in llamagen.PUBLISHED}


@pytest.mark.parametrize(
    "edit, message",
    [
        ("model.clusters=0", "model.clusters=0: expected at least 1"),
        ("model.clusters=17", "model.clusters=17: the codebook has 16 codes"),
        ("model.fine_depth=0", "model.fine_depth=0"),
        ("tokenizer.patch_nums=2,4", "next-token models take one scale"),
    ],
)
def test_bad_configurations(edit, message):
    with pytest.raises(ValueError, match=message):
        config_lib.override(ctf.build("smoke"), [edit])
    with pytest.raises(ValueError, match="variant 'd17' is not one of smoke"):
        ctf.get_config("d17")
    with pytest.raises(ValueError, match="budget 'large' is not one of smoke, small"):
        ctf.claim("large")


@pytest.mark.slow  # it trains a tokenizer, a classifier and two generators
def test_the_claim_at_its_smallest():
    (claim,) = ctf.claim("smoke", seeds=1, log=lambda line: None)
    assert [row["model calls"] for row in claim.rows] == ["16 + 1", 16]
    assert [row["codes to choose from"] for row in claim.rows] == [4, 16]
    assert all(1 <= row["inception score, own classifier"] <= 10 for row in claim.rows)
    assert all(0 < row["test nats a token"] < 2 * np.log(16) for row in claim.rows)
