"""Oracle: the images, encoded one by one with the crops that the cache says were seen."""

import collections
import concurrent.futures
import json
import pickle

import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.data import ArraySource, DataConfig
from jaxgen.data.token_cache import TokenSource, digest, token_batches, write_tokens
from jaxgen.data.transforms import to_channels

N = 37
CONFIG = DataConfig(image_size=6, channels=1, flip=True, mid_scale=1.5, seed=3)
OPTIONS = dict(tokenizer="abc", train=True, vocab=300, views=3, batch_size=8, per_shard=5)


def numbered(n=N, seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (n, 9, 11, 3)).astype(np.uint8)
    return ArraySource(images=images, labels=np.arange(n) % 5, num_classes=5, class_names=tuple("abcde"))


def encode(images):
    """A token for each quarter of an image: its first pixel."""
    assert images.shape == (8, 6, 6, 1) and images.dtype == np.uint8
    return images[:, ::3, ::3, 0].reshape(8, 4).astype(np.int64)


def write(folder, source=None, encode=encode, config=CONFIG, **more):
    write_tokens(folder, source or numbered(), config, encode, **(OPTIONS | more))
    return folder


def assert_true(source, images):
    """Every view of every example is what the recorded crop and flip show."""
    assert len(source) == len(images)
    for i in range(len(images)):
        example = source[i]
        assert example["label"] == images.labels[i]
        for tokens, (top, left, flip) in zip(example["tokens"], example["view"]):
            seen = to_channels(images.images[i], 1)[top : top + 6, left : left + 6]
            seen = seen[:, ::-1] if flip else seen
            np.testing.assert_array_equal(tokens, seen[::3, ::3, 0].reshape(4))


def test_tokens_are_those_of_the_recorded_crops(tmp_path):
    source = TokenSource(str(write(tmp_path)), tokenizer="abc")
    assert_true(source, numbered())
    views = np.concatenate([source[i]["view"] for i in range(N)])
    assert set(views[:, 0]) == {0, 1, 2, 3} and set(views[:, 1]) == set(range(6)) and set(views[:, 2]) == {0, 1}
    assert source[0]["tokens"].dtype == np.uint16
    assert (source.num_classes, source.class_names, source.views) == (5, tuple("abcde"), 3)
    assert_true(pickle.loads(pickle.dumps(source)), numbered())


def test_held_out_images_are_seen_once_in_the_middle(tmp_path):
    source = TokenSource(str(write(tmp_path, train=False, views=1)))
    assert_true(source, numbered())
    assert {tuple(source[i]["view"][0]) for i in range(N)} == {(2, 2, 0)}  # round((11 - 6) / 2) is 2
    with pytest.raises(ValueError, match="views=2: without random crops or flips"):
        write(tmp_path / "more", train=False, views=2)


def test_an_interrupted_cache_goes_on_with_other_hosts(tmp_path):
    """Three hosts are killed at different places; two finish. No shard is encoded twice, and all is as if made by one."""
    calls, shards = collections.Counter(), 8

    class Killed(Exception):
        pass

    def dying(after):
        left = [after]

        def run(images):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return encode(images)

        return run

    for host, after in ((0, 3), (1, 0), (2, 100)):
        try:
            write(tmp_path, encode=dying(after), process_index=host, process_count=3)
        except Killed:
            calls["killed"] += 1
    assert calls["killed"] == 2
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("tokens-*")}
    assert 0 < len(before) < shards and not list(tmp_path.glob(".*.tmp"))
    with pytest.raises(ValueError, match=f"{shards - len(before)} of {shards} shards are missing"):
        TokenSource(str(tmp_path))
    for host in range(2):
        write(tmp_path, process_index=host, process_count=2)
    assert_true(TokenSource(str(tmp_path)), numbered())
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("tokens-*")}
    assert all(after[name] == stamp for name, stamp in before.items()) and len(after) == shards
    one = write(tmp_path / "one")
    for path in sorted(one.glob("*.npy")):
        np.testing.assert_array_equal(np.load(path), np.load(tmp_path / path.name))


def test_hosts_encode_their_share_alone(tmp_path):
    images = []
    for host in range(4):
        images.append(0)

        def counting(x):
            images[-1] += 1
            return encode(x)

        write(tmp_path, encode=counting, process_index=host, process_count=4)
    assert images == [4, 4, 4, 3]  # 2 shards of 15 views in batches of 8; the last one has 2 examples
    assert_true(TokenSource(str(tmp_path)), numbered())


def test_every_option_changes_the_cache_and_an_old_one_is_not_mixed_with_it(tmp_path):
    write(tmp_path)
    for more, match in (
        ({"tokenizer": "xyz"}, "tokenizer abc and not xyz"),
        ({"views": 2}, "views 3 and not 2"),
        ({"per_shard": 6}, "per_shard 5 and not 6"),
        ({"config": DataConfig(image_size=6, channels=1, flip=True, mid_scale=1.5, seed=4)}, "seed 3 and not 4"),
        ({"config": DataConfig(image_size=6, channels=1, mid_scale=1.5, seed=3)}, "'flip': True.*'flip': False"),
        ({"source": numbered(36)}, "examples 37 and not 36"),
    ):
        with pytest.raises(ValueError, match=match):
            write(tmp_path, **more)


