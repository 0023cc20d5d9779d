import builtins
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxgen.data import ArraySource, DataConfig, digits, info, make_source, npz
from jaxgen.data.sources import decode, held_out

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, form, **options)
    return buffer.getvalue()


def save(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def jpegs(images):
    """Bytes of all images, joined, and their offsets."""
    data = [encoded(image, "JPEG") for image in images]
    return np.frombuffer(b"".join(data), np.uint8), np.cumsum([0] + [len(d) for d in data])


# Digits.


def test_digits_are_sklearns_rescaled_and_split_by_class():
    from sklearn.datasets import load_digits

    data = load_digits()
    train, test = digits("train"), digits("test")
    assert (len(train), len(test)) == (1498, 299)
    assert train.num_classes == 10 and train.class_names == tuple("0123456789")
    assert np.bincount(test.labels).min() >= 29 and np.bincount(test.labels).max() <= 31
    example = train[0]
    assert example["image"].shape == (8, 8, 1) and example["image"].dtype == np.uint8 and type(example["label"]) is int
    both = {(x.tobytes(), int(y)) for s in (train, test) for x, y in zip(s.images, s.labels)}
    expected = {(np.rint(x / 16 * 255).astype(np.uint8).tobytes(), int(y)) for x, y in zip(data.images, data.target)}
    assert both == expected
    np.testing.assert_array_equal(test.images, digits("test").images)


def test_digits_without_sklearn_say_what_to_install(monkeypatch):
    real = builtins.__import__

    def no_sklearn(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_sklearn)
    with pytest.raises(ValueError, match=r"scikit-learn: pip install 'jaxgen\[demo\]'"):
        digits("train")


# The held-out part.


def test_held_out_takes_its_share_of_every_class_and_the_rest_is_the_training_part():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 5], [100, 57, 2, 1]))
    train, test = (held_out(labels, split, every=10, where="x") for split in ("train", "test"))
    assert sorted([*train, *test]) == list(range(160))
    assert np.bincount(labels[test], minlength=6).tolist() == [10, 6, 1, 0, 0, 0]
    np.testing.assert_array_equal(test, held_out(labels, "test", every=10, where="x"))


def test_held_out_is_spread_over_the_class():
    test = held_out(np.zeros(100, int), "test", every=10, where="x")
    assert np.diff(test).tolist() == [10] * 9


def test_held_out_errors():
    with pytest.raises(ValueError, match="data.npz.*3 images"):
        held_out(np.arange(3), "test", every=10, where="data.npz")
    with pytest.raises(ValueError, match="'validation'"):
        held_out(np.zeros(5, int), "validation", every=10, where="x")


# npz files of pixels.


def test_npz_with_both_parts(tmp_path):
    x, y = noise(12, 5, 6), np.arange(12) % 3
    path = save(tmp_path / "a.npz", x_train=x[:8], y_train=y[:8].astype(np.uint8), x_test=x[8:], y_test=y[8:, None])
    train, test = npz(path, "train"), npz(path, "test")
    assert (len(train), len(test), train.num_classes, train.class_names) == (8, 4, 3, None)
    for i in range(4):
        np.testing.assert_array_equal(test[i]["image"], x[8 + i][..., None])
        assert test[i]["label"] == y[8 + i]


def test_classes_are_counted_over_both_parts(tmp_path):
    path = save(tmp_path / "a.npz", x_train=noise(2, 4, 4), y_train=[0, 1], x_test=noise(1, 4, 4), y_test=[6])
    assert npz(path, "train").num_classes == npz(path, "test").num_classes == 7


def test_npz_without_a_test_part_holds_some_out(tmp_path):
    x, y = noise(40, 4, 4, 3), np.repeat([0, 1], 20)
    path = save(tmp_path / "a.npz", x_train=x, y_train=y, class_names=np.array(["cat", "dog"]))
    train, test = npz(path, "train"), npz(path, "test")
    assert (len(train), len(test)) == (36, 4) and test.class_names == ("cat", "dog")
    assert np.bincount(test.labels).tolist() == [2, 2]
    assert {i.tobytes() for s in (train, test) for i in s.images} == {i.tobytes() for i in x}


