import collections
import dataclasses
import gc
import json
import threading
import time

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxgen.data import ArraySource, DataConfig, batches, info, make_source


def numbered(n, size=(5, 6), channels=1):
    """`n` images, the i-th of which is random with the label i."""
    images = np.random.default_rng(0).integers(0, 256, (n, *size, channels)).astype(np.uint8)
    return ArraySource(images=images, labels=np.arange(n), num_classes=n)


CONFIG = DataConfig(channels=1, image_size=5, flip=True, seed=3)


def take(iterator, n):
    return [next(iterator) for _ in range(n)]


def reader(source, config=CONFIG, batch_size=4, train=True, **kwargs):
    return iter(batches(source, config, batch_size=batch_size, train=train, **kwargs))


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        np.testing.assert_array_equal(x["image"], y["image"])
        np.testing.assert_array_equal(x["label"], y["label"])


def labels(found):
    return np.concatenate([b["label"] for b in found]).tolist()


def test_batches_have_the_promised_types():
    batch = next(reader(numbered(9), dataclasses.replace(CONFIG, channels=3)))
    assert batch["image"].shape == (4, 5, 5, 3) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (4,) and batch["label"].dtype == np.int32


@pytest.mark.parametrize("shards", [1, 3])
def test_every_training_epoch_has_each_example_once_in_a_new_order(shards):
    n, epochs = 15, 4
    parts = [
        labels(take(reader(numbered(n), batch_size=3, shard_index=i, shard_count=shards), epochs * n // 3)) for i in range(shards)
    ]
    order = [part[k] for k in range(epochs * n // shards) for part in parts]
    by_epoch = [order[e * n : (e + 1) * n] for e in range(epochs)]
    for epoch in by_epoch:
        assert sorted(epoch) == list(range(n))
    assert len({tuple(epoch) for epoch in by_epoch}) == epochs and by_epoch[0] != list(range(n))


def test_global_batches_do_not_depend_on_the_number_of_hosts():
    source = numbered(10)
    one = take(reader(source, batch_size=6), 5)
    two = [take(reader(source, batch_size=6, shard_index=i, shard_count=2), 5) for i in range(2)]
    for whole, *halves in zip(one, *two):
        joined = {key: np.concatenate([h[key] for h in halves]) for key in ("image", "label")}
        assert_same([joined], [whole])


def test_a_batch_may_be_larger_than_the_source():
    found = labels(take(reader(numbered(3), batch_size=8), 3))
    assert collections.Counter(found) == {0: 8, 1: 8, 2: 8}


def test_one_example():
    assert labels(take(reader(numbered(1), batch_size=2), 2)) == [0] * 4


@pytest.mark.parametrize("n, sizes", [(11, [4, 4, 3]), (8, [4, 4]), (2, [2])])
def test_evaluation_is_one_whole_pass(n, sizes):
    found = list(reader(numbered(n), train=False))
    assert [len(b["label"]) for b in found] == sizes
    assert sorted(labels(found)) == list(range(n))


@pytest.mark.parametrize("n, batch_size", [(12, 6), (11, 6), (13, 6), (1, 3), (20, 3)])
def test_evaluating_hosts_stay_in_step_and_miss_nothing(n, batch_size):
    kwargs = dict(batch_size=batch_size, train=False, shard_count=3)
    hosts = [list(reader(numbered(n), shard_index=i, **kwargs)) for i in range(3)]
    assert len({tuple(len(b["label"]) for b in host) for host in hosts}) == 1
    count = collections.Counter(label for host in hosts for label in labels(host))
    assert set(count) == set(range(n)) and sum(count.values()) - n == -n % 3


def test_the_seed_decides_order_and_augmentation():
    source = numbered(20)
    first = take(reader(source), 8)
    assert_same(first, take(reader(source), 8))
    other = dataclasses.replace(CONFIG, seed=4)
    assert labels(first) != labels(take(reader(source, other), 8))


def test_neighbouring_seeds_do_not_share_orders():
    # Grain shuffles epoch e with seed + e; a seed used as it is would give run 4 the second epoch of run 3.
    source = numbered(8)
    three = labels(take(reader(source, batch_size=8), 4))
    four = labels(take(reader(source, dataclasses.replace(CONFIG, seed=4), batch_size=8), 4))
    epochs = [{tuple(run[8 * e : 8 * e + 8]) for e in range(4)} for run in (three, four)]
    assert not epochs[0] & epochs[1]


def test_augmentation_differs_between_epochs_and_is_only_for_training():
    source = numbered(1, size=(5, 9))
    crops = {b["image"].tobytes() for b in take(reader(source, batch_size=1), 60)}
    windows = [source.images[0, :, j : j + 5] for j in range(5)]
    assert crops == {w.tobytes() for w in windows} | {np.ascontiguousarray(w[:, ::-1]).tobytes() for w in windows}
    centre = next(reader(source, batch_size=1, train=False))["image"][0]
    np.testing.assert_array_equal(centre, windows[2])


def test_each_option_changes_the_batches():
    source = numbered(6, size=(6, 9), channels=3)
    base = DataConfig(image_size=4)
    plain = next(reader(source, base))["image"]
    for change in (dict(flip=True), dict(mid_scale=1.5), dict(seed=1)):
        changed = next(reader(source, dataclasses.replace(base, **change)))["image"]
        assert changed.shape == plain.shape and (changed != plain).any(), change
    assert next(reader(source, dataclasses.replace(base, image_size=5)))["image"].shape == (4, 5, 5, 3)
    assert next(reader(source, dataclasses.replace(base, channels=1)))["image"].shape == (4, 4, 4, 1)
    assert next(reader(source, DataConfig()))["image"].shape == (4, 6, 9, 3)


# State.


@pytest.mark.parametrize("train", [True, False])
def test_a_restored_iterator_continues_exactly(train):
    source = numbered(30)
    straight = take(reader(source, train=train), 7)
    first = reader(source, train=train)
    take(first, 3)
    state = json.loads(json.dumps(first.get_state()))
    second = reader(source, train=train)
    second.set_state(state)
    assert_same(take(second, 4), straight[3:])
    assert_same(take(first, 4), straight[3:])
    first.set_state(state)  # back in time
    assert_same(take(first, 2), straight[3:5])


def test_state_goes_through_an_orbax_checkpoint(tmp_path):
    source = numbered(30)
    straight = take(reader(source), 6)
    iterator = reader(source)
    take(iterator, 2)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
    with ocp.CheckpointManager(tmp_path) as manager:
        fresh = reader(source)
        manager.restore(1, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(fresh)))
    assert_same(take(fresh, 4), straight[2:])


def test_worker_processes_make_the_same_batches_and_states():
    source = numbered(20)
    with_workers = dataclasses.replace(CONFIG, workers=2)
    straight = take(reader(source), 9)

    iterator = reader(source, with_workers)
    assert_same(take(iterator, 3), straight[:3])
    state = iterator.get_state()
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)

    here = reader(source)
    here.set_state(state)
    assert here.get_state() == state
    assert_same(take(here, 3), straight[3:6])
    there = reader(source, dataclasses.replace(CONFIG, workers=1), train=False)
    there.set_state({"next_index": 3})
    assert_same(list(there), list(reader(source, train=False))[3:])


def test_an_error_in_a_worker_process_arrives(tmp_path):
    (tmp_path / "a.png").write_bytes(b"broken")
    (tmp_path / "b.png").write_bytes(b"broken")
    config = DataConfig(path=str(tmp_path), image_size=8, workers=1)
    with pytest.raises(ValueError, match="cannot read image .*a.png"):
        list(reader(make_source(config, "train"), config, train=False))


def test_threads_end_with_their_iterator():
    def readers():
        return {t for t in threading.enumerate() if t.name.startswith("grain-prefetch")}

    before = readers()  # other tests' iterators may not have been collected yet
    iterator = reader(numbered(30))
    next(iterator)
    started = readers() - before
    assert started
    iterator.close()
    del iterator
    list(reader(numbered(30), train=False))
    gc.collect()
    deadline = time.monotonic() + 10
    while readers() - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not readers() - before


def test_thousands_of_small_images_a_second():
    source = numbered(1000, size=(28, 28))
    iterator = reader(source, DataConfig(channels=1), batch_size=100)
    next(iterator)
    start = time.process_time()  # of all threads, so a busy machine does not count
    take(iterator, 60)
    assert 6000 / (time.process_time() - start) > 5000  # measured: 20,000


# Errors.


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(batch_size=0), "batch_size=0"),
        (dict(batch_size=4, shard_count=3), "batch_size=4.*3 hosts"),
        (dict(shard_index=2, shard_count=2), "shard_index=2"),
        (dict(shard_index=-1, shard_count=2), "shard_index=-1"),
    ],
)
def test_arguments_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match=message):
        reader(numbered(5), **kwargs)


