"""S016 JPEG-LM as a recipe: the loss by hand, samples that are files, what the claim measures, and what is refused."""

import dataclasses
import io
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import jpeg_lm
from jaxgen import config as config_lib
from jaxgen.data import digits
from jaxgen.generators import next_token_sampler
from jaxgen.recipes import byte_image_claims
from jaxgen.recipes.byte_files import likelihood, save_files
from jaxgen.recipes.byte_image_claims import in_pixels, rarest
from jaxgen.recipes.byte_images import CodecConfig
from jaxgen.tokenizers.bytes import END, from_tokens, to_tokens

CONFIG = config_lib.override(jpeg_lm.build("smoke"), ["model_train.class_drop=0", "model.dropout=0", "model.token_dropout=0"])


@pytest.fixture(scope="module")
def params(randomize):
    shapes = {"generator": CONFIG.build_generator().param_shapes()}
    return {"generator": jax.device_put(randomize(shapes))}


@pytest.mark.numeric
def test_the_loss_is_the_likelihood_of_the_files(params):
    """Up to the first `END`, by hand; the batches are the files of the images."""
    stage, generator = CONFIG.recipe().stage("generator"), CONFIG.build_generator()
    batch = next(iter(stage.data(0, 1)))
    codec = CONFIG.codec.build(1)
    known = {codec.encode(image) for image in digits("train").images}
    assert all(from_tokens(row) in known for row in batch["tokens"]) and batch["tokens"].shape == (16, 24)

    value, (metrics, _) = jax.jit(stage.loss)(params["generator"], (), batch, jax.random.key(0), 0, {})
    logits = jax.jit(generator.apply)(params["generator"]["generator"], batch["label"], batch["tokens"])
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    nll = [[-log_p[i, j, row[j]] for j in range(len(from_tokens(row)) + 1)] for i, row in enumerate(batch["tokens"])]
    assert value == pytest.approx(np.mean(sum(nll, [])), rel=1e-4)
    assert metrics["nll_image"] == pytest.approx(np.mean([sum(row) for row in nll]), rel=1e-4)
    full = jnp.asarray(to_tokens(b"ab", 2))[None]  # a file without an end counts whole
    assert likelihood(jnp.zeros((1, 2, 257)), full)["nll_image"] == pytest.approx(2 * math.log(257), rel=1e-5)


@pytest.mark.numeric
def test_samples_are_files_in_one_compilation(params, monkeypatch, tmp_path):
    """Of random weights: with the grammar all are valid, without it none; new labels and settings compile nothing."""
    traces, original = [], next_token_sampler.sample_tokens
    monkeypatch.setattr(next_token_sampler, "sample_tokens", lambda *a, **k: traces.append(1) or original(*a, **k))
    sample, labels = CONFIG.recipe().sample, np.arange(8, dtype=np.int32)
    out = sample(params, jax.random.key(0), labels, cfg=0.5, temperature=0.9)
    again = sample(params, jax.random.key(1), labels[::-1], cfg=2.0, top_p=0.9)
    assert len(traces) == 1 and np.asarray(out["valid"]).all() and np.asarray(again["valid"]).all()
    assert (np.asarray(out["tokens"]) != np.asarray(again["tokens"])).any()
    free = sample(params, jax.random.key(0), labels, cfg=0.5, temperature=0.9, constrained=False)
    assert not np.asarray(free["valid"]).any() and not np.asarray(free["images"]).any()
    off = dataclasses.replace(CONFIG, constrained=False).recipe()
    off = off.sample(params, jax.random.key(0), labels, cfg=0.5, temperature=0.9)
    np.testing.assert_array_equal(off["tokens"], free["tokens"])

    tokens = np.concatenate([out["tokens"][:2], free["tokens"][:1]])
    paths = save_files(tmp_path / "out", CONFIG.build_tokenizer(), tokens)
    assert [path.name for path in paths] == ["0000.jpg", "0001.jpg", "0002.bin"]
    assert paths[2].read_bytes() == from_tokens(tokens[2])
    for path, image in zip(paths[:2], np.asarray(out["images"])):
        np.testing.assert_allclose(np.asarray(Image.open(io.BytesIO(path.read_bytes()))) / 127.5 - 1, image[..., 0], atol=1e-6)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write .*0000.jpg"):
        save_files(tmp_path / "file", CONFIG.build_tokenizer(), tokens)


@pytest.mark.numeric
def test_pairs_of_bytes(params, randomize):
    """Learnt from the first training files, kept in the configuration, and read so by data, sampler and files."""
    asked = config_lib.override(CONFIG, ["codec.merges=12"])
    with pytest.raises(ValueError, match=r"codec.merges=12: codec.pairs is empty; resolve\(\) the configuration first"):
        asked.recipe().stage("generator").data(0, 1)
    config = asked.resolve()
    assert config == asked.resolve() == config_lib.from_json(config_lib.to_json(config)) == config.resolve()
    tokenizer, codec = config.build_tokenizer(), CONFIG.build_codec()
    assert len(tokenizer.pairs) == 12 and tokenizer.vocab == config.build_generator().vocab == 257 + 12
    batches = [next(iter(x.recipe().stage("generator").data(0, 1)))["tokens"] for x in (CONFIG, config)]
    files = [from_tokens(row) for row in batches[0]]
    assert [tokenizer.file(row) for row in batches[1]] == files and (batches[1] > END).any()
    assert (batches[1] != END).sum() < (batches[0] != END).sum()

    weights = {"generator": jax.device_put(randomize({"generator": config.build_generator().param_shapes()}))}
    out = config.recipe().sample(weights, jax.random.key(0), np.arange(16, dtype=np.int32) % 10, cfg=0.0)
    tokens = np.asarray(out["tokens"])
    assert np.asarray(out["valid"]).all() and (tokens > END).any()
    np.testing.assert_allclose(out["images"][3], codec.decode(tokenizer.file(tokens[3])) / 127.5 - 1, atol=1e-6)


