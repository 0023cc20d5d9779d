"""Training that goes on with another number of hosts: every example of an epoch is seen once, by counting."""

import collections

import numpy as np
import pytest

from jaxgen.data import ArraySource, DataConfig, batches, make_source, write_tar

N, BATCH = 60, 4


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Images whose label is their number, in tar shards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = np.random.default_rng(0).integers(0, 256, (N, 5, 6, 3)).astype(np.uint8)
    array = ArraySource(images=images, labels=np.arange(N), num_classes=N)
    write_tar(array, tmp_path / "set", per_shard=13)
    write_tar(array, tmp_path / "set", per_shard=60, prefix="val")
    return make_source(DataConfig(path=str(tmp_path / "set")), "train")


def hosts(source, count):
    config = DataConfig(image_size=4, flip=True, seed=5)
    return [iter(batches(source, config, batch_size=BATCH, train=True, shard_index=i, shard_count=count)) for i in range(count)]


def take(iterators, steps):
    """Global batches: what the hosts get, in the order of the global batch."""
    out = []
    for _ in range(steps):
        parts = [next(it) for it in iterators]
        out += [(int(label), image.tobytes()) for part in parts for label, image in zip(part["label"], part["image"])]
    return out


def test_four_hosts_then_two_then_one(source):
    seen, state = [], None
    epochs = 2
    plan = [(4, 7), (2, 11), (1, epochs * N // BATCH - 18)]
    for count, steps in plan:
        iterators = hosts(source, count)
        if state is not None:
            for it in iterators:
                it.set_state(state)
        seen += take(iterators, steps)
        # Every host is at the same place, so that any of them can say where another number of hosts goes on.
        (state,) = {str(it.get_state()): it.get_state() for it in iterators}.values()
    labels = [label for label, _ in seen]
    for epoch in range(epochs):
        assert collections.Counter(labels[epoch * N : (epoch + 1) * N]) == dict.fromkeys(range(N), 1)
    # Crops and flips too are those of a run that one host made without a break.
    assert seen == take(hosts(source, 1), epochs * N // BATCH)