def test_images_of_two_sizes_need_an_image_size():
    class Mixed:
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return {"image": np.zeros((4, 4 + (i == 2), 3), np.uint8), "label": 0}

        def name(self, i):
            return f"picture {i}"

    message = r"picture 2: size \(4, 5\) differs from \(4, 4\) of picture 0; set data.image_size"
    with pytest.raises(ValueError, match=message):
        list(reader(Mixed(), DataConfig(), train=False))
    assert len(labels(reader(Mixed(), DataConfig(image_size=4), train=False))) == 3


@pytest.mark.parametrize(
    "field, value",
    [
        ("path", ""),
        ("image_size", -1),
        ("image_size", 2.5),
        ("channels", 2),
        ("flip", 1),
        ("mid_scale", 0.5),
        ("mid_scale", float("nan")),
        ("skip_bad", "yes"),
        ("seed", -1),
        ("workers", -1),
        ("workers", True),
    ],
)
def test_config_names_the_field_and_the_value(field, value):
    with pytest.raises(ValueError, match=f"data.{field}={value!r}"):
        DataConfig(**{"image_size": 8, field: value})


def test_mid_scale_without_a_size_would_do_nothing():
    with pytest.raises(ValueError, match="data.mid_scale=1.125.*image_size"):
        DataConfig(mid_scale=1.125)


