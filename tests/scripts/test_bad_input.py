"""What a user may get wrong: one line that names the thing and the value, exit code 2, and nothing half-written."""

import json
import logging
import shutil

import numpy as np
import pytest
from PIL import Image

from jaxgen import cli
from jaxgen.data import ArraySource
from jaxgen.data.tar_shards import write_tar


@pytest.fixture
def train(refused, config_path, tmp_path):
    """`train(*edits, flags=()) -> line`; asserts that no work directory was made."""

    def call(*edits, flags=(), variant="smoke", config=config_path):
        workdir = tmp_path / "run"
        line = refused("train", "--config", config, "--variant", variant, "--workdir", workdir, "--set", *edits, *flags)
        assert not workdir.exists()
        return line

    return call


@pytest.mark.parametrize(
    "edit, line",
    [
        ("model.dpth=4", "--set model.dpth: unknown key 'dpth'; known: depth, width"),
        ("mdl.depth=4", "--set mdl.depth: unknown key 'mdl'; known: data, tokenizer"),
        ("model.depth=deep", "--set model.depth=deep: expected int"),
        ("model.depth=2.5", "--set model.depth=2.5: expected int"),
        ("model.scan_layers=1", "--set model.scan_layers=1: expected bool"),
        ("tokenizer.patch_nums=1,x", "--set tokenizer.patch_nums=x: expected int"),
        ("model.depth", "--set 'model.depth': expected key=value"),
        ("model=4", "--set model: 'model' is a group; set one of its fields"),
        ("model.depth=0", "model.depth=0: expected at least 1"),
        ("model.heads=3", "heads=3 does not divide width 16"),
        ("model.mlp_ratio=-1", "model.mlp_ratio=-1.0: expected at least"),
        ("model.drop_path_rate=2", "model.drop_path_rate=2.0: expected a share in [0, 1]"),
        ("model.dtype=float7", "model.dtype='float7': expected one of float32, bfloat16"),
        ("tokenizer.dtype=int8", "tokenizer.dtype='int8': expected one of float32, bfloat16"),
        ("tokenizer.ch=0", "tokenizer.ch=0: expected at least 1"),
        ("tokenizer.ch_mult=", "tokenizer.ch_mult=(): expected at least 1"),
        ("tokenizer.groups=3", "groups=3 does not divide 8 channels"),
        ("tokenizer.patch_nums=2,1,4", "patch_nums (2, 1, 4) must not decrease"),
        ("model_train.batch_size=0", "model_train.batch_size=0: expected at least 1"),
        ("model_train.class_drop=1.5", "model_train.class_drop=1.5: expected a share in [0, 1]"),
        ("model_train.optim.lr=-1", "lr=-1.0: expected a positive number"),
        ("model_train.optim.warmup_steps=10", "warmup_steps=10 must be fewer than the 10 steps"),
        ("tokenizer_train.accumulate=0", "tokenizer_train.accumulate=0: expected at least 1"),
        ("tokenizer_train.perceptual_path=/no.pth", "/no.pth: no such file"),
        ("tokenizer_train.adversarial_weight=1", "layers=3: images of 8x8 take 1 to 1"),
        ("classifier.width=7", "width=7: must be a positive multiple of 8"),
        ("classifier.batch_size=0", "classifier.batch_size=0: expected at least 1"),
        ("run.save_every=0", "save_every=0: expected at least 1"),
        ("data.path=/no/such/place", "data.path='/no/such/place': no such file or folder"),
        ("data.channels=2", "data.channels=2: must be 1 or 3"),
        ("data.image_size=9", "images of 9x9 (data.path=digits, data.image_size=9); the tokenizer's patch_nums=(1, 2, 4)"),
        ("model.num_classes=9", "model.num_classes=9: digits has 10 classes"),
    ],
)
def test_settings(train, edit, line):
    assert line in train(edit)


