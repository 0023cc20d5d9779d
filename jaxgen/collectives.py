"""What a compiled program holds and moves on each device: its arrays, and its collectives, read from its text."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import NamedTuple

__all__ = ["COLLECTIVES", "Traffic", "array_shapes", "collectives"]

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all", "reduce-scatter")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\(")
_ARRAY = re.compile(r"\b([a-z]+)(\d+)\w*\[([\d,]*)\]")
_CALLS = re.compile(r"\b(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?:\{"n":"(\d+)"')


class Traffic(NamedTuple):
    """Of one kind of collective: how often it runs in one call of the program, and the bytes of its results on one device."""

    count: int
    bytes: int


def collectives(text: str) -> dict[str, Traffic]:
    """The collectives that one call of a compiled program runs.

    A loop's body counts as often as the compiler knows it to run, or once; all branches of a condition count.

    Args:
      text: `compiled.as_text()`, of a program for one or many devices.

    Returns:
      From the names in `COLLECTIVES` to what there is of them; those that do not occur are left out.

    Example:
      >>> import jax
      >>> collectives(jax.jit(lambda x: 2 * x).lower(1.0).compile().as_text())
      {}
    """
    counts, sizes = Counter(), Counter()
    computations, entry = _parse(text)

    def visit(name: str, times: int) -> None:
        operations, calls = computations.get(name, ((), ()))
        for kind, size in operations:
            counts[kind] += times
            sizes[kind] += times * size
        for callee, repeats in calls:
            visit(callee, times * repeats)

    visit(entry, 1)
    return {kind: Traffic(counts[kind], sizes[kind]) for kind in COLLECTIVES if counts[kind]}


def array_shapes(text: str) -> set[tuple[int, ...]]:
    """The shapes of all arrays that a compiled program has on one device, of `compiled.as_text()`."""
    return {tuple(int(n) for n in dims.split(",") if n) for _, _, dims in _ARRAY.findall(text)}


def _parse(text: str) -> tuple[dict[str, tuple[list, list]], str]:
    """Of each computation its collectives (kind, bytes) and its calls (computation, times); and the entry's name."""
    computations, entry, current = {}, "", ([], [])
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[1], ([], []))
            entry = header[1] if line.startswith("ENTRY") else entry
        elif operation := _OPERATION.match(line):
            shape, name = operation.groups()
            kind = name.removesuffix("-start")
            if kind in COLLECTIVES:
                current[0].append((kind, _bytes(shape, last=name != kind)))
            trips = _TRIPS.search(line) if name == "while" else None
            repeats = int(trips[1]) if trips else 1
            called = _CALLS.findall(line)
            for branches in _BRANCHES.findall(line):
                called += [branch.strip().lstrip("%") for branch in branches.split(",")]
            current[1].extend((callee, repeats) for callee in called)
    return computations, entry


def _bytes(shape: str, *, last: bool) -> int:
    """Of an array or a tuple of them; of a collective's start, whose tuple has its arguments first, the last array."""
    sizes = [_array_bytes(bits, dims) for _, bits, dims in _ARRAY.findall(shape)]
    return sizes[-1] if last and sizes else sum(sizes)


def _array_bytes(bits: str, dims: str) -> int:
    return math.prod(int(n) for n in dims.split(",") if n) * int(bits) // 8
