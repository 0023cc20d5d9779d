"""Tuning with a clock that prefers one choice: what is tried is what the kernels' static choices then return."""

import pytest

from jaxgen import kernel_cases, kernel_tuning
from kernels_pallas import target, tuning
from kernels_pallas.attention import hopper, hopper_backward, tpu_blocks
from kernels_pallas.attention.problem import Problem


def problem(case):
    b, _, h, d = case.shapes[0].shape
    return Problem(case.mask, b, h, h, d, "bfloat16", d**-0.5)


@pytest.fixture(scope="module")
def cases():
    return [case for case in kernel_cases.measured("full") if case.name.startswith("attention/var-2240")]


def test_the_fastest_choice_is_kept_and_used(cases, tmp_path, monkeypatch):
    with target("h100") as device:
        tried = []

        def measure(case):
            module = hopper_backward if case.backward else hopper
            blocks = module.static_choice(problem(case), device)
            tried.append(blocks)
            return 1.0 if blocks.block_k == 64 and (case.backward or not blocks.take_turns) else 2.0

        entries = list(kernel_tuning.tune(cases, device, measure, "v", log=lambda line: None))
        assert len(set(tried)) > 12
        assert [entry.op for entry in entries] == ["attention", "attention_backward"]
        assert entries[0].choice["block_k"] == 64 and entries[0].choice["take_turns"] is False
        tuning.write(entries, tmp_path / "t.json")
        monkeypatch.setenv(tuning.OVERRIDE, str(tmp_path / "t.json"))
        assert hopper.static_choice(problem(cases[0]), device).take_turns is False


def test_forward_and_backward_share_an_entry_on_tpus(cases):
    with target("v5e") as device:

        def measure(case):
            blocks = tpu_blocks.static_choice(problem(case), device)
            return 1.0 if (blocks.columns == (1024, 512) if case.backward else blocks.forward == (256, 1024)) else 2.0

        *_, last = kernel_tuning.tune(cases, device, measure, "v", log=lambda line: None)
    assert last.choice == {"forward": (256, 1024), "columns": (1024, 512)}


def test_choices_that_fail_or_do_not_help_are_not_kept(cases):
    lines = []

    def measure(case):
        if tuple(lines):
            raise RuntimeError("does not fit")
        return 1.0

    with target("h100") as device:
        assert list(kernel_tuning.tune(cases[:1], device, measure, "v", log=lines.append)) == []
    assert "1000.0000 ms" in lines[0] and "does not fit" in lines[1]
    with target("cpu") as device:
        assert kernel_tuning.candidates(cases[0], device)[1] == []
