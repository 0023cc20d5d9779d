"""Sharded files: what is written to them comes back, and what is damaged is named."""

import collections
import io
import json
import logging
import pickle
import tarfile
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from jaxgen.data import ArraySource, DataConfig, batches, make_source
from jaxgen.data import shard_set as shard_set_module
from jaxgen.data.array_records import read_example, write_example
from jaxgen.data.shard_rows import ROW, Row
from jaxgen.data.shard_set import HeldOut, ShardSource, find_shards, shard_source
from jaxgen.data.tar_shards import TarShards, write_tar


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def numbered(n, seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (n, 5, 6, 3)).astype(np.uint8)
    return ArraySource(images=images, labels=np.arange(n) % 7, num_classes=7)


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def write_array_records(source, folder, per_shard, prefix="train"):
    module = pytest.importorskip("array_record.python.array_record_module")
    folder.mkdir(exist_ok=True)
    paths = []
    for start in range(0, len(source), per_shard):
        paths.append(str(folder / f"{prefix}-{start:05d}.array_record"))
        writer = module.ArrayRecordWriter(paths[-1], "group_size:1")
        for i in range(start, min(start + per_shard, len(source))):
            writer.write(write_example({"image": png(source.images[i]), "label": int(source.labels[i]), "file_name": b"x"}))
        writer.close()
    return paths


def write_parquet(source, folder, per_shard, prefix="train", struct=True):
    parquet = pytest.importorskip("pyarrow.parquet", reason="parquet files need pyarrow")
    pyarrow = pytest.importorskip("pyarrow")
    folder.mkdir(exist_ok=True)
    paths = []
    names = {"info": {"features": {"label": {"names": [f"class {i}" for i in range(7)]}}}}
    for start in range(0, len(source), per_shard):
        part = range(start, min(start + per_shard, len(source)))
        data = [png(source.images[i]) for i in part]
        image = [{"bytes": x, "path": None} for x in data] if struct else data
        table = pyarrow.table({"image": image, "label": [int(source.labels[i]) for i in part]})
        table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
        paths.append(str(folder / f"{prefix}-{start:05d}.parquet"))
        parquet.write_table(table, paths[-1], row_group_size=3)
    return paths


def write_tars(source, folder, per_shard, prefix="train"):
    return write_tar(source, folder, per_shard=per_shard, prefix=prefix)


WRITERS = {"tar": write_tars, "parquet": write_parquet, "array_record": write_array_records}


@pytest.fixture(params=list(WRITERS))
def write(request):
    return WRITERS[request.param]


def assert_same(source, expected):
    assert len(source) == len(expected)
    for i in range(len(expected)):
        np.testing.assert_array_equal(source[i]["image"], expected.images[i])
        assert source[i]["label"] == expected.labels[i] and type(source[i]["label"]) is int


def test_what_is_written_comes_back(write, tmp_path):
    train, val = numbered(23), numbered(8, seed=1)
    paths = write(train, tmp_path / "set", 10)
    write(val, tmp_path / "set", 10, prefix="x-validation")
    config = DataConfig(path=str(tmp_path / "set"))
    assert_same(make_source(config, "train"), train)
    assert_same(make_source(config, "test"), val)
    source = make_source(config, "train")
    assert source.num_classes == 7 and len(source.paths) == 3
    assert source.class_names in (None, tuple(f"class {i}" for i in range(7)))
    assert source.name(12).startswith(f"{paths[1]}[2] ")
    assert_same(pickle.loads(pickle.dumps(source)), train)
    # One file, and a pattern.
    assert len(make_source(DataConfig(path=paths[2]), "train")) == 3
    assert len(shard_source(str(tmp_path / "set" / "train-*"), "train")) == 21  # a tenth is held out


def test_batches_from_shards_are_those_of_the_array(write, tmp_path):
    source = numbered(21)
    write(source, tmp_path / "train", 8)
    write(source, tmp_path / "train", 8, prefix="val")
    config = DataConfig(path=str(tmp_path), seed=3, flip=True)
    (got, want) = (iter(batches(s, config, batch_size=4, train=True)) for s in (make_source(config, "train"), source))
    for _ in range(7):
        a, b = next(got), next(want)
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["label"], b["label"])