def test_what_does_not_fit_is_named(tmp_path):
    for number, (more, match) in enumerate(
        (
            ({"vocab": 100}, "expected integers below vocab=100"),
            ({"encode": lambda x: np.zeros((8, 2), np.float32)}, "tokens float32"),
            ({"views": 0}, "views=0"),
            ({"batch_size": 0}, "batch_size=0"),
            ({"process_index": 2, "process_count": 2}, "process_index=2"),
        )
    ):
        with pytest.raises(ValueError, match=match):
            write(tmp_path / str(number), **more)
    with pytest.raises(ValueError, match="no token cache"):
        TokenSource(str(tmp_path / "nowhere"))
    write(tmp_path / "b")
    with pytest.raises(ValueError, match="tokens of a tokenizer abc, and not of this one, xyz"):
        TokenSource(str(tmp_path / "b"), tokenizer="xyz")
    for number in (2, 0):
        path = tmp_path / "b" / f"tokens-{number:05d}.npy"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ValueError, match=f"tokens-{number:05d}.npy: damaged.*remove it and go on"):
            TokenSource(str(tmp_path / "b"))[5 * number]
    about = json.loads((tmp_path / "b" / "index.json").read_text())
    (tmp_path / "b" / "index.json").write_text(json.dumps(about | {"version": 0}))
    with pytest.raises(ValueError, match="version 0; this program reads version 1"):
        TokenSource(str(tmp_path / "b"))
    (tmp_path / "b" / "index.json").write_text("{")
    with pytest.raises(ValueError, match="index.json: damaged"):
        TokenSource(str(tmp_path / "b"))


def test_continuous_tokens_and_large_vocabularies_keep_their_type(tmp_path):
    def latents(images):
        return images[:, :2, :2, 0].astype(np.float32) / 7

    source = TokenSource(str(write(tmp_path / "a", encode=latents, vocab=0)))
    assert source[3]["tokens"].dtype == np.float32 and source[3]["tokens"].shape == (3, 2, 2)
    batch = next(iter(token_batches(source, batch_size=4, train=True)))
    assert batch["tokens"].dtype == np.float32 and batch["tokens"].shape == (4, 2, 2)
    large = TokenSource(str(write(tmp_path / "b", encode=lambda x: encode(x) + 70_000, vocab=100_000)))
    assert large[0]["tokens"].dtype == np.int32 and large[0]["tokens"].min() >= 70_000


def test_batches_show_every_example_and_in_training_all_its_views(tmp_path):
    source = TokenSource(str(write(tmp_path, source=numbered(12))))
    hosts = [iter(token_batches(source, batch_size=4, train=True, seed=1, shard_index=i, shard_count=2)) for i in range(2)]
    found, views = collections.Counter(), collections.defaultdict(set)
    where = {tuple(t): (i, v) for i in range(12) for v, t in enumerate(source[i]["tokens"].tolist())}
    distinct = {i: len({tuple(t) for t in source[i]["tokens"].tolist()}) for i in range(12)}  # the same crop may be drawn twice
    for _ in range(30 * 12 // 4):
        for host in hosts:
            batch = next(host)
            assert batch["tokens"].dtype == np.int32 and batch["tokens"].shape == (2, 4) and batch["view"].shape == (2, 3)
            for tokens, view, label in zip(batch["tokens"].tolist(), batch["view"], batch["label"]):
                i, v = where[tuple(tokens)]
                assert label == i % 5
                np.testing.assert_array_equal(view, source[i]["view"][v])
                found[i] += 1
                views[i].add(v)
    assert set(found.values()) == {30} and {i: len(seen) for i, seen in views.items()} == distinct
    one = list(token_batches(source, batch_size=8, train=False))
    first = sorted(source[i]["tokens"][0].tolist() for i in range(12))
    assert sorted(np.concatenate([batch["tokens"] for batch in one]).tolist()) == first
    state = hosts[0].get_state()
    want = next(hosts[0])
    hosts[1].set_state(state)
    again = iter(token_batches(source, batch_size=4, train=True, seed=1, shard_index=0, shard_count=2))
    again.set_state(state)
    np.testing.assert_array_equal(next(again)["tokens"], want["tokens"])


def test_shards_are_mapped_and_not_read(tmp_path):
    example = TokenSource(str(write(tmp_path)))[7]
    assert isinstance(example["tokens"], np.memmap) and isinstance(example["view"], np.memmap)


def test_many_threads_may_be_the_first_to_look(tmp_path):
    """Python 3.11's `ast`, by which numpy reads headers, fails in threads."""
    write(tmp_path, source=numbered(12), per_shard=1, views=1)
    source = pickle.loads(pickle.dumps(TokenSource(str(tmp_path))))
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        labels = list(pool.map(lambda i: source[i]["label"], range(12)))
    assert labels == [i % 5 for i in range(12)]


def test_a_digest_is_of_names_shapes_types_and_values():
    tree = {"a": np.arange(6, dtype=np.float32), "b": {"c": np.ones((2, 2))}}
    same = {"b": {"c": jnp.ones((2, 2), jnp.float32)}, "a": jnp.arange(6, dtype=jnp.float32)}
    tree["b"]["c"] = tree["b"]["c"].astype(np.float32)
    assert digest(tree) == digest(same) == digest({"a": tree["a"], "b": tree["b"]})
    others = [
        {"a": tree["a"], "b": {"d": tree["b"]["c"]}},
        {"a": tree["a"].reshape(2, 3), "b": tree["b"]},
        {"a": tree["a"].astype(np.float16), "b": tree["b"]},
        {"a": tree["a"] + 1e-6, "b": tree["b"]},
        {},
    ]
    assert len({digest(tree), *map(digest, others)}) == 6
