import gzip

import numpy as np
import pytest

from jaxgen.data.text import TextConfig, decode_bytes, encode_bytes, read_text, text_batches


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(200)))
    return str(path)


def take(config, count, **options):
    it = iter(text_batches(config, **options))
    return np.concatenate([next(it)["tokens"] for _ in range(count)])


def test_the_last_tenth_is_held_out(file):
    config = TextConfig(path=file, length=4)
    np.testing.assert_array_equal(read_text(config, "train"), np.arange(180))
    np.testing.assert_array_equal(read_text(config, "test"), np.arange(180, 200))


def test_two_files_packed_files_and_a_test_file(file, tmp_path):
    packed = tmp_path / "more.gz"
    packed.write_bytes(gzip.compress(b"abc" * 9))
    config = TextConfig(path=f"{file},{packed}", test_path=str(packed), length=4)
    assert bytes(read_text(config, "train")[-27:]) == b"abc" * 9 and len(read_text(config, "train")) == 227
    assert bytes(read_text(config, "test")) == b"abc" * 9
    packed.write_bytes(gzip.compress(b"abc" * 9)[:12])
    with pytest.raises(ValueError, match="more.gz.*cannot be read"):
        read_text(TextConfig(path=str(packed) + "," + file, length=4), "train")


def test_python_brings_a_text_along():
    assert len(read_text(TextConfig(), "train")) > 400_000


def test_training_windows_are_text_and_go_on_for_ever(file):
    config = TextConfig(path=file, length=8, seed=1)
    rows = take(config, 20, split="train", batch_size=6, train=True)
    assert rows.dtype == np.int32 and rows.shape == (120, 9)
    assert (np.diff(rows, axis=1) == 1).all() and rows.max() < 180
    np.testing.assert_array_equal(rows, take(config, 20, split="train", batch_size=6, train=True))
    assert len(np.unique(rows[:, 0] % 8)) > 4  # windows move
    other = take(TextConfig(path=file, length=8, seed=2), 20, split="train", batch_size=6, train=True)
    assert not np.array_equal(rows, other)


def test_hosts_share_the_global_batches(file):
    config = TextConfig(path=file, length=8)
    whole = take(config, 3, split="train", batch_size=6, train=True).reshape(3, 6, 9)
    parts = [
        take(config, 3, split="train", batch_size=6, train=True, shard_index=i, shard_count=2).reshape(3, 3, 9) for i in (0, 1)
    ]
    np.testing.assert_array_equal(whole, np.concatenate(parts, axis=1))


def test_evaluation_is_one_pass(file):
    batches = list(text_batches(TextConfig(path=file, length=4), "test", batch_size=3, train=False))
    rows = np.concatenate([batch["tokens"] for batch in batches])
    np.testing.assert_array_equal(rows[:, :-1].reshape(-1), np.arange(180, 196))


def test_a_saved_place_continues(file):
    config = TextConfig(path=file, length=8)
    it = iter(text_batches(config, "train", batch_size=4, train=True))
    next(it)
    state = it.get_state()
    want = next(it)["tokens"]
    other = iter(text_batches(config, "train", batch_size=4, train=True))
    other.set_state(state)
    np.testing.assert_array_equal(next(other)["tokens"], want)


def test_text_and_bytes():
    tokens, lengths = encode_bytes(["aé", b"\xff"])
    assert tokens.tolist() == [[97, 195, 169], [255, 0, 0]] and lengths.tolist() == [3, 1]
    assert decode_bytes(tokens, lengths) == ["aé", "\ufffd"]


def test_bad_input(file, tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_text(TextConfig(path=str(tmp_path / "none.txt")), "train")
    with pytest.raises(ValueError, match="180 bytes of train text; data.length=180"):
        read_text(TextConfig(path=file, length=180), "train")
    with pytest.raises(ValueError, match="batch_size=3"):
        text_batches(TextConfig(path=file), "train", batch_size=3, train=True, shard_count=2)
    with pytest.raises(ValueError, match="shard_index=2"):
        text_batches(TextConfig(path=file), "train", batch_size=2, train=True, shard_index=2, shard_count=2)
    with pytest.raises(ValueError, match="data.length=0"):
        TextConfig(length=0)
    with pytest.raises(ValueError, match="each needs at least one byte"):
        encode_bytes(["a", ""])
