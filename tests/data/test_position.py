"""Training that goes on with another number of hosts: every example of an epoch is seen once, by counting."""

import collections
import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxgen.data import ArraySource, DataConfig, batches, make_source, write_tar
from jaxgen.data.position import PositionHandler, PositionRestore, PositionSave

N, BATCH = 60, 4
CONFIG = DataConfig(image_size=4, flip=True, seed=5)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Images whose label is their number, in tar shards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = np.random.default_rng(0).integers(0, 256, (N, 5, 6, 3)).astype(np.uint8)
    array = ArraySource(images=images, labels=np.arange(N), num_classes=N)
    write_tar(array, tmp_path / "set", per_shard=13)
    write_tar(array, tmp_path / "set", per_shard=60, prefix="val")
    return make_source(DataConfig(path=str(tmp_path / "set")), "train")


def hosts(source, count, workers=0):
    config = DataConfig(image_size=4, flip=True, seed=5, workers=workers)
    return [iter(batches(source, config, batch_size=BATCH, train=True, shard_index=i, shard_count=count)) for i in range(count)]


def take(iterators, steps):
    """Global batches: what the hosts get, in the order of the global batch."""
    out = []
    for _ in range(steps):
        parts = [next(it) for it in iterators]
        out += [(int(part["label"][i]), part["image"][i].tobytes()) for i in range(BATCH // len(parts)) for part in parts]
    return out


def test_four_hosts_then_two_then_one(source, tmp_path):
    handler, seen = PositionHandler(), []
    epochs = 2
    plan = [(4, 7), (2, 11), (1, epochs * N // BATCH - 18)]
    for number, (count, steps) in enumerate(plan):
        iterators = hosts(source, count)
        if number:
            for it in iterators:
                handler.restore(tmp_path / str(number - 1), PositionRestore(it))
        seen += take(iterators, steps)
        # Every host is at the same place, so one of them writes it.
        assert all(it.get_state() == iterators[0].get_state() for it in iterators)
        (tmp_path / str(number)).mkdir()
        handler.save(tmp_path / str(number), PositionSave(iterators[0]))
    labels = [label for label, _ in seen]
    for epoch in range(epochs):
        assert collections.Counter(labels[epoch * N : (epoch + 1) * N]) == dict.fromkeys(range(N), 1)
    # Crops and flips too are those of a run that one host made without a break.
    assert seen == take(hosts(source, 1), epochs * N // BATCH)


def test_in_a_checkpoint(source, tmp_path):
    with ocp.CheckpointManager(tmp_path / "steps") as manager:
        (it,) = hosts(source, 1)
        take([it], 3)
        manager.save(3, args=ocp.args.Composite(data=PositionSave(it)))
        manager.wait_until_finished()
        expected = take([it], 2)
        again = hosts(source, 2)
        for one in again:
            manager.restore(3, args=ocp.args.Composite(data=PositionRestore(one)))
        assert take(again, 2) == expected


def test_only_the_first_process_writes(source, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    PositionHandler().save(tmp_path, PositionSave(hosts(source, 1)[0]))
    assert not list(tmp_path.glob("*.json"))


def test_checkpoints_with_a_file_for_each_process(source, tmp_path):
    state = {}
    for i, it in enumerate(hosts(source, 2)):
        next(it), next(it)
        state = it.get_state()
        (tmp_path / f"process_{i}-of-2.json").write_text(json.dumps(state))
    (one,) = hosts(source, 1)
    assert PositionHandler().restore(tmp_path, PositionRestore(one)).get_state() == state
    (tmp_path / "process_0-of-2.json").write_text(json.dumps({"next_index": 99}))
    with pytest.raises(ValueError, match="2 processes were at different places"):
        PositionHandler().restore(tmp_path, PositionRestore(one))
    (tmp_path / "process_0-of-2.json").write_text("{")
    with pytest.raises(ValueError, match="damaged place"):
        PositionHandler().restore(tmp_path, PositionRestore(one))
    with pytest.raises(ValueError, match="no place of the data"):
        PositionHandler().restore(tmp_path / "nowhere", PositionRestore(one))
