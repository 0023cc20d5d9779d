"""Trying block sizes of kernels on a device and keeping the fastest."""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jaxgen.kernel_cases import Case
from kernels_pallas import tuning
from kernels_pallas.device import Device

__all__ = ["candidates", "tune"]

# By (case's op, platform, whether it is a backward case): the table's name of the op, and values to try for its fields.
_GRIDS: dict[tuple[str, str, bool], tuple[str, dict]] = {
    ("attention", "gpu", False): ("attention", {"block_k": (64, 128), "stages": (2, 3, 4), "take_turns": (True, False)}),
    ("attention", "gpu", True): (
        "attention_backward",
        {"block_k": (64, 128), "stages_k": (2, 3), "block_q": (64, 128), "stages_q": (2, 3)},
    ),
    ("attention", "tpu", False): ("attention", {"forward": ((256, 512), (512, 512), (256, 1024), (512, 1024))}),
    ("attention", "tpu", True): ("attention", {"columns": ((256, 256), (512, 256), (512, 512), (1024, 512))}),
    ("linear", "gpu", False): ("linear", {"stages": (2, 3)}),
    ("linear", "tpu", False): ("linear", {"chunk": (64, 128, 256), "heads": (2, 4, 8, 16)}),
    ("linear", "tpu", True): ("linear", {"segment": (2, 4, 8)}),
    ("delta", "gpu", False): ("gated_delta", {"stages": (2, 3)}),
    ("delta", "tpu", False): ("gated_delta", {"chunk": (32, 64, 128), "rows": (1, 2, 4)}),
    ("decode", "gpu", False): ("decode", {"keys": (64, 128, 256), "stages": (2, 3, 4)}),
    ("decode", "tpu", False): ("decode", {"positions": (256, 512, 1024, 2048)}),
    ("int4", "gpu", False): ("int4", {"k": (128, 256, 512), "warpgroups": (1, 2), "stages": (2, 3, 4)}),
    ("int4", "tpu", False): ("int4", {"n": (256, 512, 1024), "k": (512, 1024, 2048)}),
}


def candidates(case: Case, device: Device) -> tuple[str, list[dict]]:
    """(the op's name in the table, choices to try); no choices where nothing of the case is tunable on the device."""
    name, grid = _GRIDS.get((case.op, device.platform, case.backward), (case.op, {}))
    if name == "decode" and "tree" in case.name:
        name = "tree"
    if not grid:
        return name, []
    return name, [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


def tune(
    cases: Sequence[Case], device: Device, measure: Callable[[Case], float], versions: str, log: Callable[[str], None] = print
) -> Iterator[tuning.Entry]:
    """Measures every candidate of every case, each in a table of its own, and yields the fastest where it beats the static rule.

    Args:
      cases: what to tune.
      device: the one at hand.
      measure: seconds of a case, compiled anew.
      versions: to be recorded.
      log: takes a line a candidate.
    """
    before = os.environ.get(tuning.OVERRIDE)
    kept: dict[tuple, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for index, case in enumerate(cases):
                op, choices = candidates(case, device)
                length, density = tuning.bucket(case.bucket["length"], case.bucket["density"])
                key = (op, device.kind, case.bucket["dtype"], case.bucket["head_size"], length, density)
                best, least = {}, math.inf
                for number, choice in enumerate([{}, *choices] if choices else []):
                    table = Path(folder) / f"{index}-{number}.json"
                    # What an earlier case (the forward pass) chose for the same key stays.
                    tuning.write([tuning.Entry(*key, {**kept.get(key, {}), **choice}, 0.0, versions)], table)
                    os.environ[tuning.OVERRIDE] = str(table)
                    took = _measured(measure, case, choice, log)
                    if took < least:
                        best, least = choice, took
                if best:
                    kept[key] = {**kept.get(key, {}), **best}
                    yield tuning.Entry(*key, kept[key], least, versions)
        finally:
            if before is None:
                os.environ.pop(tuning.OVERRIDE, None)
            else:
                os.environ[tuning.OVERRIDE] = before


def _measured(measure, case: Case, choice: dict, log) -> float:
    try:
        took = measure(case)
    except Exception as error:  # sizes that do not fit a device fail in many ways
        log(f"{case.name} {choice or 'static'}: {' '.join(str(error).split())[:100]}")
        return math.inf
    log(f"{case.name} {choice or 'static'}: {1e3 * took:.4f} ms")
    return took
