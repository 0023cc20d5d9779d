"""Places on this machine; those in buckets are in train/test_bucket.py."""

import os
from pathlib import Path

import pytest

from jaxgen import storage


def test_places_on_this_machine(tmp_path):
    assert storage.place("runs/a") == Path("runs/a") == storage.place(Path("runs/a"))
    assert storage.place(f"file://{tmp_path}/a%20b") == tmp_path / "a b"
    assert storage.place("file://localhost/a") == Path("/a")
    assert storage.on_disk("file:///a", "a cache") == Path("/a")
    assert not storage.in_bucket(storage.place("file:///a"))


@pytest.mark.parametrize(
    "path, message",
    [
        ("s3://bucket/a", "s3://bucket/a: expected a folder of this machine, file:///folder or gs://bucket/folder"),
        ("memory://a", "memory://a: expected a folder"),
        ("gs://", "gs://: expected"),
        (Path("gs://bucket/a"), "gs:/bucket/a: has one slash where a URL has two"),
        ("file://host/a", "file://host/a: a file of another machine"),
    ],
)
def test_places_that_cannot_be_named_in_one_line(path, message):
    with pytest.raises(ValueError) as error:
        storage.place(path)
    assert message in str(error.value)


def test_a_bucket_without_the_package_that_reads_it(monkeypatch):
    def missing(name):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr("fsspec.get_filesystem_class", missing)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"gs://bucket/a: buckets need the package gcsfs: pip install 'jaxgen\[gcs\]'"):
        storage.place("gs://bucket/a")


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "new" / "a.txt"
    storage.write_text(path, "one")
    with pytest.raises(RuntimeError), storage.whole(path) as temporary:
        temporary.write_text("tw")
        raise RuntimeError
    assert path.read_text() == "one" and os.listdir(tmp_path / "new") == ["a.txt"]
    with storage.whole(path) as temporary:
        assert temporary.suffix == ".txt" and temporary.parent == path.parent
        temporary.write_text("two")
    assert storage.read_text(path) == "two" and storage.size(path) == 3
    assert storage.size(tmp_path / "none") is None
    with pytest.raises(OSError), storage.whole(path / "below.txt"):
        pass


def test_lines_are_there_at_once(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = storage.Lines(path)
    assert lines.read() == []
    lines.add("one")
    lines.add("two")
    assert path.read_text() == "one\ntwo\n"
    lines.replace(["one"])
    lines.add("three")
    lines.close()
    assert lines.read() == ["one", "three"]
