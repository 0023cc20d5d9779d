"""The smoke variant from training to editing, with the scripts that a user has."""

import json
import shutil
import signal
import types

import jax
import numpy as np
import pytest
from PIL import Image

from jaxgen import cli
from jaxgen import config as config_lib
from jaxgen.data import digits, pixels
from jaxgen.generators import box_mask
from jaxgen.train import load_config, load_params

EDITS = ("run.log_every=1", "run.save_every=5")
STAGES = ("tokenizer", "generator", "classifier")


def read_rows(workdir, stage=None):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if stage in (None, row["stage"])]


def train_args(config_path, workdir, *edits):
    return ("train", "--config", config_path, "--variant", "smoke", "--workdir", workdir, "--set", *EDITS, *edits)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, processes, config_path):
    workdir = tmp_path_factory.mktemp("smoke") / "run"
    process = processes(train_args(config_path, workdir))
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return types.SimpleNamespace(workdir=workdir, out=out, err=err, rows=read_rows(workdir))


@pytest.fixture
def copied(trained, tmp_path):
    """`copied(stage/step, ...)`: the trained work directory without these checkpoints."""

    def copy(*without):
        workdir = tmp_path / "copy"
        shutil.copytree(trained.workdir, workdir)
        for name in without:
            shutil.rmtree(workdir / "checkpoints" / name)
        return workdir

    return copy


def same_weights(workdir, other, stage):
    jax.tree.map(np.testing.assert_array_equal, load_params(workdir, stage), load_params(other, stage))


def test_what_training_leaves_and_says(trained, config_path):
    assert not trained.err
    for stage in STAGES:
        assert f"\n{stage} 10/10  loss " in trained.out and f"\n{stage} 10/10  evaluation: " in trained.out
        rows = [row for row in trained.rows if row["stage"] == stage]
        assert [row["step"] for row in rows] == [*range(1, 11), 10]
        assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows[:-1])
        assert np.isfinite(rows[-1]["eval/loss"])
        steps = {path.name for path in (trained.workdir / "checkpoints" / stage).iterdir() if path.is_dir()}
        assert steps == {"5", "10"}
    assert [row["stage"] for row in trained.rows] == [stage for stage in STAGES for _ in range(11)]
    expected = cli.load_config_file(config_path).get_config("smoke").config
    assert load_config(trained.workdir) == config_lib.override(expected, EDITS)
    assert {path.name for path in trained.workdir.iterdir()} == {"checkpoints", "config.json", "metrics.jsonl"}


def test_run_again_nothing_is_trained(trained, succeeds, config_path):
    out = succeeds(*train_args(config_path, trained.workdir))
    assert out.splitlines() == [f"{stage} is trained: step 10" for stage in STAGES]
    assert read_rows(trained.workdir) == trained.rows


def test_half_and_half_is_the_whole(trained, copied, succeeds, config_path):
    workdir = copied("generator/10", "classifier/5", "classifier/10")
    lines = succeeds(*train_args(config_path, workdir)).splitlines()
    assert lines[:2] == ["tokenizer is trained: step 10", "generator goes on at step 5/10"]
    assert read_rows(workdir) == trained.rows
    for stage in ("generator", "classifier"):
        same_weights(workdir, trained.workdir, stage)


def test_sigterm_saves_and_the_next_run_goes_on(trained, copied, processes, succeeds, config_path):
    workdir = copied("generator")
    process = processes(train_args(config_path, workdir))
    try:
        for line in process.stdout:
            if line.startswith("generator: compiling"):
                process.send_signal(signal.SIGTERM)
                break
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143, err
    assert err == "SIGTERM: saved stage 'generator' at step 1; run again to go on\n"
    lines = succeeds(*train_args(config_path, workdir)).splitlines()
    assert lines[1] == "generator goes on at step 1/10" and lines[-1] == "classifier is trained: step 10"
    assert read_rows(workdir, "generator") == [row for row in trained.rows if row["stage"] == "generator"]
    same_weights(workdir, trained.workdir, "generator")


def test_four_devices_train_and_sample_what_one_does(trained, copied, processes, succeeds, config_path, tmp_path):
    workdir = copied("generator", "classifier")
    sample = ("sample", "--workdir", workdir, "--labels", "0,1", "--num", 2, "--cfg", 2)
    mesh = ("--mesh", "data=2,fsdp=2")
    four, one = tmp_path / "four.npz", tmp_path / "one.npz"
    process = processes(
        (*train_args(config_path, workdir, "classifier.steps=0", "run.eval_every=0"), *mesh),
        (*sample, "--out", tmp_path / "four.png", "--npz", four, *mesh),
        devices=4,
    )
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert "mesh {'data': 2, 'fsdp': 2, 'tensor': 1, 'sequence': 1}" in out
    expected = [row["loss"] for row in trained.rows if row["stage"] == "generator" and "loss" in row]
    np.testing.assert_allclose([row["loss"] for row in read_rows(workdir, "generator")], expected, rtol=1e-4)
    # Adam divides by the gradient's size, so that the rounding of a tiny gradient shows in the weights.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4),
        load_params(workdir, "generator")[0],
        load_params(trained.workdir, "generator")[0],
    )
    succeeds(*sample, "--out", tmp_path / "one.png", "--npz", one)
    images = [np.load(path)["images"].astype(int) for path in (four, one)]
    assert np.abs(images[0] - images[1]).max() <= 1  # tokens are alike, pixels but for rounding


