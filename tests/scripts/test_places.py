"""Work directories given as URLs: `jaxgen.storage` reads those of this machine as it does those of buckets."""

import json

import pytest
from PIL import Image

from jaxgen.train import load_params


def test_an_import_into_a_url(put_weights, refused, succeeds, tmp_path):
    put_weights(tmp_path / "run", "tokenizer.ch=32", "tokenizer.groups=32", "tokenizer.attention=true", "tokenizer.phis=2")
    files = ("--generator", tmp_path / "g.safetensors", "--tokenizer", tmp_path / "t.safetensors")
    succeeds("convert", "export", "--workdir", (tmp_path / "run").as_uri(), *files)
    url = (tmp_path / "new").as_uri()
    assert succeeds("convert", "import", "--workdir", url, *files).startswith(f"{url}: depth 2")
    assert sorted(load_params(tmp_path / "new", "generator")[0]) == ["generator"]
    said = refused("convert", "import", "--workdir", url, *files)
    assert said == f"--workdir {url}: already has config.json and checkpoints; import into a new one"


@pytest.mark.slow  # half a dozen programs of a whole system
def test_the_demo_in_a_url(put_weights, succeeds, tmp_path):
    weights = ("tokenizer_train.steps=0", "model_train.steps=0", "classifier.steps=0")  # taken as they are
    put_weights(tmp_path / "demo", *weights, config=False)
    url = (tmp_path / "demo").as_uri()
    out = succeeds("demo", "--variant", "smoke", "--workdir", url, "--num", 20, "--set", *weights)
    # What is named is what is there.
    assert out.endswith(f"see {tmp_path}/demo/samples.png, reconstructions.png, scales.png, metrics.json\n")
    measures = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    assert measures["reconstruction"]["images"] > 0 and measures["seconds"]["all"] >= measures["seconds"]["training"]
    for name in ("samples", "reconstructions", "scales"):
        assert Image.open(tmp_path / "demo" / f"{name}.png").size[0] > 48