def test_paths_that_are_no_data(tmp_path):
    with pytest.raises(ValueError, match="data.path='.*gone.npz': no such file or folder"):
        make_source(DataConfig(path=str(tmp_path / "gone.npz")), "train")
    text = tmp_path / "a.txt"
    text.write_text("x")
    with pytest.raises(ValueError, match="a.txt': neither"):
        make_source(DataConfig(path=str(text)), "train")
    with pytest.raises(ValueError, match="split 'val'"):
        make_source(DataConfig(), "val")


def test_npz_is_read_again_when_it_changes(tmp_path):
    path = tmp_path / "a.npz"
    config = DataConfig(path=str(path))
    np.savez(path, image=np.zeros((20, 4, 4), np.uint8))
    assert make_source(config, "train") is make_source(config, "train") and len(make_source(config, "train")) == 18
    np.savez(path, image=np.zeros((30, 4, 4), np.uint8))
    assert len(make_source(config, "train")) == 27


def test_info():
    facts = info(DataConfig(path="digits", channels=1))
    assert facts == {
        "num_classes": 10,
        "class_names": tuple("0123456789"),
        "image_shape": (8, 8, 1),
        "n_train": 1498,
        "n_test": 299,
    }
    assert info(DataConfig(path="digits", image_size=16))["image_shape"] == (16, 16, 3)


def test_what_is_not_there_is_drawn(tmp_path):
    for there in (DataConfig(), DataConfig(path="world"), DataConfig(path=str(tmp_path))):
        assert there.or_drawn() is there
    gone = DataConfig(path=str(tmp_path / "gone"), image_size=16)
    assert gone.or_drawn() == dataclasses.replace(gone, path="world")
    assert make_source(gone.or_drawn(), "train")[0]["image"].shape == (16, 16, 3)