def test_a_damaged_shard_is_named_counted_and_left_out(write, tmp_path, caplog):
    paths = write(numbered(30), tmp_path / "set", 10)
    write(numbered(2), tmp_path / "set", 10, prefix="val")
    whole = open(paths[1], "rb").read()
    open(paths[1], "wb").write(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"1 of 3 shards are damaged \(data.skip_bad leaves them out\): ") as error:
        make_source(DataConfig(path=str(tmp_path / "set")), "train")
    assert paths[1] in str(error.value)
    with caplog.at_level(logging.WARNING):
        source = make_source(DataConfig(path=str(tmp_path / "set"), skip_bad=True), "train")
    assert len(source) == 20 and len(source.left_out) == 1 and paths[1] in source.left_out[0]
    assert "left out 1 damaged of 3 shards" in caplog.text
    assert [source[i]["label"] for i in range(20)] == [i % 7 for i in [*range(10), *range(20, 30)]]


def test_an_image_that_is_none_is_named_or_left_out(tmp_path, caplog):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(20):
            data = b"no image" if i == 3 else png(numbered(20).images[i])
            member = tarfile.TarInfo(f"{i:03d}.png")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    config = DataConfig(path=str(tmp_path / "a.tar"))
    with pytest.raises(ValueError, match=r"a.tar\[3\].*not an image"):
        make_source(config, "train")[3]
    with caplog.at_level(logging.WARNING):
        source = make_source(DataConfig(path=str(tmp_path / "a.tar"), skip_bad=True), "train")
    assert len(source) == 17 and "left out 1 unreadable of 18 images" in caplog.text
    assert source.num_classes == 1 and source[3]["label"] == 0  # no labels: one class


def test_hosts_read_their_share_and_nothing_else(tmp_path, monkeypatch):
    write_tar(numbered(24), tmp_path, per_shard=5)
    write_tar(numbered(1), tmp_path, per_shard=5, prefix="val")
    source = make_source(DataConfig(path=str(tmp_path)), "train")
    asked, read = [], TarShards.read

    def noted(self, path, row):
        asked.append((path, row))
        return read(self, path, row)

    monkeypatch.setattr(TarShards, "read", noted)
    hosts = []
    for host in range(4):
        asked.clear()
        list(batches(source, DataConfig(image_size=5), batch_size=8, train=False, shard_index=host, shard_count=4))
        hosts.append(set(asked))
    assert all(len(host) == 6 for host in hosts) and len(set.union(*hosts)) == 24


@pytest.mark.parametrize("split", ["train", "test"])
def test_held_out_numbers(split):
    for count in (0, 4, 5, 23, 40):
        numbers = list(HeldOut(count, split))
        assert numbers == [i for i in range(count) if (i % 10 == 4) == (split == "test")]
    with pytest.raises(IndexError):
        HeldOut(23, split)[23]


def test_a_changed_shard_is_indexed_anew(tmp_path):
    write_tar(numbered(12), tmp_path, per_shard=20)
    assert len(shard_source(str(tmp_path), "train")) == 11
    write_tar(numbered(25), tmp_path, per_shard=30)
    assert len(shard_source(str(tmp_path), "train")) == 22


def test_an_index_is_made_once(tmp_path, monkeypatch):
    write_tar(numbered(12), tmp_path, per_shard=5)
    shard_source(str(tmp_path), "train")
    monkeypatch.setattr(TarShards, "index", None)
    assert len(shard_source(str(tmp_path), "test")) == 1
    with pytest.raises(TypeError):
        shard_source(str(tmp_path), "train", cache=tmp_path / "elsewhere")


