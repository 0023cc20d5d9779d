"""Shard patterns that a user gives: read from text, and checked against the parameters that they are meant for."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from jax.sharding import PartitionSpec as P

from jaxgen.train.mesh import AXES, compile_pattern

__all__ = ["Rule", "check_rules", "parse_rules"]

Rule = tuple[str, P]


def parse_rules(given: Iterable[str]) -> tuple[Rule, ...]:
    """`"head/kernel=fsdp,tensor"` as `("head/kernel", P("fsdp", "tensor"))`.

    What follows the last `=` has an entry a dimension: an axis of the mesh, several joined by `+`, or `-` where nothing is split.
    With nothing there, every device holds all of the parameter.

    Raises:
      ValueError: no `=`, a pattern that is no regular expression, or an unknown or repeated axis.

    Example:
      >>> parse_rules(["embed/embedding=fsdp+tensor,-", "norm="])
      (('embed/embedding', P(('fsdp', 'tensor'), None)), ('norm', P()))
    """
    return tuple(map(_parse, given))


def _parse(text: str) -> Rule:
    pattern, sep, entries = text.rpartition("=")
    if not sep or not pattern:
        raise ValueError(f"--shard {text!r}: expected PATTERN=AXES, such as head/kernel=fsdp,tensor")
    compile_pattern(pattern, f"--shard {text!r}: ")
    spec, seen = [], []
    for entry in filter(None, entries.split(",")):
        axes = () if entry.strip() == "-" else tuple(axis.strip() for axis in entry.split("+"))
        for axis in axes:
            if axis not in AXES:
                raise ValueError(f"--shard {text!r}: unknown axis {axis!r}; known: {', '.join(AXES)}, and - for none")
            if axis in seen:
                raise ValueError(f"--shard {text!r}: axis {axis!r} is given twice")
            seen.append(axis)
        spec.append(axes[0] if len(axes) == 1 else axes or None)
    return pattern, P(*spec)


def check_rules(rules: Sequence[Rule], stages: Sequence[Sequence[str]]) -> None:
    """That every pattern is of use, and no two want different things of one parameter.

    A recipe's own table serves models of many shapes, and there the first pattern that is found decides. What somebody gives for
    one run is meant for parameters that are there.

    Args:
      rules: given for this run.
      stages: the paths of each stage's parameters.

    Raises:
      ValueError: a pattern that is found in no path (similar paths are named), or two with different places for one parameter.
    """
    names = sorted({name for stage in stages for name in stage})
    for pattern, _ in rules:
        if not any(re.search(pattern, name) for name in names):
            near = difflib.get_close_matches(pattern, names, 3, 0.0)
            raise ValueError(f"--shard pattern {pattern!r} matches no parameter; there are {', '.join(near)}, and others")
    for name in names:
        found = [(pattern, spec) for pattern, spec in rules if re.search(pattern, name)]
        for pattern, spec in found[1:]:
            if spec != found[0][1]:
                raise ValueError(f"--shard patterns {found[0][0]!r} and {pattern!r} fight over {name}: {found[0][1]} and {spec}")
