"""Text systems through the scripts."""

import re
from pathlib import Path

import pytest

LANGUAGE = str(Path(__file__).parents[2] / "configs" / "language.py")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("text") / "run"


def test_train_and_continue_prompts(workdir, succeeds, refused, tmp_path):
    said = succeeds("train", "--config", LANGUAGE, "--variant", "smoke", "--workdir", workdir, "--set", "model_train.steps=3")
    assert "generator 3/3" in said
    out = tmp_path / "text.txt"
    flags = ("--workdir", workdir, "--num", 2, "--length", 20)
    said = succeeds("sample", *flags, "--prompt", "def ", "--prompt", "In the", "--top_p", 0.9, "--out", out)
    assert re.search(r"text.txt: 4 samples, 60 tokens in 60 calls", said)
    texts = out.read_text(errors="replace").split("\n" + "-" * 40 + "\n")
    assert [text.startswith(prompt) for text, prompt in zip(texts, ("def ", "def ", "In the", "In the"))] == [True] * 4
    either = "either --labels (of classes) or --prompt (captions, text) has to be given"
    for args, line in (
        (("--labels", 1, "--out", tmp_path / "x.png"), f"--workdir {workdir}: makes text; give --prompt"),
        (("--out", out), either),
        (("--prompt", "a", "--labels", 1, "--out", out), either),
        (("--prompt", "a", "--out", tmp_path / "x.png"), "the name has to end in .txt"),
        (("--prompt", "", "--out", out), "each needs at least one byte"),
        (("--prompt", "a" * 21, "--out", out), "expected 1 to max_length=20 tokens"),
        (("--prompt", "a", "--temperature", 0, "--out", out), "temperature=0.0: must be > 0 and finite"),
    ):
        assert line in refused("sample", *flags, *args)
    assert f"--workdir {workdir}: makes text, and this measures images" in refused("evaluate", "--workdir", workdir)