@pytest.mark.numeric
def test_a_row_ends_with_its_file(params):
    """What is behind an `END` is `END`; a greedy row is a fixed point of the model's constrained predictions."""
    out = CONFIG.recipe().sample(params, jax.random.key(0), np.arange(4, dtype=np.int32), cfg=0.0, top_k=1)
    tokens = np.asarray(out["tokens"])
    assert all((row[len(from_tokens(row)) :] == END).all() for row in tokens)
    grammar = CONFIG.build_sampler().grammar
    logits = jax.jit(CONFIG.build_generator().apply)(params["generator"]["generator"], np.arange(4), tokens)

    def one(state, column):
        token, logits = column
        best = jnp.where(grammar.allowed(state), logits, -jnp.inf).argmax(-1)
        return grammar.move(state, token), best

    _, best = jax.jit(lambda x: jax.lax.scan(one, grammar.begin((4,)), x))((tokens.T, logits.swapaxes(0, 1)))
    np.testing.assert_array_equal(best.T, tokens)


@pytest.mark.parametrize("variant", jpeg_lm.VARIANTS)
def test_every_variant_builds_and_survives_json(variant):
    config = jpeg_lm.get_config(variant).config
    assert config_lib.from_json(config_lib.to_json(config)) == config
    assert config.build_sampler().generator.shape == (config.codec.length,)
    if variant == "paper":  # Llama 2 7B without its text vocabulary, which is 2 x 32,000 x 4096
        shapes = config.build_generator().param_shapes()["params"]
        size = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
        assert size == 6_738_415_616 - 2 * 32_000 * 4096 + (2 * (257 + 64) + 1001) * 4096


def test_the_claim_compares_equals(monkeypatch):
    """Equal Llamas, data and updates; only what the tokens are differs. Which test images are rare, by hand."""
    seen = {}

    def compare(systems, **options):
        seen.update(systems, **options)
        return byte_image_claims.Claim("", [])

    monkeypatch.setattr(byte_image_claims.claims, "compare_generators", compare)
    jpeg_lm.claim("smoke", seeds=2)
    ours, free, codes, raw = (seen[name] for name in list(seen)[:4])
    assert ours.constrained and not free.constrained and seen["same_weights"] and seen["seeds"] == 2
    for other in (free, codes, raw):
        assert (other.data, other.model, other.model_train, other.classifier) == (
            ours.data,
            ours.model,
            ours.model_train,
            ours.classifier,
        )
    assert raw.build_generator().length == 64 and codes.build_generator().length == 16
    assert raw == in_pixels(ours) and raw.build_sampler().grammar is None
    rare = rarest(ours)
    train, test = digits("train"), digits("test")
    far = [np.square(x - train.images[train.labels == y].mean(0)).mean() for x, y in zip(test.images.astype(float), test.labels)]
    assert len(rare) == round(len(test) / 10)
    np.testing.assert_allclose(rare[0], test.images[np.argmax(far)] / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize(
    "edit, message",
    [
        ("codec.kind=png", "codec.kind='png': expected one of jpeg, pixels"),
        ("codec.subsampling=4:1:1", "codec.subsampling='4:1:1'"),
        ("codec.quality=0", "codec.quality=0"),
        ("codec.length=0", "codec.length=0"),
        ("codec.merges=-1", "codec.merges=-1"),
        ("codec.pairs=1,2", "codec.pairs: 1 merges, expected at most codec.merges=0"),
        ("codec.pairs=1,256", r"codec.pairs: merges\[1\]=256"),
    ],
)
def test_bad_configurations(edit, message):
    with pytest.raises(ValueError, match=message):
        config_lib.override(CONFIG, [edit])


def test_what_does_not_fit_the_data():
    for edit, message in (
        ("codec.length=12", r"codec.length=12: there are files of \d+ bytes"),
        ("codec.size=16", r"images of 8x8 \(data.path=digits\): codec.size=16"),
        ("model.num_classes=9", "model.num_classes=9: digits has 10 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            config_lib.override(CONFIG, [edit]).resolve()
    with pytest.raises(ValueError, match="length=2: the shortest file has 3 bytes"):
        config_lib.override(CONFIG, ["codec.length=2"]).build_sampler()
    assert dataclasses.replace(CONFIG, codec=CodecConfig(length=24, quality=10)).resolve() == CONFIG
    for call in (lambda: jpeg_lm.get_config("tiny"), lambda: jpeg_lm.claim("huge")):
        with pytest.raises(ValueError, match="is not one of smoke, small"):
            call()


# Trains, compiles and samples every stage of three systems.
@pytest.mark.slow
def test_the_claim_trains_samples_and_measures():
    (claim,) = jpeg_lm.claim("smoke", seeds=1, log=lambda line: None)
    ours, free, codes, raw = claim.rows
    assert ours["valid"] == ours["opens"] == 1.0 > free["valid"]
    assert raw["PSNR of tokens, rarest tenth"] == math.inf and codes["valid"] == ""
