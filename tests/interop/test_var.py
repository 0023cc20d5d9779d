"""Official VAR checkpoints: the authors' outputs on random weights (where the reference data is at hand), and bad files."""

import io
import os
import pickle
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxgen.generators import NextScaleTransformer
from jaxgen.interop import var
from jaxgen.interop.files import read_state_dict
from jaxgen.tokenizers import MultiScaleTokenizer

pytestmark = pytest.mark.numeric


# Against the authors' code.


@pytest.fixture(scope="module")
def folder(shared):
    path = shared / "fixtures" / "var"
    if not path.is_dir():
        pytest.skip(f"{path}: no VAR reference files")
    return path


@pytest.fixture(scope="module")
def official(folder):
    return var.load(generator=str(folder / "dev_var.pth"), tokenizer=str(folder / "dev_vae.pth"))


@pytest.fixture(scope="module")
def reference(folder):
    return dict(np.load(folder / "dev.npz"))


def test_architecture_is_read_from_the_files(official, reference):
    assert official.patch_nums == tuple(reference["patch_nums"]) == (1, 2, 3, 4)
    assert official.num_classes == 6
    g, t = official.generator, official.tokenizer
    assert (g.width, g.heads, g.depth, g.vocab, g.mlp_ratio, g.l2_norm, g.shared_adaln) == (
        64,
        2,
        2,
        64,
        4.0,
        True,
        False,
    )
    assert (t.ch, t.ch_mult, t.res_blocks, t.vocab, t.width, t.phis, t.attention) == (
        32,
        (1, 1, 2, 2, 4),
        2,
        64,
        8,
        4,
        True,
    )
    assert set(official.params) == {"generator", "tokenizer"}


def test_tokens(official, reference):
    tokens = official.encode(reference["images"])
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, reference["tokens"])


def test_reconstruction(official, reference):
    np.testing.assert_allclose(official.decode(reference["tokens"]), reference["reconstruction"], atol=5e-5)


def test_logits(official, reference):
    logits = official.logits(reference["labels"], reference["tokens"])
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, reference["logits"], atol=5e-5)
    null = np.full(3, official.num_classes)
    np.testing.assert_allclose(official.logits(null, reference["tokens"]), reference["logits_uncond"], atol=5e-5)


def test_greedy_samples(official, reference):
    images, tokens = official.sample(jax.random.key(0), reference["labels"], cfg=1.5, top_k=1)
    np.testing.assert_allclose(images, 2 * reference["greedy_cfg1p5"] - 1, atol=5e-5)
    np.testing.assert_allclose(official.decode(tokens), images, atol=1e-5)


def test_unrolled_layers(folder, reference):
    generator, variables = var.load_generator(str(folder / "dev_var.pth"), scan_layers=False)
    tokenizer, tokenizer_variables = var.load_tokenizer(str(folder / "dev_vae.pth"), patch_nums=generator.patch_nums)
    model = var.VAR(generator=generator, tokenizer=tokenizer, params={"generator": variables, "tokenizer": tokenizer_variables})
    logits = model.logits(reference["labels"], reference["tokens"])
    np.testing.assert_allclose(logits, reference["logits"], atol=5e-5)


def test_saving_gives_the_authors_files_back(official, folder, tmp_path):
    paths = {"generator": str(tmp_path / "g.safetensors"), "tokenizer": str(tmp_path / "t.safetensors")}
    official.save(**paths)
    for name, original in (("generator", "dev_var.pth"), ("tokenizer", "dev_vae.pth")):
        saved, want = safetensors.numpy.load_file(paths[name]), read_state_dict(folder / original)
        assert set(saved) == set(want)
        for key in want:
            assert saved[key].dtype == want[key].dtype, key
            np.testing.assert_array_equal(saved[key], want[key], err_msg=key)
    again = var.load(**paths)
    assert (again.generator, again.tokenizer) == (official.generator, official.tokenizer)
    jax.tree.map(np.testing.assert_array_equal, again.params, official.params)
    assert jax.tree.map(lambda x: x.dtype, again.params) == jax.tree.map(lambda x: x.dtype, official.params)


# Models of our own, small enough to be written anew for every test.


def generator_of(**kwargs):
    sizes = dict(vocab=10, num_classes=3, patch_nums=(1, 2), width=16, heads=2, depth=2, scan_layers=True)
    return NextScaleTransformer(**(sizes | kwargs))


