"""Official layouts into a work directory and back. The weights are random: nothing is trained or compiled here."""

import io
import json
import os
import pickle
import re
import shutil
import zipfile

import jax
import numpy as np
import pytest

from jaxgen import cli
from jaxgen.generators import NeighbourLlama
from jaxgen.interop import nar
from jaxgen.interop.files import read_state_dict, write_safetensors
from jaxgen.recipes.neighbours import NeighbourConfig
from jaxgen.train import load_config, load_params

# What the authors' files take for granted.
LIKE_THEIRS = ("tokenizer.ch=32", "tokenizer.groups=32", "tokenizer.attention=true", "tokenizer.phis=2")


@pytest.fixture(scope="module")
def exported(tmp_path_factory, put_weights):
    """(a work directory, the configuration and parameters in it)"""
    workdir = tmp_path_factory.mktemp("convert") / "run"
    return workdir, *put_weights(workdir, *LIKE_THEIRS)


@pytest.fixture
def files(exported, succeeds, tmp_path):
    """The flags and paths of an exported pair."""
    flags = {"--generator": tmp_path / "g.safetensors", "--tokenizer": tmp_path / "t.safetensors"}
    succeeds("convert", "export", "--workdir", exported[0], *(x for pair in flags.items() for x in pair))
    return flags


def arguments(files):
    return [x for pair in files.items() for x in pair]


@pytest.mark.numeric
def test_there_and_back_again_nothing_has_changed(exported, files, succeeds, tmp_path):
    _, config, params = exported
    out = succeeds("convert", "import", "--workdir", tmp_path / "back", *arguments(files))
    assert out == f"{tmp_path}/back: depth 2, scales (1, 2, 4), 10 classes\n"
    for name in ("tokenizer", "generator"):
        found, state = load_params(tmp_path / "back", name)
        jax.tree.map(np.testing.assert_array_equal, found, {name: params[name]})
        assert jax.tree.leaves(state) == []
    back = load_config(tmp_path / "back")
    assert back.data.channels == 1 and back.data.image_size == 8
    for group, names in (("model", "depth width heads num_classes l2_norm"), ("tokenizer", "ch ch_mult vocab width patch_nums")):
        for name in names.split():
            assert getattr(getattr(back, group), name) == getattr(getattr(config, group), name), name
    # The names are the authors'.
    state = read_state_dict(files["--generator"])
    assert state["blocks.1.attn.scale_mul_1H11"].shape == (1, 2, 1, 1) and state["lvl_1L"].tolist() == [[0] + 4 * [1] + 16 * [2]]


def test_a_tokenizer_alone(exported, files, succeeds, tmp_path):
    out = succeeds("convert", "import", "--workdir", tmp_path / "new", "--tokenizer", files["--tokenizer"])
    assert "train a generator on it" in out and [path.name for path in (tmp_path / "new").iterdir()] == ["checkpoints"]
    found, _ = load_params(tmp_path / "new", "tokenizer")
    jax.tree.map(np.testing.assert_array_equal, found["tokenizer"], exported[2]["tokenizer"])


class Attack:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def change(path, edit):
    """Writes the state dict at `path` again after `edit(state)`."""
    state = dict(read_state_dict(path))
    edit(state)
    write_safetensors(path, state)


@pytest.mark.parametrize(
    "flag, damage, message",
    [
        ("--generator", lambda path: path.unlink(), "g.safetensors: no such file"),
        ("--generator", lambda path: path.write_bytes(path.read_bytes()[:5000]), "g.safetensors: truncated or damaged"),
        ("--tokenizer", lambda path: path.write_bytes(b""), "t.safetensors: truncated or damaged"),
        ("--generator", lambda path: change(path, lambda s: s.update(spoon=np.zeros(3))), "g.safetensors: .*spoon"),
        ("--generator", lambda path: change(path, lambda s: s.pop("head.bias")), "g.safetensors: .*head.bias"),
        (
            "--tokenizer",
            lambda path: change(path, lambda s: s.update({"quant_conv.weight": np.zeros((5, 64, 3, 3), np.float32)})),
            r"t.safetensors: .*quant_conv.*5",
        ),
        (
            "--tokenizer",
            lambda path: change(path, lambda s: s.update({"quantize.embedding.weight": np.zeros((7, 4), np.float32)})),
            r"g.safetensors \(vocabulary 16, .* does not belong to .*t.safetensors \(vocabulary 7",
        ),
    ],
)
def test_files_that_cannot_be_used_are_named_and_leave_nothing(files, refused, tmp_path, flag, damage, message):
    damage(files[flag])
    line = refused("convert", "import", "--workdir", tmp_path / "back", *arguments(files))
    assert re.search(message, line), line
    assert not (tmp_path / "back").exists()


