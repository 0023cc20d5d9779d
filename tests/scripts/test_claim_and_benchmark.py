import importlib.metadata
import json
import math
import re
from pathlib import Path

import pytest

from jaxgen import cli
from jaxgen.recipes import claims
from jaxgen.recipes.claims import Claim

TOY = '''"""S900 Toy: counts to three (Nobody 1900)."""

from jaxgen.recipes.claims import Claim


def claim(budget, *, seeds, edits):
    if budget == "none":
        raise ValueError("budget 'none' is not one of some")
    rows = [{"system": "toy", "loss": 0.123456, "edits": " ".join(edits)}, {"system": "baseline", "seeds": seeds}]
    return [Claim("Toy against baseline", rows, "The toy lost."), Claim("Nothing", [{"a": 1}])]
'''


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """Lets scripts find a folder with one toy system, and one that has no claim."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("raise RuntimeError")
    (tmp_path / "configs" / "toy.py").write_text(TOY + "\n\ndef get_config(variant):\n    pass\n")
    (tmp_path / "configs" / "other.py").write_text('"""S901 Other."""\n\ndef get_config(variant):\n    pass\n')
    run = cli.run

    def elsewhere(main):
        main.__globals__["HERE"] = tmp_path / "scripts"
        run(main)

    monkeypatch.setattr(cli, "run", elsewhere)


def test_a_claim_is_printed_and_appended(toy, succeeds, refused, tmp_path):
    results = tmp_path / "new" / "RESULTS.md"
    args = ("claim", "S900", "--budget", "some", "--seeds", 2, "--results", results)
    out = succeeds(*args, "--set", "a.b=1", "c=2")
    assert "Toy against baseline" in out and "The toy lost." in out and out.endswith(f"appended to {results}\n")
    text = results.read_text()
    assert "## S900 Toy: counts to three (Nobody 1900)\n" in text
    assert "| system | loss | edits | seeds |\n| --- | --- | --- | --- |\n| toy | 0.1235 | a.b=1 c=2 |  |\n" in text
    setting = next(line for line in text.splitlines() if "budget some" in line)
    assert re.match(r"\d{4}-\d\d-\d\d, ", setting) and setting.endswith("budget some, a.b=1, c=2")
    assert f"jax {importlib.metadata.version('jax')}" in setting and " cores)" in setting
    succeeds(*args)
    assert results.read_text().startswith(text) and results.read_text().count("## S900 Toy") == 2

    before = results.read_text()
    assert refused("claim", "S900", "--budget", "none", "--results", results) == "budget 'none' is not one of some"
    for system in ("S901", "S90", "toy"):
        line = refused("claim", system, "--results", results)
        assert line == f"system {system!r}: no file in configs/ opens with it and has a claim"
    assert results.read_text() == before

    toy = (tmp_path / "configs" / "toy.py").read_text()
    (tmp_path / "configs" / "twin.py").write_text(toy.replace("S900 Toy", "S900 Twin"))
    assert refused("claim", "S900", "--results", results) == "system 'S900': there are 'S900 Toy', 'S900 Twin'"
    succeeds("claim", "S900 Twin", "--budget", "some", "--results", results)
    assert "## S900 Twin: counts to three" in results.read_text()
    (tmp_path / "configs" / "third.py").write_text(toy.replace("S900 Toy", "S900 Twin of clips"))
    for system in ("S900 Twin", "S900 Twin of clips"):  # a whole name is one, whatever goes on behind it
        succeeds("claim", system, "--budget", "some", "--results", results)
    assert results.read_text().count("## S900 Twin: ") == 2 and "## S900 Twin of clips: " in results.read_text()


def test_the_claim_of_s047_is_found(monkeypatch, succeeds, refused, tmp_path):
    def compare(systems, *, seeds, samples, log):
        return Claim("comparison", [{"systems": len(systems), "seeds": seeds, "samples": samples}])

    monkeypatch.setattr(claims, "compare_generators", compare)
    monkeypatch.setattr(claims, "scaling_law", lambda sizes, log: Claim("sizes", [{"models": len(sizes)}]))
    results = tmp_path / "RESULTS.md"
    succeeds("claim", "S047", "--budget", "smoke", "--seeds", 1, "--results", results)
    text = results.read_text()
    assert "## S047 VAR" in text and "| 2 | 1 | 100 |" in text and "| models |\n| --- |\n| 4 |" in text
    edit = ("--set", "tokenizer.colour=red")
    assert "unknown key 'colour'" in refused("claim", "S047", "--budget", "smoke", "--results", results, *edit)
    assert "budget 'huge' is not one of smoke, small" in refused("claim", "S047", "--budget", "huge", "--results", results)
    assert results.read_text() == text


RESULTS = Path(__file__).parents[2] / "scripts" / "claims" / "RESULTS.md"
NEXT_SCALE = "S064 S011 S085 S080 S007 S010 S014 S093 S048 S008 S090 S165 S086".split()
MEASURES = ("Frechet", "model calls|steps a stage", "ms/image", "sampling temporary MB", "sampling GFLOP/image")


@pytest.mark.parametrize("system", NEXT_SCALE)
def test_results_of_next_scale_systems_hold_every_measure(system):
    """Quality, steps, seconds, memory and operations, in every row of the claim's first table on the page."""
    section = re.search(rf"^## {system} .*?(?=^## |\Z)", RESULTS.read_text(), re.MULTILINE | re.DOTALL).group()
    table = re.search(r"(^\|.*\n)+", section, re.MULTILINE).group()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    assert rows and all(len(row) == len(head) for row in rows)
    for measure in MEASURES:
        columns = [i for i, name in enumerate(head) if re.match(measure, name)]
        assert columns and all(row[i] for row in rows for i in columns), measure


