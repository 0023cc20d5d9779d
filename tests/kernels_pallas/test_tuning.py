import dataclasses

import pytest

from kernels_pallas import tuning
from kernels_pallas.device import Device


@dataclasses.dataclass(frozen=True)
class Blocks:
    q: int = 128
    k: int = 64


H100 = Device("gpu", "h100", "9.0")
ENTRY = tuning.Entry("attention", "h100", "bfloat16", 64, 1024, 0.5, {"k": 32}, 0.001, "jax 0.11.2, 2026-11-22")


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    tuning.write([dataclasses.replace(ENTRY, choice={"k": 16}), ENTRY], path)
    monkeypatch.setenv(tuning.OVERRIDE, str(path))
    return path


@pytest.mark.parametrize(
    ("length", "density", "want"),
    [(1, 1.0, (1, 1.0)), (680, 0.62, (1024, 0.5)), (1024, 0.75, (1024, 1.0)), (1025, 0.012, (2048, 1 / 64))],
)
def test_buckets(length, density, want):
    assert tuning.bucket(length, density) == want


def test_bad_buckets():
    with pytest.raises(ValueError, match="length=0"):
        tuning.bucket(0, 1.0)
    with pytest.raises(ValueError, match="density=1.5"):
        tuning.bucket(4, 1.5)


def test_a_measured_choice_is_used_for_its_bucket_only(table):
    assert tuning.read(table) == [ENTRY]  # the later one of two with one key
    common = {"dtype": "bfloat16", "head_size": 64}
    assert tuning.tuned(Blocks(), "attention", H100, length=680, density=0.62, **common) == Blocks(128, 32)
    for change in ({"length": 2000}, {"density": 0.1}, {"dtype": "float16"}, {"head_size": 128}):
        assert tuning.tuned(Blocks(), "attention", H100, **({"length": 680, "density": 0.62} | common | change)) == Blocks()
    assert tuning.tuned(Blocks(), "linear", H100, length=680, density=0.62, **common) == Blocks()
    assert tuning.tuned(Blocks(), "attention", Device("gpu", "a100"), length=680, density=0.62, **common) == Blocks()


def test_a_table_of_something_else(table):
    tuning.write([dataclasses.replace(ENTRY, choice={"stages": 2})], table)
    with pytest.raises(ValueError, match=r"names \['stages'\]"):
        tuning.tuned(Blocks(), "attention", H100, dtype="bfloat16", head_size=64, length=680, density=0.5)
    table.write_text("{")
    with pytest.raises(ValueError, match="not a table of kernel choices"):
        tuning.read(table)


def test_the_table_that_ships_is_readable():
    tuning.read()
