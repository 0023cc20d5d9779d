"""Windows of films and moving digits: which frames there are, which split they are of, and what is refused."""

import dataclasses

import numpy as np
import pytest

from jaxgen.data import digits
from jaxgen.data.clips import ClipConfig, clips, moving_digits


@pytest.fixture
def path(tmp_path):
    """Two films whose pixels tell the frame, one of them with a cut behind frame 4."""
    still = np.arange(24, dtype=np.uint8)[:, None, None, None]
    films = dict(b=np.broadcast_to(still, (24, 4, 6, 3)), a=np.broadcast_to(100 + still[:12], (12, 4, 6, 3)))
    np.savez(tmp_path / "films.npz", b_shot_start=np.array([0, 5]), fps=np.float32(25), **films)
    return str(tmp_path / "films.npz")


def windows(source):
    return [(source[i]["clip"][:, 0, 0, 0].tolist(), source[i]["label"]) for i in range(len(source))]


def test_windows_of_films(path):
    """By hand: the last sixth is held out, and no window spans the border or a cut."""
    train, test = (clips(path, split, frames=2, every=2) for split in ("train", "test"))
    assert train.class_names == ("a", "b") and train.num_classes == 2 and train.shape == (2, 4, 6, 3)
    ours = [([100 + i, 102 + i], 0) for i in range(8)] + [([i, i + 2], 1) for i in (0, 1, 2, *range(5, 18))]
    assert windows(train) == ours
    assert windows(test) == [([i, i + 2], 1) for i in (20, 21)]
    assert train.name(8) == f"{path}[1][0]" and train[0]["clip"].dtype == np.uint8
    assert windows(clips(path, "test", frames=2)) == [([110, 111], 0), *[([i, i + 1], 1) for i in (20, 21, 22)]]


def test_frames_are_resized(path):
    source = clips(path, "train", frames=3, height=2, width=8)
    assert source.shape == source[0]["clip"].shape == (3, 2, 8, 3) and windows(source)[0] == ([100, 101, 102], 0)
    assert ClipConfig(path=path, frames=3, height=2, width=8).source("train").shape == (3, 2, 8, 3)


def test_digits_that_move():
    """Each is the digit of its label at a place that changes by one speed, but where it turns back."""
    source, still = moving_digits("test", frames=6, height=16, width=32), digits("test")
    assert len(source) == len(still) and source.num_classes == 10
    moved = 0
    for i in range(40):
        example = source[i]
        assert example["label"] == still[i]["label"]
        bright = example["clip"].max(-1)
        boxes = [np.argwhere(frame > frame[0, 0] if frame[0, 0] == 16 else frame > 16) for frame in bright]
        sums = bright.astype(int).sum((1, 2))
        assert sums.max() == sums.min()
        places = np.array([box.min(0) for box in boxes])
        steps = np.abs(np.diff(places, axis=0))
        assert steps.max() <= 3
        moved += len(np.unique(places, axis=0)) > 1
    assert moved == 40
    again = moving_digits("test", frames=3, every=2)
    np.testing.assert_array_equal(again[7]["clip"], moving_digits("test", frames=5)[7]["clip"][::2])


def test_each_motion_of_a_digit_is_another():
    """The first ones are those of one motion each; all are the same whenever they are asked for."""
    one, three = (moving_digits("train", frames=3, motions=n) for n in (1, 3))
    assert len(three) == 3 * len(one)
    for i in range(5):
        same, others = three[i], [three[i + k * len(one)] for k in (1, 2)]
        np.testing.assert_array_equal(same["clip"], one[i]["clip"])
        assert all(other["label"] == same["label"] and (other["clip"] != same["clip"]).any() for other in others)
        np.testing.assert_array_equal(three[i + len(one)]["clip"], others[0]["clip"])
    assert three.name(len(one) + 2) == "digits[2], motion 1"
    config = ClipConfig(frames=3, motions=3)
    assert len(config.source("train")) == len(three) and len(config.source("test")) == len(digits("test"))


def test_clips_without_classes(path):
    for config in (ClipConfig(frames=2, labelled=False), ClipConfig(path=path, frames=2, labelled=False)):
        source, labelled = (dataclasses.replace(config, labelled=x).source("train") for x in (False, True))
        assert source.num_classes == 1 < labelled.num_classes and len(source) == len(labelled)
        assert source.shape == labelled.shape and source.name(7) == labelled.name(7)
        assert {source[i]["label"] for i in range(len(source))} == {0}
        np.testing.assert_array_equal(source[9]["clip"], labelled[9]["clip"])


def test_what_is_not_there_is_drawn(path):
    there, gone = ClipConfig(path=path), ClipConfig(path="gone.npz", labelled=False, frames=2, every=8, height=48, width=64)
    assert there.or_drawn() is there and ClipConfig().or_drawn() == ClipConfig()
    assert gone.or_drawn() == dataclasses.replace(gone, path="digits")
    assert gone.or_drawn().source("train")[0]["clip"].shape == (2, 48, 64, 3)


@pytest.mark.parametrize(
    "edit", [dict(frames=0), dict(motions=0), dict(every=0), dict(height=-1), dict(workers=-1), dict(seed=-1)]
)
def test_bad_fields(edit):
    (name, value), *_ = edit.items()
    with pytest.raises(ValueError, match=f"data.{name}={value}: expected at least"):
        ClipConfig(**edit)


def test_bad_films(path, tmp_path):
    with pytest.raises(ValueError, match="data.height=16, data.width=0: expected both or none"):
        ClipConfig(height=16).source("train")
    with pytest.raises(ValueError, match="data.path='gone.npz': no such file"):
        ClipConfig(path="gone.npz").source("train")
    with pytest.raises(ValueError, match="no shot of the test split has 9 frames"):
        clips(path, "test", frames=5, every=2)
    with pytest.raises(ValueError, match="split 'valid'"):
        clips(path, "valid", frames=2)
    with pytest.raises(ValueError, match="a digit has 8 x 8 pixels"):
        moving_digits("train", frames=2, height=6)
    np.savez(tmp_path / "two.npz", a=np.zeros((9, 4, 6, 3), np.uint8), b=np.zeros((9, 6, 6, 3), np.uint8))
    with pytest.raises(ValueError, match=r"films of sizes \[\(4, 6\), \(6, 6\)\]; set data.height"):
        clips(str(tmp_path / "two.npz"), "train", frames=2)
    np.savez(tmp_path / "none.npz", x=np.zeros((9, 4, 6), np.uint8))
    with pytest.raises(ValueError, match=r"has x uint8 \(9, 4, 6\); expected films"):
        clips(str(tmp_path / "none.npz"), "train", frames=2)
    (tmp_path / "bad.npz").write_bytes(b"hello")
    with pytest.raises(ValueError, match="not a readable npz file"):
        clips(str(tmp_path / "bad.npz"), "train", frames=2)