def tokenizer_of(**kwargs):
    sizes = dict(ch=32, ch_mult=(1, 1), res_blocks=1, vocab=10, width=4, patch_nums=(1, 2), phis=2)
    return MultiScaleTokenizer(**(sizes | kwargs))


def model_of(randomize, generator=None, tokenizer=None):
    generator, tokenizer = generator or generator_of(), tokenizer or tokenizer_of()
    image = jax.ShapeDtypeStruct((1, *tokenizer.image_size, tokenizer.channels), jnp.float32)
    params = {
        "generator": randomize(generator.param_shapes(tokenizer.width), seed=1),
        "tokenizer": randomize(jax.eval_shape(tokenizer.init, jax.random.key(0), image), seed=2),
    }
    return var.VAR(generator=generator, tokenizer=tokenizer, params=jax.device_put(params))


@pytest.fixture(scope="module")
def own(randomize):
    return model_of(randomize)


@pytest.fixture(scope="module")
def written(own, tmp_path_factory):
    """(state dict of the generator, of the tokenizer), as saved."""
    folder = tmp_path_factory.mktemp("written")
    own.save(generator=str(folder / "g.safetensors"), tokenizer=str(folder / "t.safetensors"))
    return [safetensors.numpy.load_file(folder / name) for name in ("g.safetensors", "t.safetensors")]


def load(tmp_path, generator, tokenizer, **kwargs):
    paths = [str(tmp_path / name) for name in ("g.safetensors", "t.safetensors")]
    for path, tensors in zip(paths, (generator, tokenizer)):
        safetensors.numpy.save_file(tensors, path)
    return var.load(generator=paths[0], tokenizer=paths[1], **kwargs)


def test_published_names(written):
    generator, tokenizer = written
    blocks = [
        *("attn.scale_mul_1H11", "attn.zero_k_bias", "attn.q_bias", "attn.v_bias", "attn.mat_qkv.weight"),
        *(f"{layer}.{part}" for layer in ("attn.proj", "ffn.fc1", "ffn.fc2", "ada_lin.1") for part in ("weight", "bias")),
    ]
    assert set(generator) == {
        *("pos_start", "pos_1LC", "lvl_1L", "attn_bias_for_masking", "lvl_embed.weight", "class_emb.weight"),
        *(f"{layer}.{part}" for layer in ("word_embed", "head", "head_nm.ada_lin.1") for part in ("weight", "bias")),
        *(f"blocks.{i}.{name}" for i in range(2) for name in blocks),
    }
    np.testing.assert_array_equal(generator["lvl_1L"], [[0, 1, 1, 1, 1]])
    inf = np.inf
    np.testing.assert_array_equal(generator["attn_bias_for_masking"][0, 0, :2], [[0, -inf, -inf, -inf, -inf], [0] * 5])
    assert not np.any(generator["blocks.1.attn.zero_k_bias"])
    phis = {name for name in tokenizer if name.startswith("quantize.")}
    assert phis == {
        *("quantize.embedding.weight", "quantize.ema_vocab_hit_SV"),
        *(f"quantize.quant_resi.qresi_ls.{i}.{part}" for i in range(2) for part in ("weight", "bias")),
    }
    assert tokenizer["quantize.ema_vocab_hit_SV"].shape == (2, 10)