def test_memory_does_not_grow_with_the_data(tmp_path):
    """Ten million examples that do not exist: opening them, asking for one's place and making an order costs next to nothing."""
    n, per_shard = 10_000_000, 10_000
    index = tmp_path / "large.rows"
    with open(index, "wb") as file:
        file.truncate(n * ROW.itemsize)  # sparse: takes no disk either
    rows = np.memmap(index, ROW, "r+")
    rows[-1] = (512, 100, 6, 0, 0, n // per_shard - 1)
    del rows
    paths = tuple(f"{i}.tar" for i in range(n // per_shard))
    tracemalloc.start()
    source = ShardSource(paths=paths, format=TarShards(), index_path=str(index), rows=HeldOut(n, "train"), num_classes=7)
    iterator = iter(batches(_Places(source), DataConfig(image_size=1), batch_size=4, train=True))
    for _ in range(3):
        next(iterator)
    assert source.name(len(source) - 1).startswith("999.tar[") and len(pickle.dumps(source)) < 50_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == 9_000_000 and peak < 3_000_000  # the index has 240,000,000 bytes


class _Places:
    """Pixels that say where an example would be, since there is nothing to read."""

    num_classes, class_names = 7, None

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return {"image": np.full((1, 1, 3), int(self.source._row(index)["label"]), np.uint8), "label": 0}


def test_building_an_index_holds_one_shard_at_a_time(tmp_path, monkeypatch):
    rows = [Row(i, 1, 0) for i in range(2000)]
    monkeypatch.setattr(TarShards, "index", lambda self, path: iter(rows))
    peaks = []
    for count in (2, 40):
        folder = tmp_path / str(count)
        folder.mkdir()
        for i in range(count):
            (folder / f"train-{i}.tar").touch()
            (folder / f"val-{i}.tar").touch()
        tracemalloc.start()
        assert len(shard_source(str(folder), "train")) == 2000 * count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_labels_in_json_and_files_that_are_passed_over(tmp_path):
    images = numbered(3).images

    def add(archive, name, data):
        member = tarfile.TarInfo(name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))

    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for i in range(3):
            add(archive, f"part/{i}.json", json.dumps({"label": 2 * i}).encode())
            add(archive, f"part/{i}.seg.png", b"another kind of picture")
            add(archive, f"part/{i}.PNG", png(images[i]))
            add(archive, f"part/{i}.txt", b"a caption")
        add(archive, "readme.txt", b"no example")
    (tmp_path / "test.tar").write_bytes((tmp_path / "train.tar").read_bytes())
    source = shard_source(str(tmp_path), "train")
    assert [x["label"] for x in map(source.__getitem__, range(3))] == [0, 2, 4] and source.num_classes == 5
    np.testing.assert_array_equal(source[2]["image"], images[2])

    for name, data, match in (("0.cls", b"cat", "0.cls holds b'cat'"), ("0.jpg", b"", "0 has two images")):
        with tarfile.open(tmp_path / "bad.tar", "w") as archive:
            add(archive, "0.png", png(images[0]))
            add(archive, name, data)
        with pytest.raises(ValueError, match=match):
            list(TarShards().index(str(tmp_path / "bad.tar")))
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        for i in range(12):
            add(archive, f"{i}.png", png(images[0]))
        add(archive, "11.cls", b"1")
    with pytest.raises(ValueError, match="11 of 12 images .* have no label"):
        shard_source(str(tmp_path / "bad.tar"), "train")


@pytest.mark.parametrize("cut", [100, 512, 700, -1024])
def test_tars_that_end_early(tmp_path, cut):
    (path,) = write_tar(numbered(3), tmp_path, per_shard=5)
    whole = open(path, "rb").read()
    whole = whole[: len(whole.rstrip(b"\0")) + 511 & ~511] + bytes(1024)  # two blocks of zeros end it
    assert len(list(TarShards().index(path))) == 3
    open(path, "wb").write(whole[:cut])
    with pytest.raises(ValueError, match="train-000000.tar: not a readable tar file"):
        list(TarShards().index(path))


def test_a_header_that_is_overwritten(tmp_path):
    (path,) = write_tar(numbered(4), tmp_path, per_shard=5)
    data = bytearray(open(path, "rb").read())
    data[2048:2100] = b"\xff" * 52
    open(path, "wb").write(data)
    with pytest.raises(ValueError, match="damaged at byte 2048"):
        list(TarShards().index(path))


def test_paths_that_hold_no_shards_or_too_many_kinds(tmp_path):
    assert find_shards(str(tmp_path)) is None and shard_source(str(tmp_path), "train") is None
    (tmp_path / "a.parquet").touch()
    (tmp_path / "b.tar").touch()
    with pytest.raises(ValueError, match="shards of several formats"):
        find_shards(str(tmp_path))
    (tmp_path / "c.tar.gz").touch()
    with pytest.raises(ValueError, match="c.tar.gz: a compressed shard"):
        find_shards(str(tmp_path))
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "val-0.tar").touch()
    with pytest.raises(ValueError, match="none for training"):
        shard_source(str(tmp_path / "only"), "train")
    with pytest.raises(ValueError, match=r"no such file"):
        make_source(DataConfig(path=str(tmp_path / "*.nothing")), "train")
    with pytest.raises(ValueError, match="per_shard=0"):
        write_tar(numbered(3), tmp_path, per_shard=0)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    import builtins

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *a, **k: _refuse(name) or real(name, *a, **k))
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ValueError, match=r"pyarrow: pip install 'jaxgen\[parquet\]'"):
        shard_source(str(tmp_path), "train")


