"""Captions from every kind of source, as bytes of one length."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from jaxgen.data import ArraySource, DataConfig, World, WorldConfig, batches, make_source
from jaxgen.data.captions import caption_array, caption_bytes
from jaxgen.data.token_cache import TokenSource, token_batches, write_tokens
from jaxgen.data.world_oracle import check
from jaxgen.recipes.token_cache import code_batches

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3)).astype(np.uint8)
TEXTS = np.array([f"picture {i}" for i in range(20)])


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def text(row):
    return bytes(row).rstrip(b"\0").decode()


def seen(config, split="train", batch_size=2, count=9):
    """{caption: image} of a few batches."""
    it = iter(batches(make_source(config, split), config, batch_size=batch_size, train=split == "train"))
    found = [next(it) for _ in range(count)]
    assert all(b["caption"].dtype == np.uint8 and b["caption"].shape == (batch_size, config.captions) for b in found)
    return {text(caption): image for b in found for caption, image in zip(b["caption"], b["image"])}


def assert_pictures(found, texts=TEXTS):
    for said, image in found.items():
        np.testing.assert_array_equal(image, IMAGES[list(texts).index(said)])


@pytest.mark.parametrize("key", ["caption", "captions", "name"])
def test_npz(tmp_path, key):
    path = str(tmp_path / "x.npz")
    np.savez(path, image=IMAGES, **{key: TEXTS}, group=np.arange(20) // 10, group_names=np.array(["low", "high"]))
    found = seen(DataConfig(path=path, captions=16))
    assert len(found) == 18
    assert_pictures(found)
    source = make_source(DataConfig(path=path), "test")
    assert source.class_names == ("low", "high") and [source[i]["label"] for i in range(len(source))] == [0, 1]
    assert set(next(iter(batches(source, DataConfig(path=path), batch_size=2, train=False)))) == {"image", "label"}


def test_what_other_arrays_hold_is_not_asked_for(tmp_path):
    """An array called name or group that is about something else is no caption and no class; a label comes before a group."""
    path = str(tmp_path / "x.npz")
    np.savez(path, image=IMAGES, name=np.array(["a"]), group=TEXTS, caption=np.array([None] * 20))
    source = make_source(DataConfig(path=path), "train")
    assert source.num_classes == 1 and source.caption(0) is None
    np.savez(path, image=IMAGES, label=np.arange(20) % 5, group=np.zeros(20, int), group_names=np.array(["one"]))
    assert make_source(DataConfig(path=path), "train").num_classes == 5


def test_the_world_says_what_is_true():
    config = DataConfig(path="world", image_size=32, captions=120)
    for said, image in seen(config).items():
        assert check(said, image)
    world = World(WorldConfig(most=3), "test")
    assert [world.caption(i) for i in range(5)] == [str(world.example(i)["caption"]) for i in range(5)]


def draw(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def test_folders(tmp_path):
    """A text beside each image, or the hub's list, which comes first."""
    for i in range(20):
        draw(tmp_path / "all" / f"{i}.png", IMAGES[i])
        (tmp_path / "all" / f"{i}.txt").write_text(f"picture {i}\n")
    assert_pictures(seen(DataConfig(path=str(tmp_path / "all"), captions=16)))
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"listed {i}", "more": 1}) for i in range(19)]
    (tmp_path / "all" / "metadata.jsonl").write_text("\n".join(lines))
    found = seen(DataConfig(path=str(tmp_path / "all"), captions=16))
    assert_pictures(found, [f"listed {i}" for i in range(19)] + ["picture 19"])
    for i in range(4):
        draw(tmp_path / "parts" / ("val" if i % 2 else "train") / "cats" / f"{i}.png", IMAGES[i])
    for part, first in (("train", 0), ("val", 1)):
        lines = [json.dumps({"file_name": f"cats/{i}.png", "text": f"picture {i}"}) for i in (first, first + 2)]
        (tmp_path / "parts" / part / "metadata.jsonl").write_text("\n".join(lines))
    source = make_source(DataConfig(path=str(tmp_path / "parts")), "test")
    assert [source.caption(i) for i in range(2)] == ["picture 1", "picture 3"]
    (tmp_path / "parts" / "val" / "metadata.jsonl").write_text('{"file_name": "cats/1.png"}')
    with pytest.raises(ValueError, match="metadata.jsonl: line 1 is no object with file_name and text"):
        source.caption(0)


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("members", [".txt", ".json", "both"])
def test_tar_shards(tmp_path, members):
    texts = {".txt": lambda i: f"picture {i}\n".encode(), ".json": lambda i: json.dumps({"caption": f"picture {i}"}).encode()}
    if members == "both":  # the text alone is read
        texts[".json"] = lambda i: json.dumps({"caption": "another"}).encode()
    with tarfile.open(tmp_path / "train-0.tar", "w") as archive:
        for i in range(20):
            parts = {".png": png(IMAGES[i])} | {k: make(i) for k, make in texts.items() if members in (k, "both")}
            for extension, data in sorted(parts.items()):
                member = tarfile.TarInfo(f"{i:03d}{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    assert_pictures(seen(DataConfig(path=str(tmp_path), captions=16)))


def test_other_shards(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    pictures = [png(image) for image in IMAGES]
    parquet.write_table(pyarrow.table({"image": pictures, "text": list(TEXTS)}), tmp_path / "train-0.parquet")
    assert_pictures(seen(DataConfig(path=str(tmp_path), captions=16)))


def test_captions_stay_with_images_that_are_written_anew(tmp_path):
    from jaxgen.data import write_tar

    write_tar(ArraySource(images=IMAGES, labels=np.zeros(20, int), num_classes=1, captions=TEXTS), tmp_path)
    assert_pictures(seen(DataConfig(path=str(tmp_path), captions=16)))


def test_token_caches(tmp_path):
    source, config = ArraySource(images=IMAGES, labels=np.arange(20), num_classes=20, captions=TEXTS), DataConfig(captions=16)
    for part in ("train", "test"):
        options = dict(tokenizer="x", train=False, batch_size=4, per_shard=6)
        write_tokens(tmp_path / part, source, config, lambda images: images[:, :2, 0, 0].astype(np.int32), **options)
    cache = TokenSource(str(tmp_path / "train"))
    assert cache.captions == 16
    batch = next(iter(token_batches(cache, batch_size=20, train=False)))
    for i, said, tokens in zip(batch["label"], batch["caption"], batch["tokens"]):
        assert text(said) == TEXTS[i]
        np.testing.assert_array_equal(tokens, IMAGES[i, :2, 0, 0])
    assert set(next(iter(code_batches(DataConfig(tokens=str(tmp_path), captions=16), 2, "test", 0, 1)))) > {"caption"}
    with pytest.raises(ValueError, match="data.captions=8: .* has captions of 16 bytes; encode again"):
        code_batches(DataConfig(tokens=str(tmp_path), captions=8), 2, "test", 0, 1)


def test_bytes():
    assert text(caption_bytes("né", 8, name="x")) == "né"
    # The letter of two bytes does not fit whole.
    assert text(caption_bytes("abné", 4, name="x", cut=True)) == "abn"
    assert [text(row) for row in caption_array(["a", "a b c"], 5)] == ["a", "a b c"]
    long = "x: 'abné' has 5 bytes; expected at most 4"
    for bad, message in (("", "x: '' is no caption"), ("a\0b", "is no caption"), ("abné", long)):
        with pytest.raises(ValueError, match=message):
            caption_bytes(bad, 4, name="x")
    with pytest.raises(ValueError, match="prompts 'red': expected at least one, in a list"):
        caption_array("red", 8)


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="data.captions=-1: must be an integer >= 0"):
        DataConfig(captions=-1)
    digits = DataConfig(captions=8)
    with pytest.raises(ValueError, match=r"data.captions=8: digits\[0\] has no caption"):
        batches(make_source(digits, "train"), digits, batch_size=2, train=True)
    source, config = ArraySource(images=IMAGES, labels=np.zeros(20, int), num_classes=1, captions=TEXTS), DataConfig(captions=9)
    with pytest.raises(ValueError, match=r"caption of images\[1\d\]: 'picture 1\d' has 10 bytes; expected at most 9"):
        list(batches(source, config, batch_size=2, train=False))
    cut = DataConfig(captions=9, cut_captions=True)
    found = [text(row) for batch in batches(source, cut, batch_size=2, train=False) for row in batch["caption"]]
    assert sorted(found) == sorted(said[:9] for said in TEXTS)
