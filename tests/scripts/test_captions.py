"""Models of captions through the scripts."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CAPTIONS = str(Path(__file__).parents[2] / "configs" / "llamagen_captions.py")
EDITS = ("tokenizer_train.steps=3", "model_train.steps=3", "data.captions=24")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images with names and groups, as the emoji have."""
    path = str(tmp_path_factory.mktemp("data") / "named.npz")
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3)).astype(np.uint8)
    np.savez(path, image=images, name=np.array([f"sign {i}" for i in range(40)]), group=np.arange(40) % 3)
    return path


def test_train_sample_and_evaluate(data, tmp_path, succeeds, refused):
    workdir = tmp_path / "run"
    edits = (*EDITS, f"data.path={data}")
    said = succeeds("train", "--config", CAPTIONS, "--variant", "smoke", "--workdir", workdir, "--set", *edits)
    assert "generator 3/3" in said
    flags = ("--workdir", workdir, "--num", 2)
    prompts, out = ("--prompt", "sign 3", "--prompt", "a sign like no other"), tmp_path / "x.png"
    said = succeeds("sample", *flags, *prompts, "--cfg", 2, "--out", out, "--npz", tmp_path / "x.npz")
    assert said == f"{out}: 4 samples\n"
    assert Image.open(out).size == (2 * 16 + 1, 2 * 16 + 1) or Image.open(out).size[0] >= 32
    made = np.load(tmp_path / "x.npz")
    assert made["images"].shape == (4, 16, 16, 3) and made["caption"].tolist() == [p for p in prompts[1::2] for _ in range(2)]
    for args, line in (
        (("--prompt", "a" * 25, "--out", out), f"prompt: '{'a' * 25}' has 25 bytes; expected at most 24 (data.captions)"),
        (("--prompt", "", "--out", out), "prompt: '' is no caption"),
        (("--labels", 1, "--out", out), f"--workdir {workdir}: makes image of captions; give --prompt"),
        (("--prompt", "a", "--out", tmp_path / "x.txt"), "x.txt: the name has to end in .png or .gif"),
    ):
        assert line in refused("sample", *flags, *args)
    said = succeeds("evaluate", "--workdir", workdir, "--num", 3)
    assert '"nll_shuffled"' in said and "not judged" in said
    assert "makes images of captions" in refused("evaluate", "--workdir", workdir, "--inception", "x.pth")