def test_code_in_a_checkpoint_never_runs(files, refused, tmp_path):
    mark = tmp_path / "mark"
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"head.weight": Attack(mark)}, protocol=2))
        archive.writestr("archive/version", "3\n")
    evil = tmp_path / "evil.pth"
    evil.write_bytes(stream.getvalue())
    line = refused("convert", "import", "--workdir", tmp_path / "back", *arguments(files | {"--generator": evil}))
    assert str(evil) in line and "system" in line
    assert not mark.exists() and not (tmp_path / "back").exists()


def test_other_arguments(exported, files, refused, tmp_path):
    back = ("convert", "import", "--workdir", tmp_path / "back", *arguments(files))
    assert "patch_nums=(1, 2, 3) give 14 positions" in refused(*back, "--patch_nums", "1,2,3")
    assert "--patch_nums 1,x: 'x' is not int" in refused(*back, "--patch_nums", "1,x")
    assert not (tmp_path / "back").exists()
    taken = refused("convert", "import", "--workdir", exported[0], *arguments(files))
    assert taken == f"--workdir {exported[0]}: already has config.json and checkpoints; import into a new one"

    out = ("convert", "export", "--workdir", exported[0])
    assert "--generator: exporting writes both files" in refused(*out, "--tokenizer", tmp_path / "x.safetensors")
    for bad in (tmp_path / "gone" / "x.safetensors", tmp_path / "x.pth"):
        line = refused(*out, "--generator", tmp_path / "x.safetensors", "--tokenizer", bad)
        assert line == f"--tokenizer {bad}: expected a name that ends in .safetensors, in a folder that exists"
    assert not (tmp_path / "x.safetensors").exists()
    assert "is not a run's directory" in refused("convert", "export", "--workdir", tmp_path, *arguments(files))


def test_convolutions_that_no_scale_uses(put_weights, refused, tmp_path):
    put_weights(tmp_path / "run", *LIKE_THEIRS[:-1], "tokenizer.phis=4")
    files = {"--generator": tmp_path / "g.safetensors", "--tokenizer": tmp_path / "t.safetensors"}
    line = refused("convert", "export", "--workdir", tmp_path / "run", *arguments(files))
    assert "tokenizer.phis=4, of which its 3 scales use 3" in line and not any(path.exists() for path in files.values())


@pytest.mark.parametrize("field, value, theirs", [("groups", 8, 32), ("cosine", "true", False), ("phi_ratio", 0.25, 0.5)])
def test_what_their_files_cannot_say_is_not_exported(exported, refused, tmp_path, field, value, theirs):
    workdir = shutil.copytree(exported[0], tmp_path / "run")
    saved = json.loads((workdir / "config.json").read_text())
    saved["tokenizer"][field] = json.loads(str(value))
    (workdir / "config.json").write_text(json.dumps(saved))
    files = {"--generator": tmp_path / "g.safetensors", "--tokenizer": tmp_path / "t.safetensors"}
    line = refused("convert", "export", "--workdir", workdir, *arguments(files))
    assert f"tokenizer.{field}=" in line and f"are read as {field}={theirs}" in line
    assert not any(path.exists() for path in files.values())


def test_files_of_other_families(shared, succeeds, refused, tmp_path):
    fixtures = shared / "fixtures"
    pair = ("--generator", fixtures / "hmar" / "dev_hmar.pth", "--tokenizer", fixtures / "var" / "dev_vae.pth")
    out = succeeds("convert", "import", "--layout", "hmar", "--workdir", tmp_path / "hmar", *pair)
    assert out == f"{tmp_path}/hmar: depth 3, scales (1, 2, 3, 4), 4 classes\n"
    assert {path.name for path in (tmp_path / "hmar" / "checkpoints").iterdir()} == {"tokenizer", "generator", "refiner"}
    assert load_config(tmp_path / "hmar").refiner_train.steps == 0
    autoencoder = ("--tokenizer", fixtures / "mar" / "dev_kl.ckpt")
    succeeds("convert", "import", "--layout", "kl16", "--workdir", tmp_path / "kl", *autoencoder)
    assert {"encoder", "decoder"} <= load_params(tmp_path / "kl", "tokenizer")[0]["tokenizer"]["params"].keys()
    line = refused("convert", "import", "--layout", "kl16", "--workdir", tmp_path / "no", *pair[:2], *autoencoder)
    assert "--layout kl16: of these files the tokenizer alone is imported" in line