def _refuse(name):
    if name.startswith("pyarrow"):
        raise ImportError(name)


def test_parquet_of_plain_bytes_and_of_other_columns(tmp_path):
    paths = write_parquet(numbered(5), tmp_path / "plain", 5, struct=False)
    assert len(make_source(DataConfig(path=paths[0]), "train")) == 4
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    for name, columns, match in (
        ("a", {"text": ["x"]}, "columns text; expected image or img"),
        ("b", {"image": [{"bytes": None, "path": "x.png"}]}, "row 0 of row group 0 has no image bytes"),
    ):
        parquet.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet")
        with pytest.raises(ValueError, match=match):
            shard_source(str(tmp_path / f"{name}.parquet"), "train")[0]


def test_examples_in_the_wire_format():
    features = {"image": b"\x00\x01" * 200, "label": 300, "name": b""}
    got = read_example(write_example(features))
    assert got == {"image": [features["image"]], "label": [300], "name": [b""]}
    assert read_example(write_example({"label": -1})) == {"label": [-1]}
    # By hand: label = 5 as an integer that is not packed, and a float that is left out.
    by_hand = bytes([0x0A, 0x1E])
    by_hand += bytes([0x0A, 0x0D, 0x0A, 5]) + b"label" + bytes([0x12, 4, 0x1A, 2, 8, 5])
    by_hand += bytes([0x0A, 0x0D, 0x0A, 1]) + b"f" + bytes([0x12, 8, 0x12, 6, 0x0A, 4, 0, 0, 0, 0])
    assert read_example(by_hand) == {"label": [5]}
    with pytest.raises((ValueError, IndexError)):
        read_example(write_example(features)[:-3])


def test_array_records_of_something_else(tmp_path):
    module = pytest.importorskip("array_record.python.array_record_module")
    for name, record, match in (
        ("a", b"\xff\xff", "record 0 is no tf.train.Example"),
        ("b", write_example({"label": 1}), "features label; expected image"),
    ):
        writer = module.ArrayRecordWriter(str(tmp_path / f"{name}.array_record"), "group_size:1")
        writer.write(record)
        writer.close()
        with pytest.raises(ValueError, match=match):
            shard_source(str(tmp_path / f"{name}.array_record"), "train")


def test_progress_of_a_first_look(tmp_path, caplog):
    write_tar(numbered(6), tmp_path, per_shard=2)
    with caplog.at_level(logging.INFO, logger=shard_set_module.__name__):
        shard_source(str(tmp_path), "train", log_every_s=0)
    assert "indexed 3 of 3 shards, 6 examples" in caplog.text
    assert collections.Counter(find_shards(str(tmp_path))[1]).most_common(1)[0][1] == 1