VARIANTS = {
    "unrolled": ({"scan_layers": False}, {}, {"scan_layers": False}),
    "shared modulation": ({"shared_adaln": True}, {"phis": 1}, {}),
    "plain attention": ({"l2_norm": False, "heads": 4, "mlp_ratio": 2.5}, {"attention": False}, {"num_heads": 4}),
    "half precision": ({"dtype": jnp.dtype("bfloat16")}, {"dtype": jnp.dtype("bfloat16")}, {"dtype": jnp.bfloat16}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trips_are_exact(randomize, tmp_path, variant):
    generator, tokenizer, options = VARIANTS[variant]
    model = model_of(randomize, generator_of(**generator), tokenizer_of(**tokenizer))
    paths = {"generator": str(tmp_path / "g.safetensors"), "tokenizer": str(tmp_path / "t.safetensors")}
    model.save(**paths)
    again = var.load(**paths, **options)
    assert (again.generator, again.tokenizer) == (model.generator, model.tokenizer)
    assert jax.tree.structure(again.params) == jax.tree.structure(model.params)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_scanned_and_unrolled_files_are_equal(randomize, own, written, tmp_path):
    again = load(tmp_path, *written, scan_layers=False)
    again.save(generator=str(tmp_path / "g2.safetensors"), tokenizer=str(tmp_path / "t2.safetensors"))
    assert (tmp_path / "g2.safetensors").read_bytes() == (tmp_path / "g.safetensors").read_bytes()


def test_convolutions_one_a_scale_have_names_of_their_own(written, tmp_path):
    generator, tokenizer = written
    renamed = {name.replace("qresi_ls.", ""): array for name, array in tokenizer.items()}
    model = load(tmp_path, generator, renamed)
    kernel = model.params["tokenizer"]["params"]["quantizer"]["phi_1"]["kernel"]
    np.testing.assert_array_equal(kernel, tokenizer["quantize.quant_resi.qresi_ls.1.weight"].transpose(2, 3, 1, 0))


def test_scales_may_be_passed(written, tmp_path):
    generator, tokenizer = written
    generator = {name: array for name, array in generator.items() if name != "lvl_1L"}
    with pytest.raises(ValueError, match="scales of its 5 positions are not in the file; pass patch_nums"):
        load(tmp_path, generator, tokenizer)
    assert load(tmp_path, generator, tokenizer, patch_nums=[1, 2]).patch_nums == (1, 2)
    with pytest.raises(ValueError, match=r"patch_nums=\(1, 3\) give 10 positions; .*g.safetensors has 5"):
        load(tmp_path, generator, tokenizer, patch_nums=(1, 3))


def test_editing_keeps_what_the_mask_keeps(own):
    images = np.random.default_rng(0).uniform(-1, 1, (2, 4, 4, 3)).astype(np.float32)
    labels, tokens = np.array([0, 2]), own.encode(images)
    edited, same = own.edit(jax.random.key(0), labels, images, np.ones((4, 4), bool))
    np.testing.assert_array_equal(same, tokens)
    np.testing.assert_allclose(edited, own.decode(tokens), atol=1e-5)
    left = np.zeros((4, 4), bool)
    left[:, :2] = True
    kept = np.array([0, 1, 3])  # the whole first scale, and the left column of the second
    changed = 0
    for seed in range(3):
        new = np.asarray(own.edit(jax.random.key(seed), labels, images, left)[1])
        np.testing.assert_array_equal(new[:, kept], tokens[:, kept])
        changed += np.sum(new != tokens)
    assert changed


# Bad input.


def test_inputs_out_of_range(own):
    for labels, message in (([4], r"label 4 is out of range 0\.\.3"), ([-1], "label -1"), ([0.5], "integers")):
        with pytest.raises(ValueError, match=message):
            own.sample(jax.random.key(0), labels)
        with pytest.raises(ValueError, match=message):
            own.logits(labels, np.zeros((1, 5), int))
    for tokens, message in (
        (np.zeros((1, 6), int), r"tokens int64 \(1, 6\): expected integers \[b, 5\]"),
        (np.zeros((1, 5)), "tokens float64"),
        (np.full((1, 5), 10), r"tokens span 10\.\.10; the vocabulary is 0\.\.9"),
        (np.full((1, 5), -1), r"tokens span -1\.\.-1"),
    ):
        with pytest.raises(ValueError, match=message):
            own.decode(tokens)
    with pytest.raises(ValueError, match=r"images \(1, 8, 4, 3\): this tokenizer takes \[b, 4, 4, 3\]"):
        own.encode(np.zeros((1, 8, 4, 3), np.float32))
    with pytest.raises(ValueError, match="dtype uint8"):
        own.encode(np.zeros((1, 4, 4, 3), np.uint8))


def changed(tensors, **changes):
    """`tensors` with some replaced, or removed where the new value is None; `__` in a name stands for a dot."""
    out = dict(tensors)
    for name, value in changes.items():
        name = name.replace("__", ".")
        out.pop(name) if value is None else out.update({name: value})
    return out


BAD_GENERATORS = {
    "unknown name": ({"extra__weight": np.zeros(3)}, r"unknown names: extra.weight \(3,\)"),
    "unknown block": ({"blocks__x__weight": np.zeros(3)}, r"unknown names: blocks.x.weight \(3,\)"),
    "missing name": ({"word_embed__bias": None}, r"missing: word_embed/bias \(word_embed.bias\) \(16,\)"),
    "missing in a block": ({"blocks__1__attn__q_bias": None}, r"attn.q_bias\) has \(1, 2, 8\), expected \(2, 2, 8\)"),
    "not a generator": ({"head__weight": None}, "no parameter 'head.weight'; not a checkpoint of this system"),
    "no blocks": ({"blocks__0__ffn__fc1__weight": None}, "no parameter 'blocks.0.ffn.fc1.weight'"),
    "wrong shape": (
        {"pos_start": np.zeros((1, 2, 16), np.float32)},
        r"start \(pos_start\) has \(2, 16\), expected \(1, 16\)",
    ),
    "wrong width": (
        {"blocks__0__attn__proj__weight": np.zeros((16, 8))},
        r"blocks.0.attn.proj.weight \(16, 8\): does not fit",
    ),
    "wrong rank": ({"pos_1LC": np.zeros(5, np.float32)}, r"pos_1LC has the shape \(5,\); expected 3 axes"),
    "wrong rank of scales": ({"blocks__0__attn__scale_mul_1H11": np.zeros(2)}, r"scale_mul_1H11 has the shape \(2,\)"),
    "scales that are not square": (
        {"lvl_1L": np.array([[0, 0, 1, 1, 1]])},
        r"lvl_1L\) are not those of patch_nums=\(1, 2\)",
    ),
    "negative scale": ({"lvl_1L": np.array([[-9, 1, 1, 1, 1]])}, r"lvl_1L\) are not those"),
    "too few scales": ({"lvl_1L": np.array([[0, 0, 0, 0, 0]])}, r"patch_nums=\(2,\) give 4 positions"),
    "other vocabulary": (
        {"head__weight": np.zeros((11, 16), np.float32), "head__bias": np.zeros(11, np.float32)},
        r"g.safetensors \(vocabulary 11, code width 4\) does not belong to .*t.safetensors \(vocabulary 10, code width 4\)",
    ),
}


@pytest.mark.parametrize("case", BAD_GENERATORS)
def test_bad_generators(written, tmp_path, case):
    changes, message = BAD_GENERATORS[case]
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path, changed(written[0], **changes), written[1])
    assert "\n" not in str(error.value)


BAD_TOKENIZERS = {
    "unknown name": (
        {"loss__discriminator__weight": np.zeros((3, 2))},
        r"unknown names: loss.discriminator.weight \(3, 2\)",
    ),
    "missing name": ({"encoder__mid__attn_1__qkv__weight": None}, r"missing: encoder/mid/attention/qkv/kernel"),
    "not a tokenizer": ({"quantize__embedding__weight": None}, "no parameter 'quantize.embedding.weight'"),
    "no levels": (
        {"encoder__down__0__block__0__conv1__weight": None},
        "no parameter 'encoder.down.0.block.0.conv1.weight'",
    ),
    "wrong shape": (
        {"quant_conv__weight": np.zeros((4, 5, 3, 3), np.float32)},
        r"quant_conv/kernel .* has \(3, 3, 5, 4\)",
    ),
    "wrong rank": ({"encoder__conv_in__weight": np.zeros((32, 3))}, r"encoder.conv_in.weight has the shape \(32, 3\)"),
}


@pytest.mark.parametrize("case", BAD_TOKENIZERS)
def test_bad_tokenizers(written, tmp_path, case):
    changes, message = BAD_TOKENIZERS[case]
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path, written[0], changed(written[1], **changes))
    assert "\n" not in str(error.value) and "t.safetensors" in str(error.value)


