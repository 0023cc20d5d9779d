"""Work directories in a bucket: etils and tensorstore, as they are, with a bucket in memory."""

import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from fake_gcs import serving
from toy_recipe import eval_loss, make_recipe, make_stage, source

from jaxgen import pictures, storage
from jaxgen.data.token_cache import TokenSource
from jaxgen.metrics import ImageStats
from jaxgen.train import Checkpoints, MetricsLog, Profile, RunConfig, load_config, load_params, save_config, train
from jaxgen.train.log import write_json

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

WORKDIR = "gs://bucket/runs/a"


@pytest.fixture
def bucket():
    with serving() as objects:
        yield objects


def recipe(steps):
    return make_recipe(make_stage("first", steps, eval_data=source(repeat=False), eval_loss=eval_loss, optimizer=optax.adam(0.1)))


def test_training_in_a_bucket_is_training_on_a_disk(bucket, tmp_path):
    run = RunConfig(save_every=2, log_every=1, eval_every=2)
    lines = []
    train(recipe(2), WORKDIR, run=run, log=lines.append)
    train(recipe(5), WORKDIR, run=run, log=lines.append)  # goes on
    assert "first goes on at step 2/5" in lines
    train(recipe(5), tmp_path, run=run, log=lambda line: None)
    theirs, ours = load_params(WORKDIR, "first"), load_params(tmp_path, "first")
    jax.tree.map(np.testing.assert_array_equal, theirs, ours)
    rows = storage.read_text(storage.place(WORKDIR) / "metrics.jsonl")
    assert rows == (tmp_path / "metrics.jsonl").read_text() and rows.count("\n") == 5 + 3
    files = {name.removeprefix("bucket/runs/a/") for name in bucket.objects}
    assert {"config.json", "metrics.jsonl", "checkpoints/first/5/commit_success.txt"} <= files
    assert {name.split("/")[2] for name in files if name.startswith("checkpoints/")} == {
        path.name for path in (tmp_path / "checkpoints" / "first").iterdir()
    }
    # Arrays went through tensorstore's client.
    assert any(request.startswith("POST") for request in bucket.requests)


def test_what_a_killed_save_left_does_not_count(bucket):
    train(recipe(2), WORKDIR, run=RunConfig(save_every=1), log=lambda line: None)
    del bucket.objects["bucket/runs/a/checkpoints/first/2/commit_success.txt"]
    expected = load_params(WORKDIR, "first", 1)
    jax.tree.map(np.testing.assert_array_equal, load_params(WORKDIR, "first"), expected)
    lines = []
    with Checkpoints(WORKDIR, "first", log=lines.append) as checkpoints:
        assert checkpoints.steps() == [1] and str(checkpoints.directory) == f"{WORKDIR}/checkpoints/first"
    assert lines == [f"removing the incomplete checkpoint {WORKDIR}/checkpoints/first/2"]
    assert not any("/first/2/" in name for name in bucket.objects)


def test_a_damaged_checkpoint_is_named(bucket):
    train(recipe(1), WORKDIR, log=lambda line: None)
    data = max((name for name in bucket.objects if "/state/d/" in name), key=lambda name: len(bucket.objects[name][0]))
    bucket.put(data, bucket.objects[data][0][:100])
    with pytest.raises(ValueError, match=rf"checkpoint {WORKDIR}/checkpoints/first/1 cannot be read: .* cut short at 100 bytes"):
        load_params(WORKDIR, "first")
    del bucket.objects[data]
    with pytest.raises(ValueError, match=rf"checkpoint {WORKDIR}/checkpoints/first/1 cannot be read: .* is missing"):
        load_params(WORKDIR, "first")
    with pytest.raises(ValueError, match="no checkpoint in gs://bucket/other/checkpoints/first"):
        load_params("gs://bucket/other", "first")


