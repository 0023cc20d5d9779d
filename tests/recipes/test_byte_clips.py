"""S016 AVC-LM as a recipe: batches are streams of clips, samples are clips and files, and what is refused."""

import dataclasses
import io
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import avc_lm
from jaxgen import cli
from jaxgen import config as config_lib
from jaxgen.data.clips import ClipConfig
from jaxgen.decoding.file_tokens import ENDED
from jaxgen.generators import next_token_sampler
from jaxgen.recipes.byte_clip_claims import MOST_PIXELS, in_pixels
from jaxgen.recipes.byte_clips import ClipCodecConfig
from jaxgen.recipes.byte_files import save_files
from jaxgen.tokenizers.bytes import END, from_tokens, to_tokens
from jaxgen.train import train

av = pytest.importorskip("av", reason="H.264 needs PyAV: pip install 'jaxgen[video]'")

CONFIG = avc_lm.build("smoke")


@pytest.fixture(scope="module")
def params(randomize):
    return {"generator": jax.device_put(randomize({"generator": CONFIG.build_generator().param_shapes()}))}


@pytest.mark.numeric
@pytest.mark.usefixtures("quick_compiles")
def test_samples_are_clips_in_one_compilation(params, monkeypatch, tmp_path):
    """New labels and settings compile nothing; what is valid is a file that a reader shows so, the rest is kept as bytes."""
    traces, original = [], next_token_sampler.sample_tokens
    monkeypatch.setattr(next_token_sampler, "sample_tokens", lambda *a, **k: traces.append(1) or original(*a, **k))
    recipe, codec, labels = CONFIG.recipe(), CONFIG.build_codec(), np.arange(8, dtype=np.int32)
    out = recipe.sample(params, jax.random.key(0), labels, cfg=0.5, temperature=0.9)
    again = recipe.sample(params, jax.random.key(1), labels[::-1], cfg=2.0, top_p=0.9)
    assert len(traces) == 1 and out["clips"].shape == (8, 2, 16, 32, 3) and out["tokens"].shape == (8, CONFIG.codec.length)
    assert (np.asarray(out["tokens"]) != np.asarray(again["tokens"])).any()
    # With the grammar all are clips, of random weights; without it none is.
    assert np.asarray(out["valid"]).all() and np.asarray(again["valid"]).all()
    for row, picture in zip(np.asarray(out["tokens"]), np.asarray(out["clips"])):
        np.testing.assert_allclose(picture, codec.decode(from_tokens(row)) / 127.5 - 1, atol=1e-6)
    free = recipe.sample(params, jax.random.key(0), labels, cfg=0.5, temperature=0.9, constrained=False)
    assert not np.asarray(free["valid"]).any() and not np.asarray(free["clips"]).any()

    clips = CONFIG.data.source("test")
    tokens = [to_tokens(codec.encode(clips[i]["clip"]), CONFIG.codec.length) for i in range(2)]
    tokens = np.stack([*tokens, np.asarray(out["tokens"])[0][::-1]])
    paths = recipe.write(tmp_path / "out", tokens)
    assert [path.name for path in paths] == ["0000.h264", "0001.h264", "0002.bin"]
    assert paths[2].read_bytes() == from_tokens(tokens[2])
    with av.open(io.BytesIO(paths[1].read_bytes()), format="h264") as container:
        shown = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert np.abs(shown.astype(int) - clips[1]["clip"]).mean() < 8
    assert save_files(tmp_path / "same", CONFIG.build_tokenizer(), tokens)[0].read_bytes() == codec.file(from_tokens(tokens[0]))


def test_batches_are_streams_of_clips():
    """Each row is one of the clips with its label, whole; the loss counts what is before the first `END`."""
    batch = next(iter(CONFIG.recipe().stage("generator").data(0, 1)))
    codec, source = CONFIG.build_codec(), CONFIG.data.source("train")
    assert batch["tokens"].shape == (16, CONFIG.codec.length) and batch["label"].dtype == np.int32
    known = {codec.encode(source[i]["clip"]): source[i]["label"] for i in range(len(source)) if source[i]["label"] == 3}
    threes = [from_tokens(row) for row in batch["tokens"][batch["label"] == 3]]
    assert threes and all(data in known for data in threes) and (batch["tokens"][:, -1] == END).all()
    held_out = CONFIG.recipe().stage("generator").eval_data(0, 1)
    assert sum(len(batch["label"]) for batch in held_out) == len(CONFIG.data.source("test"))


def test_the_grammar_takes_real_films(shared):
    """Of every film and split; the automaton's own tests say what it refuses."""
    path = shared / "data" / "video" / "clips_72x128.npz"
    config = config_lib.override(avc_lm.build("films"), [f"data.path={path}", "codec.restart=1", "codec.length=420"]).resolve()
    assert config.data.source("test").class_names == ("bigbuckbunny", "bikes")
    grammar, codec = config.build_sampler().grammar, config.build_codec()
    rows = []
    for split in ("train", "test"):
        source = config.data.source(split)
        some = np.linspace(0, len(source) - 1, 12).astype(int)
        rows += [to_tokens(codec.encode(source[i]["clip"]), config.codec.length) for i in some]

    def one(state, token):
        return grammar.move(state, token), None

    state, _ = jax.jit(lambda tokens: jax.lax.scan(one, grammar.begin((len(rows),)), tokens))(jnp.asarray(np.stack(rows)).T)
    assert (np.asarray(state.phase) == ENDED).all() and len(grammar.grammar.headers) == 8