def test_flags(train, refused, tmp_path):
    assert train(flags=("--mesh", "data=2,fsdp=2")) == "mesh 'data=2,fsdp=2' needs 4 devices, there are 1"
    assert train(flags=("--mesh", "data")) == "mesh 'data': 'data' is not axis=size"
    assert "unknown axis 'model'; known: data, fsdp, tensor" in train(flags=("--mesh", "model=1"))
    assert "--shard pattern 'haed/kernel' matches no parameter; there are " in train(flags=("--shard", "haed/kernel=tensor"))
    fight = train(flags=("--shard", "head/head/kernel=tensor", "head/kernel=-,tensor"))
    assert fight.startswith("--shard patterns 'head/head/kernel' and 'head/kernel' fight over generator/params/head/head")
    assert train(variant="smoky").startswith("variant 'smoky' is not one of smoke, demo, small, d16")
    assert train(config="gone.py") == "--config gone.py: no such file"
    text = tmp_path / "config.txt"
    text.write_text("")
    assert train(config=text) == f"--config {text}: not a Python file"
    text = text.rename(tmp_path / "config.py")
    assert train(config=text) == f"--config {text}: has no function get_config"


def draw_folder(root, size=8, count=12):
    for i in range(count):
        path = root / f"class{i % 2}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((size, size), 20 * i, np.uint8)).save(path)
    return root


