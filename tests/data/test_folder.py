import io
import logging
import pickle

import numpy as np
import pytest
from PIL import Image

from jaxgen.data import DataConfig, batches, folder, make_source
from jaxgen.data.folder import leave_out_unreadable


def draw(path, value=0, size=(6, 8)):
    """A picture that is `value` all over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


def values(source):
    """{file: (value, label)} of a source of such pictures, by their names."""
    out = {}
    for i in range(len(source)):
        out[source.files[i]] = (int(source[i]["image"].mean()), source[i]["label"])
    return out


def test_train_and_val_folders(tmp_path):
    for value, name in enumerate(["train/b/2.png", "train/b/1.PNG", "train/a/x.bmp", "val/b/0.webp", "test/a/0.png"]):
        draw(tmp_path / name, value)
    train, test = folder(str(tmp_path), "train"), folder(str(tmp_path), "test")
    assert train.class_names == test.class_names == ("a", "b")
    assert train.files == ("a/x.bmp", "b/1.PNG", "b/2.png")
    assert values(train) == {"a/x.bmp": (2, 0), "b/1.PNG": (1, 1), "b/2.png": (0, 1)}
    assert values(test) == {"b/0.webp": (3, 1)} and test.num_classes == 2
    assert pickle.loads(pickle.dumps(train))[0]["label"] == 0


def test_class_folders_hold_some_of_each_out(tmp_path):
    for name in ("one", "two"):
        for i in range(10):
            draw(tmp_path / name / ("deeper" if i % 2 else ".") / f"{i}.png", i)
    (tmp_path / "one" / "notes.txt").write_text("not an image")
    draw(tmp_path / ".thumbnails" / "x.png")
    draw(tmp_path / "one" / "._0.png")
    train, test = folder(str(tmp_path), "train"), folder(str(tmp_path), "test")
    assert train.class_names == ("one", "two") and np.bincount(test.labels).tolist() == [1, 1]
    assert len({*train.files, *test.files}) == len(train) + len(test) == 20
    assert folder(str(tmp_path), "test").files == test.files


def test_flat_folder_is_one_class(tmp_path):
    for i in range(5):
        draw(tmp_path / f"{i}.jpg", 20 * i)
    train, test = folder(str(tmp_path), "train"), folder(str(tmp_path), "test")
    assert (len(train), len(test), train.num_classes, train.class_names) == (4, 1, 1, None)


@pytest.mark.parametrize(
    "files, message",
    [
        ([], "no images"),
        (["train/"], "train: no images"),
        (["a/1.png", "b/notes.txt"], "b: no images"),
        (["a/1.png", "2.png"], "2.png.* beside folders .*a"),
        (["val/a/1.png", "a/1.png"], "'val' but none called 'train'"),
        (["train/a/1.png", "val/b/1.png"], "class b.*no training class"),
        (["train/a/1.png", "val/1.png"], "1.png.*no training class"),
    ],
)
def test_layouts_that_make_no_sense_are_named(tmp_path, files, message):
    for name in files:
        if name.endswith("png"):
            draw(tmp_path / name)
        elif name.endswith("/"):
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match=message) as error:
        folder(str(tmp_path), "test")
    assert str(tmp_path) in str(error.value)


def test_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="gone: no such folder"):
        folder(str(tmp_path / "gone"), "train")


@pytest.fixture
def damaged(tmp_path):
    """20 pictures of two classes, three of which cannot be read."""
    for i in range(20):
        draw(tmp_path / "ab"[i % 2] / f"{i:02}.png", i)
    (tmp_path / "a" / "00.png").write_bytes(b"")
    whole = (tmp_path / "b" / "01.png").read_bytes()
    (tmp_path / "b" / "01.png").write_bytes(whole[:40])
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    (tmp_path / "b" / "99.jpg").write_bytes(buffer.getvalue()[:-500])
    return tmp_path


BAD = ("a/00.png", "b/01.png", "b/99.jpg")


def test_an_unreadable_image_is_an_error_that_names_it(damaged):
    config = DataConfig(path=str(damaged), image_size=8)
    source = make_source(config, "train")
    for name in BAD:
        if name in source.files:
            with pytest.raises(ValueError, match=f"cannot read image .*{name}"):
                source[source.files.index(name)]
    with pytest.raises(ValueError, match="cannot read image .*/(a/00.png|b/01.png|b/99.jpg)"):
        list(batches(source, config, batch_size=4, train=False))


def test_skip_bad_names_counts_and_leaves_out(damaged, caplog):
    caplog.set_level(logging.WARNING)
    config = DataConfig(path=str(damaged), image_size=8, skip_bad=True)
    train, test = make_source(config, "train"), make_source(config, "test")
    everything = [folder(str(damaged), split) for split in ("train", "test")]
    assert len(train) + len(test) == sum(map(len, everything)) - 3 == 18
    assert not set(BAD) & {*train.files, *test.files}
    for name in BAD:
        assert sum(name in message for message in caplog.messages) == 1
    counted = [message for message in caplog.messages if "unreadable of" in message]
    assert sum(int(message.split()[2]) for message in counted) == 3
    assert len(list(batches(train, config, batch_size=len(train), train=False))) == 1


def test_skip_bad_sees_that_a_file_was_mended(damaged):
    config = DataConfig(path=str(damaged), skip_bad=True)
    before = sum(len(make_source(config, split)) for split in ("train", "test"))
    draw(damaged / "a" / "00.png", 5)
    assert sum(len(make_source(config, split)) for split in ("train", "test")) == before + 1


def test_nothing_readable(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="none of 3 images can be read; the first: .*0.png"):
        leave_out_unreadable(folder(str(tmp_path), "train"))


def test_a_file_that_went_away(tmp_path):
    for i in range(3):
        draw(tmp_path / f"{i}.png")
    source = folder(str(tmp_path), "train")
    (tmp_path / source.files[0]).unlink()
    with pytest.raises(ValueError, match=f"{source.files[0]}: No such file"):
        source[0]