def test_damaged_and_missing_files(written, tmp_path):
    load(tmp_path, *written)
    good, bad = str(tmp_path / "t.safetensors"), tmp_path / "g.safetensors"
    whole = bad.read_bytes()
    for size in (0, 5, 200, len(whole) - 1):
        bad.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="g.safetensors: truncated or damaged"):
            var.load(generator=str(bad), tokenizer=good)
    with pytest.raises(ValueError, match="absent.pth: no such file"):
        var.load(generator=str(tmp_path / "absent.pth"), tokenizer=good)


def test_truncated_official_file(folder, tmp_path):
    whole = (folder / "dev_var.pth").read_bytes()
    path = tmp_path / "cut.pth"
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut.pth"):
            var.load_generator(str(path))


class Payload:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("container", ["pickle", "zip"])
def test_a_pickle_that_runs_code_is_refused(tmp_path, container):
    path, marker = tmp_path / "evil.pth", tmp_path / "it_ran"
    data = pickle.dumps({"head.weight": Payload(marker)})
    if container == "zip":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("evil/data.pkl", data)
            archive.writestr("evil/version", "3\n")
        data = buffer.getvalue()
    path.write_bytes(data)
    for read in (var.load_generator, lambda p: var.load_tokenizer(p, patch_nums=(1, 2))):
        with pytest.raises(ValueError, match="evil.pth"):
            read(str(path))
    assert not marker.exists()