def test_images_that_do_not_fit(train, tmp_path):
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path}/empty: no images (looked for .png" in train(f"data.path={tmp_path}/empty")
    draw_folder(tmp_path / "large", size=9)
    assert f"images of 9x9 (data.path={tmp_path}/large, data.image_size=0)" in train(f"data.path={tmp_path}/large")
    images, labels = np.zeros((20, 8, 8), np.float32), np.arange(20) % 2
    np.savez(tmp_path / "float.npz", x_train=images, y_train=labels)
    assert "float.npz: x_train is float32 (20, 8, 8); expected uint8" in train(f"data.path={tmp_path}/float.npz")
    np.savez(tmp_path / "labels.npz", x_train=images.astype(np.uint8), y_train=labels - 1)
    assert "labels.npz: x_train: labels -1 to 0 are not all in [0, " in train(f"data.path={tmp_path}/labels.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "labels.npz").read_bytes()[:300])
    assert "cut.npz: not a readable npz file" in train(f"data.path={tmp_path}/cut.npz")


def test_an_unreadable_image_is_named_or_counted(refused, config_path, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    root = draw_folder(tmp_path / "images")
    broken = root / "class1" / "05.png"
    broken.write_bytes(broken.read_bytes()[:50])
    edits = [f"data.path={root}", "classifier.steps=0"]
    args = ("train", "--config", config_path, "--variant", "smoke", "--workdir", tmp_path / "run", "--set", *edits)
    assert f"cannot read image {broken}" in refused(*args)
    assert not list((tmp_path / "run").glob("checkpoints/*/*")) and not (tmp_path / "run" / "metrics.jsonl").exists()

    recipe = cli.load_config_file(config_path).get_config("smoke").override([*edits, "data.skip_bad=true"])
    stage = recipe.config.resolve().recipe().stages[0]
    batch = next(iter(stage.data(0, 1)))
    assert batch["image"].shape == (16, 8, 8, 1) and 100 not in batch["image"]  # the gray of 05.png
    assert any(str(broken) in line for line in caplog.messages)
    assert any("left out 1 unreadable of" in line for line in caplog.messages)


def test_a_damaged_shard_is_named_or_counted(train, config_path, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 1), np.uint8)
    source = ArraySource(images=images, labels=np.arange(40) % 10, num_classes=10)
    paths = write_tar(source, tmp_path / "shards", per_shard=20)
    with open(paths[1], "r+b") as file:
        file.truncate(700)
    line = train(f"data.path={tmp_path}/shards")
    assert line.startswith("1 of 2 shards are damaged (data.skip_bad leaves them out): ") and paths[1] in line
    with caplog.at_level(logging.WARNING):
        edits = [f"data.path={tmp_path}/shards", "data.skip_bad=true", "data.channels=1"]
        recipe = cli.load_config_file(config_path).get_config("smoke").override(edits)
        recipe.config.resolve()
    assert f"left out: {paths[1]}" in caplog.text and "left out 1 damaged of 2 shards" in caplog.text


@pytest.fixture(scope="module")
def weights(tmp_path_factory, put_weights):
    """A work directory with random weights."""
    workdir = tmp_path_factory.mktemp("weights") / "run"
    put_weights(workdir)
    return workdir


@pytest.fixture
def sample(refused, weights, tmp_path):
    """`sample(*args) -> line`; asserts that nothing was written."""

    def call(*args, workdir=weights):
        out = tmp_path / "out"
        out.mkdir()
        flags = ("--workdir", workdir, "--labels", "0,1", "--num", 2, "--out", out / "x.png", "--npz", out / "x.npz")
        line = refused("sample", *flags, *args)
        out.rmdir()
        return line

    return call


@pytest.mark.parametrize(
    "args, line",
    [
        (("--labels", "0,11"), "label 11 is out of range 0..10 (10 = unconditional)"),
        (("--labels=-1",), "label -1 is out of range 0..10"),
        (("--labels", "0,cat"), "--labels 0,cat: 'cat' is not int"),
        (("--labels", ""), "--labels '': empty"),
        (("--num", 0), "--num 0: must be at least 1"),
        (("--batch_size", 0), "4 labels in batches of 0: expected at least 1 of each"),
        (("--top_p", 1.5), "top_p=1.5: must be in [0, 1]"),
        (("--top_k", 17), "top_k=17: must be in 0..16"),
        (("--temperature", 0), "temperature=0.0: must be > 0 and finite"),
        (("--cfg", "nan"), "cfg=nan: must be finite"),
        (("--step", 7), "no checkpoint of step 7 in "),
        (("--step", "best"), "was evaluated, so none is the best"),
        (("--out", "x.jpg"), "--out x.jpg: the name has to end in .png"),
        (("--npz", "x.np"), "--npz x.np: the name has to end in .npz"),
        (("--outpaint",), "--box and --outpaint edit a picture: --image is missing"),
        (("--option", "depth"), "--option 'depth': expected KEY=VALUE"),
        (("--option", "depth=import os"), "--option 'depth=import os': 'import os' is no Python number, string or tuple"),
        (("--option", "depth=4"), "--option 'depth=4': the sampler of "),
        (("--image", "gone.png"), "cannot read image gone.png: No such file or directory"),
        (("--mesh", "data=2"), "mesh 'data=2' needs 2 devices, there are 1"),
        (("--workdir", "/no/such/place"), "/no/such/place/config.json does not exist: /no/such/place is not a run's directory"),
    ],
)
def test_sampling(sample, args, line):
    assert line in sample(*args)


def test_pictures_to_edit(sample, tmp_path):
    deep, large, fine = (tmp_path / f"{name}.png" for name in ("deep", "large", "fine"))
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(deep)
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(large)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(fine)
    assert sample("--image", deep) == f"cannot read image {deep}: mode I;16 has more than 8 bits a channel"
    assert "images (1, 9, 8, 1): this tokenizer takes [b, 8, 8, 1]" in sample("--image", large)
    assert "box=(0.0, 0.0, 2.0, 1.0): expected 0 <= top < bottom <= 1" in sample("--image", fine, "--box", "0,0,2,1")
    assert "box=(0.5, 0.5)" in sample("--image", fine, "--box", "0.5,0.5")
    assert "smaller than a token: all 21 stay" in sample("--image", fine, "--box", "0.4,0.4,0.45,0.45")


def test_places_that_cannot_be_written(weights, refused, tmp_path, monkeypatch):
    """The folder is a file; the disk is full in the middle of a write."""
    images = np.zeros((2, 8, 8, 1), np.float32)
    monkeypatch.setattr("jaxgen.recipes.evaluation.sample_many", lambda *args, **kwargs: images)
    (tmp_path / "file").write_text("")
    flags = ("sample", "--workdir", weights, "--labels", "0,1", "--num", 1)
    for flag, name in (("--out", "x.png"), ("--npz", "x.npz")):
        path = tmp_path / "file" / name
        line = refused(*flags, "--out", tmp_path / "fine.png", flag, path)
        assert line.startswith(f"{flag} {path}: cannot be written (")
    old = (tmp_path / "fine.png").read_bytes()

    def full(picture, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("PIL.Image.Image.save", full)
    line = refused(*flags, "--out", tmp_path / "fine.png")
    assert line == f"--out {tmp_path}/fine.png: cannot be written (No space left on device)"
    assert (tmp_path / "fine.png").read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "fine.png"]


def test_checkpoints_that_do_not_fit_or_are_damaged(weights, sample, tmp_path):
    def copy(name):
        return shutil.copytree(weights, tmp_path / name)

    other = copy("other")
    saved = json.loads((other / "config.json").read_text())
    saved["model"]["width"] = 32
    (other / "config.json").write_text(json.dumps(saved))
    line = sample(workdir=other)
    assert line.startswith("generator: params/") and " in the checkpoint and " in line and "32" in line
    (other / "config.json").write_text(json.dumps(saved | {"colour": "red"}))
    assert f"{other}/config.json: config NextScaleConfig: unknown fields ['colour']" in sample(workdir=other)
    older = {name: value for name, value in saved.items() if name != "data"} | {"jaxgen": "0.0.1"}
    (other / "config.json").write_text(json.dumps(older))
    line = sample(workdir=other)
    assert line.startswith(f"{other}/config.json (saved by jaxgen 0.0.1; this is ") and "lacks the fields data (now {" in line
    (other / "config.json").write_text("{")
    assert f"cannot read {other}/config.json" in sample(workdir=other)

    cut = copy("cut")
    largest = max((cut / "checkpoints" / "generator").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    assert f"{cut}/checkpoints/generator/0 cannot be read: " in sample(workdir=cut)
    shutil.rmtree(cut / "checkpoints" / "generator")
    assert sample(workdir=cut) == f"no checkpoint in {cut}/checkpoints/generator"


@pytest.mark.parametrize(
    "args, line",
    [
        (("--num", 9), "num=9: at least one sample for each of the 10 classes"),
        (("--num", 10, "--batch_size", 0), "10 labels in batches of 0: expected at least 1 of each"),
        (("--set", "model.depth=3"), "--set model.depth=3: only the data may differ from what was trained"),
        (("--set", "data.path=/no/such/place"), "data.path='/no/such/place': no such file or folder"),
    ],
)
def test_evaluating(weights, refused, args, line):
    assert line in refused("evaluate", "--workdir", weights, *args)
    assert not (weights / "evaluation.json").exists()


def test_a_loss_that_is_not_a_number_stops_the_run(put_weights, refused, config_path, tmp_path):
    """Tokenizer and generator are given; the classifier's learning rate throws it out of the numbers."""
    workdir = tmp_path / "run"
    put_weights(workdir, config=False)
    edits = ("tokenizer_train.steps=0", "model_train.steps=0", "classifier.lr=1e30", "run.save_every=1", "run.log_every=1")
    line = refused("train", "--config", config_path, "--variant", "smoke", "--workdir", workdir, "--set", *edits)
    rows = [json.loads(row) for row in (workdir / "metrics.jsonl").read_text().splitlines()]
    step = rows[-1]["step"]
    assert [None in row.values() for row in rows] == [False] * (step - 1) + [True]
    assert line.startswith(f"stage 'classifier' step {step}: loss ")
    assert f"the last good checkpoint is step {step - 1} in {workdir}/checkpoints/classifier" in line