@pytest.mark.parametrize("image_key, label_key", [("image", "label"), ("images", "labels"), ("image", None)])
def test_npz_without_parts(tmp_path, image_key, label_key):
    labels = {label_key: np.repeat([0, 4], 10)} if label_key else {}
    path = save(tmp_path / "a.npz", **{image_key: noise(20, 4, 4, 1)}, **labels)
    train, test = npz(path, "train"), npz(path, "test")
    assert (len(train), len(test)) == (18, 2)
    assert train.num_classes == (5 if label_key else 1)
    assert set(train.labels) == ({0, 4} if label_key else {0})


GOOD = dict(x_train=noise(4, 5, 5), y_train=np.zeros(4, int), x_test=noise(4, 5, 5), y_test=np.zeros(4, int))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x_train=noise(4, 5, 5).astype(np.float32)), r"bad.npz: x_train is float32 \(4, 5, 5\); expected uint8"),
        (dict(x_train=noise(4, 75)), r"bad.npz: x_train is uint8 \(4, 75\)"),
        (dict(x_train=noise(4, 3, 5, 5)), r"bad.npz: x_train is uint8 \(4, 3, 5, 5\)"),
        (dict(x_train=noise(0, 5, 5), y_train=np.zeros(0, int)), "bad.npz: x_train: no images"),
        (dict(y_train=np.zeros(4)), r"bad.npz: y_train is float64 \(4,\); expected integers"),
        (dict(y_train=np.zeros((4, 10), int)), r"bad.npz: y_train is int64 \(4, 10\)"),
        (dict(y_train=np.zeros(3, int)), r"bad.npz: x_train: labels int64 \(3,\); expected integers \(4,\)"),
        (dict(y_train=np.array([0, 1, -1, 0])), "bad.npz: x_train: labels -1 to 1"),
        (dict(class_names=np.array(["one"]), y_train=np.array([0, 1, 0, 0])), r"labels 0 to 1 .* \[0, 1\)"),
        (dict(class_names=np.array(["one"], object)), "bad.npz: cannot read array 'class_names'"),
        (dict(class_names=np.array([1])), r"bad.npz: class_names is int64 \(1,\); expected strings"),
    ],
)
def test_npz_arrays_that_do_not_fit_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        npz(save(tmp_path / "bad.npz", **(GOOD | change)), "train")


def test_npz_with_other_keys_lists_them(tmp_path):
    with pytest.raises(ValueError, match="pics.*expected x_train, image, images or jpeg_train"):
        npz(save(tmp_path / "bad.npz", pics=noise(2, 4, 4)), "train")
    with pytest.raises(ValueError, match="bad.npz: no array 'y_train'; it has x_train"):
        npz(save(tmp_path / "bad.npz", x_train=noise(2, 4, 4)), "train")


def test_npz_that_is_none_or_is_truncated(tmp_path):
    text = tmp_path / "text.npz"
    text.write_text("hello")
    with pytest.raises(ValueError, match="text.npz: not a readable npz file"):
        npz(str(text), "train")
    one = tmp_path / "one.npz"
    with one.open("wb") as file:
        np.save(file, noise(2, 4, 4))
    with pytest.raises(ValueError, match="one.npz: one array"):
        npz(str(one), "train")
    whole = Path(save(tmp_path / "whole.npz", **GOOD)).read_bytes()
    cut = tmp_path / "cut.npz"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut.npz: not a readable npz file"):
        npz(str(cut), "train")
    damaged = tmp_path / "damaged.npz"
    start = whole.index(GOOD["x_train"].tobytes())
    damaged.write_bytes(whole[:start] + bytes(50) + whole[start + 50 :])  # the checksum no longer fits
    with pytest.raises(ValueError, match="damaged.npz: cannot read array 'x_train'"):
        npz(str(damaged), "train")


def test_array_source_checks_what_it_is_given():
    with pytest.raises(ValueError, match="mine: float64"):
        ArraySource(images=np.zeros((2, 4, 4, 3)), labels=np.zeros(2, int), num_classes=1, where="mine")
    with pytest.raises(ValueError, match="2 class names for 1 classes"):
        ArraySource(images=noise(2, 4, 4, 3), labels=np.zeros(2, int), num_classes=1, class_names=("a", "b"))


# npz files of JPEG bytes.