TINY = (
    "model.width=32 model.heads=2 model.num_classes=5 tokenizer.ch=8 tokenizer.groups=8 tokenizer.ch_mult=1 "
    "tokenizer.res_blocks=1 tokenizer.attention=false tokenizer.patch_nums=1,8 tokenizer.phis=1 tokenizer.vocab=16 "
    "tokenizer.width=4 data.image_size=8 tokenizer_train.adversarial_weight=0 tokenizer_train.perceptual_weight=0"
).split()


def test_benchmark_of_a_tiny_var(succeeds, refused, tmp_path):
    flags = ("benchmark", "var", "--depth", 1, "--repeats", 2, "--set", *TINY)
    out = succeeds(*flags, "--batch", "2", "--train", "--json", tmp_path / "new" / "b.json")
    rows = json.loads(out.splitlines()[-1])
    assert json.loads((tmp_path / "new" / "b.json").read_text()) == rows
    sample, train = rows
    assert (sample["what"], train["what"]) == ("VAR-d1 sample", "VAR-d1 train step")
    for row in rows:
        assert (row["batch"], row["pixels"], row["dtype"], row["repeats"]) == (2, 8, "float32", 2)
        assert 0 < row["seconds_min"] <= row["seconds"] and row["images_per_s"] == pytest.approx(2 / row["seconds"])
        assert row["compile_s"] > 0 and row["peak_MB"] > 10 and row["argument_MB"] > 0
        assert all(math.isfinite(x) for x in row.values() if isinstance(x, float))
        assert row["jax"] == importlib.metadata.version("jax")
    names = out.splitlines()[0].split()
    assert {"batch", "seconds", "images_per_s", "TFLOP", "peak_MB"} <= set(names)

    bad = tmp_path / "bad.json"
    for args, line in (
        (("--batch", "0"), "--batch 0: expected at least 1"),
        (("--batch", "1,two"), "--batch 1,two: 'two' is not int"),
        (("--repeats", 0), "--repeats 0: expected at least 1"),
        (("--dtype", "float7"), "dtype='float7': expected one of"),
        (("--depth", 0), "model.depth=0: expected at least 1"),
        (("--topology", "nonsense:9x9"), "topology 'nonsense:9x9': "),
    ):
        assert line in refused(*flags, *args, "--json", bad)
    assert not bad.exists()
