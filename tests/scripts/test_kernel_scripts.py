"""The scripts about kernels: what they measure, what they read off compilers, and when they complain."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxgen import kernel_benchmark, kernel_cases, kernel_compile, kernel_peers
from kernels_pallas import linear_attention, target

ROOT = Path(__file__).resolve().parents[2]
OTHERS = ("fla", "tokamax", "torch")


@pytest.fixture(scope="module")
def checker():
    spec = importlib.util.spec_from_file_location("compile_kernels", ROOT / "scripts" / "compile_kernels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_benchmark_of_kernels(succeeds, refused):
    rows = json.loads(succeeds("benchmark", "kernels", "--only", "int4/m1-", "--repeats", 2).splitlines()[-1])
    assert [row["by"] for row in rows] == ["xla", "dense product, x's type"]
    case = next(case for case in kernel_cases.measured("small") if case.name == rows[0]["case"])
    for row in rows:
        # ms is printed to four digits behind the point.
        assert row["TF/s"] == pytest.approx(case.flops / row["ms"] / 1e9, abs=1e-3, rel=0.2)
    assert "--only 'nonsense' fits none of attention/" in refused("benchmark", "kernels", "--only", "nonsense")
    assert "size='huge' is not one of full, small" in refused("benchmark", "kernels", "--size", "huge")
    assert "no kernel with block sizes to choose runs on cpu" in refused("tune_kernels", "--only", "decode")


def test_every_implementation_that_runs_here_and_all_peers_have_a_row():
    case = next(case for case in kernel_cases.measured("small") if case.name.startswith("attention/hmar") and case.backward)
    rows = {row["by"]: row for row in kernel_benchmark.bench([case], repeats=1)}
    assert list(rows) == ["split", "xla", *(peer.name for peer in kernel_peers.peers(case))]
    assert {row["note"] for row in rows.values() if "note" in row} <= {"needs CUDA", *(f"{x} is not installed" for x in OTHERS)}
    for name in ("split", "xla", "XLA, dense mask"):
        row = rows[name]
        assert row["ms"] > 0 and row["executed TF/s"] >= row["TF/s"] and row["of limit"] == ""


def test_work_of_a_case():
    """Counted by hand: scales of 1, 4, 16, 64 tokens that see themselves."""
    small = kernel_cases._attention("hmar", 85, 2, 3, 8, backward=False)
    assert small.flops == 4 * 2 * 3 * 8 * (1 + 4**2 + 16**2 + 64**2)
    assert small.bytes == 4 * 2 * 85 * 3 * 8 * 2
    gradients = kernel_cases._attention("hmar", 85, 2, 3, 8, backward=True)
    assert gradients.flops == 3.5 * small.flops and gradients.bytes == 2 * small.bytes
    fn, args = gradients.build()
    assert [x.shape for x in jax.eval_shape(fn, *args)] == [(2, 85, 3, 8)] * 3
    with target("h100"):
        nk = kernel_cases._int4(16, 1024, 512)
    assert nk.shapes[1].layout == "nk" and kernel_cases._int4(16, 1024, 512).shapes[1].layout == "kn"
    assert nk.bytes == 16 * 1024 * 2 + 1024 * 512 / 2 + 8 * 512 * 2 + 16 * 512 * 2


def test_reports_of_compilers(tmp_path):
    tpu = "Schedule analysis:\n\ttotal scheduled bundles:    30\n\tnon empty scheduled bundles: {n}\n\t 3 bundles: {what}\n"
    for name, n, what in (("TLP", 9, "tpu_custom_call"), ("copy.3", 8, "copy"), ("decode.12", 7, "tpu_custom_call")):
        (tmp_path / f"17953-{name}-72-schedule-analysis_final_bundles.txt").write_text(tpu.format(n=n, what=what))
    assert kernel_compile._tpu_reports(tmp_path) == [kernel_compile.Report("decode", bundles=7)]
    (tmp_path / "a.ptxas").write_text(
        "ptxas info    : Compiling entry function 'decode_mosaic_gpu_kernel' for 'sm_90a'\n"
        "    0 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 16 barriers\n"
    )
    assert kernel_compile._gpu_reports(tmp_path) == [kernel_compile.Report("decode", registers=168, spills=20)]


def test_the_record_is_complete_and_clean(checker):
    record = checker.read_record()
    assert checker.check(record, []) == []
    with_kernels = {(row["case"], row["target"]) for row in record}
    assert with_kernels == {(case.name, name) for case in kernel_cases.compiled() for name in kernel_compile.TARGETS}
    assert not any(row["kernel"].startswith("FAILED") for row in record)


def test_growth_spills_and_failures_are_errors(checker):
    row = {"case": "c", "target": "v5e", "kernel": "k", "bundles": 111, "spills": "", "jax": "1"}
    old = row | {"bundles": 100}
    assert checker.check([row], [old]) == ["c on v5e, k: 111 bundles, 100 are recorded"]
    assert checker.check([row | {"bundles": 110}], [old]) == checker.check([row], [old | {"jax": "2"}]) == []
    assert checker.check([row | {"spills": 8}], []) == ["c on v5e, k: 8 bytes of spilled registers"]
    assert checker.check([{"case": "c", "target": "v5e", "kernel": "FAILED: because"}], []) == ["c on v5e, FAILED: because"]


def test_a_program_without_a_kernel_says_what_serves(checker):
    x = jax.ShapeDtypeStruct((1, 64, 1, 96), jnp.bfloat16)
    assert checker.no_kernel(lambda *x: linear_attention(*x)[0], (x, x, x), kernel_compile.TARGETS["sm_90a"]) == "none, xla"


def test_packages_fit_the_installed_jax():
    assert kernel_compile.packages(kernel_compile.TARGETS["v5e"])[0].startswith("libtpu==")
    assert f"jax-cuda13-plugin=={jax.__version__}" in kernel_compile.packages(kernel_compile.TARGETS["sm_90a"])