def test_llamas_there_and_back_again(shared, succeeds, refused, tmp_path):
    """A work directory samples as the authors do, and is written as it was read."""
    fixtures = shared / "fixtures" / "llamagen"
    pair = ("--generator", fixtures / "c2i_gpt.pt", "--tokenizer", fixtures / "c2i_vq.pt")
    importing = ("convert", "import", "--layout", "llamagen")
    line = refused(*importing, "--workdir", tmp_path / "no", *pair)
    assert "pass num_heads" in line and not (tmp_path / "no").exists()
    line = refused(*importing, "--workdir", tmp_path / "no", "--patch_nums", "4,8", *pair)
    assert line == "--patch_nums 4,8: models of layout llamagen have one grid"
    out = succeeds(*importing, "--workdir", tmp_path / "run", "--num_heads", "4", *pair)
    assert out == f"{tmp_path}/run: depth 2, scales (8,), 5 classes\n"
    recipe, params = cli.open_workdir(tmp_path / "run")
    reference = dict(np.load(fixtures / "c2i.npz"))
    # A recipe's guidance is counted from 0, the authors' from 1.
    out = recipe.sample(params, jax.random.key(0), reference["cond"], cfg=1.0, top_k=1)
    np.testing.assert_array_equal(out["tokens"], reference["greedy_cfg2"])

    files = {"--generator": tmp_path / "g.safetensors", "--tokenizer": tmp_path / "t.safetensors"}
    said = succeeds("convert", "export", "--workdir", tmp_path / "run", *arguments(files))
    assert said.endswith("does not say --num_heads 4 --patch_nums 8\n")
    told = ("--num_heads", "4", "--patch_nums", "8")
    succeeds(*importing, "--workdir", tmp_path / "back", *told, *arguments(files))
    assert load_config(tmp_path / "back") == recipe.config
    for name in ("tokenizer", "generator"):
        found, _ = load_params(tmp_path / "back", name)
        jax.tree.map(np.testing.assert_array_equal, found, params[name])
    succeeds(*importing, "--workdir", tmp_path / "alone", "--tokenizer", files["--tokenizer"])
    found, _ = load_params(tmp_path / "alone", "tokenizer")
    jax.tree.map(np.testing.assert_array_equal, found, params["tokenizer"])
    for layout in ("rar", "xar", "infinity", "dinov2"):
        line = refused("convert", "import", "--layout", layout, "--workdir", tmp_path / "no", *pair)
        assert line == f"--layout {layout}: there is no recipe of these models; jaxgen.interop.{layout} reads them"


def test_neighbours_there_and_back_again(shared, randomize, succeeds, refused, tmp_path):
    """NAR's own layout with LlamaGen's tokenizer; what its files cannot say is not written."""
    tokenizer = shared / "fixtures" / "llamagen" / "c2i_vq.pt"
    vocab = read_state_dict(tokenizer, "model")["quantize.embedding.weight"].shape[0]
    sizes = dict(width=16, heads=2, kv_heads=2, depth=2, hidden=32)
    module = NeighbourLlama(vocab=vocab, grid=4, num_classes=3, scan_layers=True, **sizes)
    theirs = nar.NAR(generator=module, tokenizer=None, params={"generator": randomize(module.param_shapes())})
    theirs.save(generator=str(tmp_path / "nar.safetensors"))
    files = {"--generator": tmp_path / "nar.safetensors", "--tokenizer": tokenizer}
    told = ("--layout", "nar", "--num_heads", "2", "--patch_nums", "4")
    succeeds("convert", "import", "--workdir", tmp_path / "run", *told, *arguments(files))
    config = load_config(tmp_path / "run")
    assert isinstance(config, NeighbourConfig) and (config.model.depth, config.model.head_depth) == (2, 1)
    assert config.build_generator() == module
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / "run", "generator")[0], theirs.params)
    again = {"--generator": tmp_path / "g.safetensors", "--tokenizer": tmp_path / "t.safetensors"}
    succeeds("convert", "export", "--workdir", tmp_path / "run", *arguments(again))
    before, after = (read_state_dict(path) for path in (files["--generator"], again["--generator"]))
    assert set(before) == set(after)
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])

    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    saved["model"]["theta"] = 500.0
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
    line = refused("convert", "export", "--workdir", tmp_path / "run", *arguments(again))
    assert "model.theta=500.0; files in the authors' layout do not say so, and are read as theta=10000.0" in line