@pytest.fixture
def sample(trained, succeeds, tmp_path):
    """`sample(*args) -> (bytes of the picture, images [6, 8, 8, 1] uint8)` for two images each of labels 0, 1, 2."""

    def call(*args):
        out, npz = tmp_path / "grid.png", tmp_path / "grid.npz"
        common = ("--workdir", trained.workdir, "--labels", "0,1,2", "--num", 2, "--out", out, "--npz", npz)
        assert succeeds("sample", *common, *args) == f"{out}: 6 samples\n"
        with np.load(npz) as arrays:
            assert arrays["labels"].tolist() == [0, 0, 1, 1, 2, 2]
            return out.read_bytes(), arrays["images"]

    return call


def test_a_picture_with_a_row_a_label(sample, tmp_path):
    _, images = sample()
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    assert picture.shape == (3 * 10 + 2, 2 * 10 + 2) and images.shape == (6, 8, 8, 1) and images.dtype == np.uint8
    for i, image in enumerate(images):
        top, left = 2 + 10 * (i // 2), 2 + 10 * (i % 2)
        np.testing.assert_array_equal(picture[top : top + 8, left : left + 8], image[..., 0])
    assert len({image.tobytes() for image in images}) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.npz", "grid.png"]
    sample("--scale", 3)
    assert np.asarray(Image.open(tmp_path / "grid.png")).shape == (3 * 26 + 2, 2 * 26 + 2)


def test_settings_decide_what_is_sampled(sample):
    first, _ = sample("--seed", 3)
    assert sample("--seed", 3)[0] == sample("--seed", 3, "--step", "best")[0] == first
    others = [sample("--seed", 3, *args)[0] for args in (("--cfg", 50), ("--top_k", 2), ("--top_p", 0.3), ("--temperature", 0.2))]
    others += [sample("--seed", 4)[0], sample("--seed", 3, "--step", 5)[0]]
    assert len({first, *others}) == 7


def test_editing_keeps_what_lies_outside_the_box(trained, sample, tmp_path):
    image = digits("test")[7]["image"]
    Image.fromarray(image[..., 0]).save(tmp_path / "in.png")
    box, key = (0, 0, 1, 0.5), jax.random.fold_in(jax.random.key(5), 0)
    args = ("--image", tmp_path / "in.png", "--box", "0,0,1,0.5", "--seed", 5)
    _, inside = sample(*args)
    _, outside = sample(*args, "--outpaint")
    assert (inside != outside).any()

    recipe, params = cli.open_workdir(trained.workdir)
    tokenizer = recipe.config.build_tokenizer()
    encode = jax.jit(lambda images: tokenizer.apply(params["tokenizer"]["tokenizer"], images, method="encode"))
    tokens = encode(pixels(image)[None])[0]
    right = [np.arange(n * n).reshape(n, n) % n >= n / 2 for n in (2, 4)]
    settings = dict(cfg=1.5, top_k=0, top_p=0.96, temperature=1.0)
    for images, outpaint in ((inside, False), (outside, True)):
        keep = np.concatenate([[True], *((cells ^ outpaint).ravel() for cells in right)])
        labels = np.repeat([0, 1, 2], 2)
        made = recipe.sample(params, key, labels, image=pixels(image), keep=box_mask(box, outpaint=outpaint), **settings)
        np.testing.assert_array_equal(made["tokens"][:, keep], np.broadcast_to(tokens[keep], (6, keep.sum())))
        assert (made["tokens"][:, ~keep] != tokens[~keep]).mean() > 0.5
        np.testing.assert_array_equal(np.round((np.asarray(made["images"]) + 1) * 127.5), images)


def test_evaluate_prints_and_saves_all_measures(trained, succeeds):
    out = succeeds("evaluate", "--workdir", trained.workdir, "--num", 12, "--batch_size", 6, "--cfg", 2, "--seed", 1)
    found = json.loads(out)
    assert json.loads((trained.workdir / "evaluation.json").read_text()) == found
    reconstruction, generation = found["reconstruction"], found["generation"]
    assert set(reconstruction) == {"images", "psnr", "ssim", "codebook_use", "codebook_perplexity"}
    assert reconstruction["images"] == len(digits("test")) == 299
    assert generation.pop("settings") == {"cfg": 2.0, "top_k": 0, "top_p": 0.96, "temperature": 1.0}
    shares = ("class_accuracy", "class_accuracy_real", "precision", "recall")
    assert set(generation) == {"samples", "class_accuracy_ratio", "frechet", "frechet_real", *shares}
    assert generation["samples"] == 12 and all(0 <= generation[name] <= 1 for name in shares)
    # The classifier's accuracy and the tokenizer's distance are those that training measured on the same images.
    evaluated = {row["stage"]: row for row in trained.rows if "eval/loss" in row}
    assert generation["class_accuracy_real"] == pytest.approx(evaluated["classifier"]["eval/accuracy"], abs=1e-6)
    assert reconstruction["psnr"] == pytest.approx(evaluated["tokenizer"]["eval/psnr"], abs=1e-3)
    assert generation["frechet"] > generation["frechet_real"] > 0