def test_jpeg_npz_is_decoded_as_pillow_does(tmp_path):
    images = [noise(8, 10, 3, seed=i) for i in range(5)] + [noise(8, 10, seed=9)]
    data, offset = jpegs(images[:4])
    data_test, offset_test = jpegs(images[4:])
    path = save(
        tmp_path / "j.npz",
        **dict(jpeg_train=data, offset_train=offset, y_train=np.array([0, 1, 0, 1], np.uint8)),
        **dict(jpeg_test=data_test, offset_test=offset_test, y_test=np.array([1, 0], np.uint8)),
    )
    train, test = pickle.loads(pickle.dumps(npz(path, "train"))), npz(path, "test")
    assert (len(train), len(test), train.num_classes) == (4, 2, 2)
    for i in range(4):
        expected = np.asarray(Image.open(io.BytesIO(encoded(images[i], "JPEG"))))
        np.testing.assert_array_equal(train[i]["image"], expected)
        assert train[i]["label"] == i % 2
    assert test[0]["image"].shape == (8, 10, 3) and test[1]["image"].shape == (8, 10, 1)


def test_jpeg_npz_names_the_broken_image_of_the_file_also_after_a_split(tmp_path):
    parts = [encoded(noise(8, 8, 3, seed=i), "JPEG") for i in range(20)]
    parts[7] = b"not a jpeg"
    data, offset = np.frombuffer(b"".join(parts), np.uint8), np.cumsum([0] + [len(p) for p in parts])
    path = save(tmp_path / "j.npz", jpeg_train=data, offset_train=offset, y_train=np.zeros(20, int))
    train = npz(path, "train")
    place = train.index.tolist().index(7)
    assert place != 7
    with pytest.raises(ValueError, match=r"j.npz: jpeg_train\[7\]: not an image"):
        train[place]
    kept = make_source(DataConfig(path=path, skip_bad=True), "train")
    assert len(kept) == len(train) - 1 and 7 not in kept.index


def test_jpeg_npz_offsets_must_divide_the_bytes(tmp_path):
    data, offset = jpegs([noise(8, 8, 3)])
    for wrong in (offset + [0, 1], offset[::-1]):
        path = save(tmp_path / "j.npz", jpeg_train=data, offset_train=wrong, y_train=np.zeros(1, int))
        with pytest.raises(ValueError, match="j.npz: jpeg_train: offsets"):
            npz(path, "train")


# Decoding.


def test_decode_turns_the_image_as_its_orientation_says():
    image = noise(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned 90 degrees clockwise
    np.testing.assert_array_equal(decode(encoded(image, exif=exif), "x"), np.rot90(image, -1))


def test_decode_channels():
    assert decode(encoded(noise(4, 4)), "x").shape == (4, 4, 1)
    rgba = noise(4, 4, 4)
    np.testing.assert_array_equal(decode(encoded(rgba), "x"), rgba[..., :3])


def test_decode_refuses_what_eight_bits_cannot_hold():
    deep = np.full((4, 4), 40000, np.uint16)
    with pytest.raises(ValueError, match="cannot read image deep.png: mode I;16 has more than 8 bits"):
        decode(encoded(deep), "deep.png")


@pytest.mark.parametrize("thumbnail", [False, True])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP"])
def test_decode_names_a_truncated_image(form, thumbnail):
    data = encoded(noise(64, 64, 3), form)
    with pytest.raises(ValueError, match="cannot read image cut"):
        decode(data[: len(data) * 3 // 4], "cut", thumbnail=thumbnail)
    assert decode(data, "whole", thumbnail=thumbnail).shape[-1] == 3


# Real files.


@pytest.mark.parametrize(
    "file, shape, n_train, n_test, num_classes",
    [
        ("mnist/mnist.npz", (28, 28, 1), 60000, 10000, 10),
        ("cifar10/cifar10.npz", (32, 32, 1), 3600, 400, 10),
        ("cifar10/cifar10_jpeg60k.npz", (32, 32, 1), 50000, 10000, 10),
        ("kodak/kodak24_center256.npz", (256, 256, 1), 22, 2, 1),
    ],
)
def test_real_files(file, shape, n_train, n_test, num_classes):
    path = SHARED / file
    if not path.exists():
        pytest.skip(f"{path} is not there")
    facts = info(DataConfig(path=str(path), channels=1))
    assert facts["image_shape"] == shape and facts["num_classes"] == num_classes
    assert abs(facts["n_train"] - n_train) <= 5 and facts["n_train"] + facts["n_test"] == n_train + n_test
    if file.startswith("mnist"):
        assert make_source(DataConfig(path=str(path)), "train").labels[:5].tolist() == [5, 0, 4, 1, 9]
    if file.startswith("cifar10"):
        assert facts["class_names"][:2] == ("airplane", "automobile")