def test_rows_are_written_with_each_checkpoint_and_after_a_while(bucket):
    now = [0.0]
    path = storage.place(WORKDIR) / "a.txt"
    lines = storage.Lines(path, every_s=30.0, clock=lambda: now[0])
    lines.add("one")
    assert not path.exists() and lines.read() == ["one"]
    now[0] = 30.0
    lines.add("two")
    assert path.read_text() == "one\ntwo\n"
    lines.add("three")
    lines.flush()
    generation = bucket.objects["bucket/runs/a/a.txt"][1]
    lines.flush()
    assert bucket.objects["bucket/runs/a/a.txt"] == (b"one\ntwo\nthree\n", generation)
    again = storage.Lines(path)
    again.add("four")
    again.close()
    assert path.read_text() == "one\ntwo\nthree\nfour\n"
    with MetricsLog(WORKDIR) as log:
        log.write("first", 1, {"loss": 1.0})
        log.write("first", 2, {"loss": 1.0})
        log.rewind("first", 1)
    assert [json.loads(row)["step"] for row in log.path.read_text().splitlines()] == [1]


def test_training_goes_on_while_a_checkpoint_is_written(bucket):
    """The bucket takes nothing of the checkpoint of update 4 until update 5 is done."""
    lines, seen = [], []

    def log(line):
        lines.append(line)
        if line.startswith("first 4/7"):
            seen.append(any(name.endswith("first/4/commit_success.txt") for name in bucket.objects))
            bucket.gate.clear()
        if line.startswith("first 5/7"):
            seen.append(any(name.endswith("first/4/commit_success.txt") for name in bucket.objects))
            bucket.gate.set()

    train(recipe(7), WORKDIR, run=RunConfig(save_every=4, keep=2, log_every_s=0.0), log=log)
    assert seen == [False, False] and not bucket.late
    with Checkpoints(WORKDIR, "first") as checkpoints:
        assert checkpoints.steps() == [4, 7]


def test_a_trace_is_copied_when_it_ends(bucket, monkeypatch):
    """The profiler itself can only write to a disk."""
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: folders.append(Path(folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: storage.write_text(folders[0] / "plugins" / "a.pb", "trace"))
    folders, lines = [], []
    with Profile(f"{WORKDIR}/profile", 1, 1, lines.append) as profile:
        for _ in range(3):
            profile.before_update()
    assert bucket.objects["bucket/runs/a/profile/plugins/a.pb"][0] == b"trace"
    assert lines == [f"a trace of 1 updates is in {WORKDIR}/profile"] and not folders[0].exists()


def test_pictures_measures_and_statistics(bucket):
    folder = storage.place(WORKDIR)
    pictures.save_png(f"{WORKDIR}/samples.png", np.zeros((2, 2, 3), np.uint8))
    assert bucket.objects["bucket/runs/a/samples.png"][0].startswith(b"\x89PNG")
    write_json(folder / "evaluation.json", {"fid": 1.0})
    assert json.loads(storage.read_text(folder / "evaluation.json")) == {"fid": 1.0}
    rng = np.random.default_rng(0)
    seen = {name: rng.normal(size=(4, 3)).astype(np.float32) for name in ("pool", "spatial", "logits")}
    stats = ImageStats.empty(3, 3, 3, keep=4).update(seen, np.arange(4))
    stats.save(f"{WORKDIR}/quality")
    loaded = ImageStats.load(f"{WORKDIR}/quality")
    np.testing.assert_array_equal(loaded.kept(), stats.kept())
    np.testing.assert_array_equal(loaded.pool.cov, stats.pool.cov)


def test_what_a_bucket_cannot_hold_or_say_is_named(bucket, monkeypatch):
    with pytest.raises(ValueError, match="gs://bucket/tokens: a token cache cannot be in a bucket"):
        TokenSource("gs://bucket/tokens")

    def refuse(*args, **kwargs):
        raise RuntimeError("401 Anonymous caller")

    save_config(WORKDIR, recipe(1).config)
    monkeypatch.setattr(bucket, "_open", refuse)
    with pytest.raises(ValueError, match=f"cannot read {WORKDIR}/config.json: RuntimeError: 401 Anonymous caller"):
        load_config(WORKDIR)
    with pytest.raises(ValueError, match=f"cannot write {WORKDIR}/config.json: RuntimeError: 401 Anonymous caller"):
        save_config(WORKDIR, recipe(1).config, replace=True)
    monkeypatch.setattr(bucket, "exists", refuse)
    with pytest.raises(ValueError, match=f"cannot read {WORKDIR}: RuntimeError: 401"):
        train(recipe(1), WORKDIR, log=lambda line: None)