@pytest.mark.parametrize("variant", avc_lm.VARIANTS)
def test_every_variant_builds_and_survives_json(variant):
    config = avc_lm.get_config(variant).config
    assert config_lib.from_json(config_lib.to_json(config)) == config
    sampler = config.build_sampler()
    assert sampler.generator.shape == (config.codec.length,) and sampler.grammar.length == config.codec.length
    if variant == "paper":  # Llama 2 7B without its text vocabulary; a slice for each macroblock of 15 frames
        shapes = config.build_generator().param_shapes()["params"]
        size = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
        assert size == 6_738_415_616 - 2 * 32_000 * 4096 + (2 * (257 + 768) + 2) * 4096
        assert len(sampler.grammar.grammar.headers) == 15 * 9 * 16


def test_what_is_refused():
    for edit, message in (
        ("codec.quantiser=52", "codec.quantiser=52: expected at most 51"),
        ("codec.length=0", "codec.length=0: expected at least 1"),
        ("codec.restart=-1", "codec.restart=-1"),
        ("data.frames=0", "data.frames=0"),
    ):
        with pytest.raises(ValueError, match=message):
            config_lib.override(CONFIG, [edit])
    with pytest.raises(ValueError, match="data.width=29: H.264 needs an even number"):
        config_lib.override(CONFIG, ["data.height=16", "data.width=29"])
    for edit, message in (
        ("codec.length=30", r"codec.length=30: there are files of \d+ bytes"),
        ("model.num_classes=9", "model.num_classes=9: digits has 10 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            config_lib.override(CONFIG, [edit]).resolve()
    resolved = config_lib.override(CONFIG, ["codec.merges=8"]).resolve()
    codec = ClipCodecConfig(length=96, quantiser=40, merges=8, pairs=resolved.codec.pairs)
    assert (resolved.data.height, resolved.data.width) == (16, 32) and resolved.codec == codec and len(codec.pairs) == 16
    tokens, clip = resolved.build_tokenizer(), CONFIG.data.source("train")[5]["clip"]
    assert tokens.file(tokens.tokens(tokens.codec.encode(clip))) == CONFIG.build_codec().encode(clip)
    with pytest.raises(ValueError, match="variant 'tiny' is not one of smoke, small, films, paper"):
        avc_lm.get_config("tiny")


# Trains the smoke variant with the loop and samples what was saved.
@pytest.mark.slow
def test_trains_and_samples(tmp_path):
    recipe = config_lib.override(CONFIG, ["model_train.steps=60", "run.eval_every=30"]).resolve().recipe()
    train(recipe, tmp_path / "run", run=recipe.config.run, log=lambda line: None)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = (row["eval/loss"] for row in rows if "eval/loss" in row)
    assert last < first < math.log(257)
    recipe, params = cli.open_workdir(tmp_path / "run")
    out = recipe.sample(params, jax.random.key(0), np.arange(4, dtype=np.int32), cfg=0.0)
    assert out["clips"].shape == (4, 2, 16, 32, 3)


# Trains, compiles and samples with and without the grammar.
@pytest.mark.slow
def test_the_claim_trains_samples_and_measures():
    (claim,) = avc_lm.claim("smoke", seeds=1, log=lambda line: None)
    ours, free, codes = claim.rows
    assert ours["valid"] == ours["opens"] == 1.0 > free["valid"] and ours["test nats a token"] == free["test nats a token"]
    assert 25 < ours["PSNR of tokens"] < 40 and ours["tokens"] == CONFIG.codec.length and codes["tokens"] == 64
    assert ours["bytes a clip"] > 0 and "valid" not in codes and free["detail, share of real"] == 0


def test_what_the_claim_refuses():
    with pytest.raises(ValueError, match="seeds=0: expected at least 1"):
        avc_lm.claim("smoke", seeds=0)
    with pytest.raises(ValueError, match="is not one of smoke, small"):
        avc_lm.claim("huge")


def test_pixels_are_a_codec_too():
    """As many tokens as numbers, of frames of any size; files of theirs have no grammar, and other lengths are not valid."""
    small = dataclasses.replace(CONFIG, data=ClipConfig(frames=2, height=8, width=14))
    config = in_pixels(small).resolve()
    assert config.codec.length == 2 * 8 * 14 * 3 <= MOST_PIXELS and config.build_grammar() is None
    clip, tokenizer = config.data.source("train")[3]["clip"], config.build_tokenizer()
    np.testing.assert_array_equal(tokenizer.codec.decode(tokenizer.file(tokenizer.tokens(clip.tobytes()))), clip)
    with pytest.raises(ValueError, match="671 bytes: expected 672"):
        tokenizer.codec.decode(clip.tobytes()[:-1])
    odd = dataclasses.replace(config, data=ClipConfig(frames=2, height=8, width=15))
    assert odd.build_codec().shape == (2, 8, 15, 3)
    with pytest.raises(ValueError, match="codec.kind='avi': expected one of h264, pixels"):
        config_lib.override(CONFIG, ["codec.kind=avi"])
