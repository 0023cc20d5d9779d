import json
import pathlib
import struct
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxgen.interop import files

FIXTURES = pathlib.Path(__file__).parents[3] / "shared" / "fixtures"


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        f"w{seed}": rng.normal(size=(3, 4)).astype(np.float32),
        f"bf{seed}": rng.normal(size=5).astype(ml_dtypes.bfloat16),
        f"scalar{seed}": np.array(7, np.int64),
        f"empty{seed}": np.zeros((0, 2), np.float32),
    }


def assert_same(got, want):
    assert set(got) == set(want)
    for name in want:
        assert got[name].dtype == want[name].dtype and got[name].shape == want[name].shape, name
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_safetensors_round_trip_whatever_the_strides(tmp_path):
    want = tensors() | {"turned": np.arange(6.0).reshape(2, 3).T, "cut": np.arange(9.0)[::2]}
    files.write_safetensors(tmp_path / "x.safetensors", want | {"jax": jnp.arange(3)}, metadata={"format": "pt"})
    assert_same(files.read_state_dict(tmp_path / "x.safetensors"), want | {"jax": np.arange(3, dtype=np.int32)})
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    (tmp_path / "plain").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    # The published format, read by hand: a length, a JSON header, little-endian bytes.
    raw = (tmp_path / "x.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    start, end = header["turned"]["data_offsets"]
    assert header["turned"]["shape"] == [3, 2] and header["__metadata__"] == {"format": "pt"}
    np.testing.assert_array_equal(np.frombuffer(raw[8 + length + start : 8 + length + end]), [0, 3, 1, 4, 2, 5])


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    files.write_safetensors(path, tensors())

    def full(tensors, filename, metadata=None):
        pathlib.Path(filename).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(ValueError, match="x.safetensors: could not be written .*No space left"):
        files.write_safetensors(path, tensors(1))
    monkeypatch.undo()
    assert_same(files.read_state_dict(path), tensors())
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    with pytest.raises(ValueError, match="nowhere.*could not be written"):
        files.write_safetensors(tmp_path / "nowhere" / "x.safetensors", tensors())
    with pytest.raises(ValueError, match="end in .safetensors"):
        files.write_safetensors(tmp_path / "x.pth", tensors())


def test_hugging_face_folders(tmp_path):
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    whole.mkdir()
    files.write_safetensors(whole / "model.safetensors", tensors())
    assert_same(files.read_state_dict(whole), tensors())
    shards.mkdir()
    files.write_safetensors(shards / "a.safetensors", tensors(1))
    files.write_safetensors(shards / "b.safetensors", tensors(2))
    index = {name: "a.safetensors" for name in tensors(1)} | {name: "b.safetensors" for name in tensors(2)}
    (shards / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert_same(files.read_state_dict(shards), tensors(1) | tensors(2))
    assert_same(files.read_state_dict(shards / "model.safetensors.index.json"), tensors(1) | tensors(2))

    for bad, reason in [
        ({**index, "gone": "a.safetensors"}, "not in the shards: \\['gone'\\]"),
        ({k: v for k, v in index.items() if k != "w1"}, "not in the index: \\['w1'\\]"),
        ({**index, "w1": "../whole/model.safetensors"}, "'../whole/model.safetensors' is not the name of a file"),
        ({**index, "w1": "c.safetensors"}, "c.safetensors: no such file"),
        ([], "not an index of shards"),
    ]:
        (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": bad}))
        with pytest.raises(ValueError, match=reason):
            files.read_state_dict(shards)
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="bare: the folder holds none of model.safetensors"):
        files.read_state_dict(tmp_path / "bare")


def test_bad_files(tmp_path):
    files.write_safetensors(tmp_path / "x.safetensors", tensors())
    whole = (tmp_path / "x.safetensors").read_bytes()
    for length in (0, 4, 40, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut.safetensors: truncated or damaged"):
            files.read_state_dict(tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match="none.pth: no such file"):
        files.read_state_dict(tmp_path / "none.pth")
    (tmp_path / "x.h5").write_bytes(whole)
    with pytest.raises(ValueError, match="x.h5: unknown extension; known: .pth"):
        files.read_state_dict(tmp_path / "x.h5")
    with pytest.raises(ValueError, match="no key 'model'"):
        files.read_state_dict(tmp_path / "x.safetensors", key="model")
    files.write_safetensors(tmp_path / "none.safetensors", {})
    with pytest.raises(ValueError, match="none.safetensors: expected tensors, found nothing"):
        files.read_state_dict(tmp_path / "none.safetensors")


def test_keys(monkeypatch, tmp_path):
    w = {"w": np.zeros(2)}
    tree = {"trainer": {"var": w, "epoch": 3}, "model": w, "mixed": {"w": np.zeros(2), "lr": 0.1}, "epoch": 1}
    (tmp_path / "x.pt").touch()
    monkeypatch.setattr(files.torch_pickle, "load", lambda path: tree)
    assert files.read_checkpoint(tmp_path / "x.pt") is tree
    assert files.read_state_dict(tmp_path / "x.pt", "model") is w
    assert files.read_state_dict(tmp_path / "x.pt", ("trainer", "var")) is w
    for key, reason in [
        (
            None,
            "expected tensors, found other things: 'trainer', 'model', 'mixed', 'epoch'; its dicts: 'trainer', 'model'",
        ),
        ("mixed", "expected tensors under 'mixed', found other things: 'lr'"),
        ("epoch", "expected tensors under 'epoch', found other things: .*it is a int"),
        (("trainer", "vae"), r"no key 'vae' in the checkpoint\['trainer'\]; its dicts: 'var'"),
        (("epoch", "x"), r"no key 'x' in the checkpoint\['epoch'\]; it is a int"),
    ]:
        with pytest.raises(ValueError, match=f"x.pt: {reason}"):
            files.read_state_dict(tmp_path / "x.pt", key)
    monkeypatch.setattr(files.torch_pickle, "load", lambda path: [1])
    with pytest.raises(ValueError, match="x.pt: holds a list"):
        files.read_checkpoint(tmp_path / "x.pt")


@pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"no checkpoints at {FIXTURES}")
def test_published_layouts():
    """The containers of the systems that users bring; names and a few sizes are in the fixtures' own notes."""
    assert "pos_1LC" in files.read_state_dict(FIXTURES / "var" / "dev_var.pth")
    mar = FIXTURES / "mar" / "dev_checkpoint-last.pth"
    assert set(files.read_state_dict(mar, "model")) == set(files.read_state_dict(mar, "model_ema"))
    assert "quant_conv.weight" in files.read_state_dict(FIXTURES / "mar" / "dev_kl.ckpt", "model")
    assert isinstance(files.read_checkpoint(FIXTURES / "acdit" / "dev_acdit.pt")["args"]["patch_size"], int)
    assert files.read_state_dict(FIXTURES / "titok" / "dev_rgb_titok.bin")
    assert files.read_state_dict(FIXTURES / "fastspeech2" / "dev_900000.pth.tar", "model")
    assert files.read_state_dict(FIXTURES / "bd3lm" / "dev_bs1")


def test_importing_and_reading_needs_no_torch(tmp_path):
    files.write_safetensors(tmp_path / "x.safetensors", tensors())
    code = (
        "import sys; from jaxgen.interop import files;"
        f"files.read_state_dict({str(tmp_path / 'x.safetensors')!r});"
        "assert not {'torch', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pathlib.Path(__file__).parents[2])
