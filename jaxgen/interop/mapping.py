"""Published parameter names and layouts <-> ours, declared once and used in both directions.

A rule pairs a PyTorch name with the path of a Flax parameter. `{i}` stands for a number, the same on both sides; a
number that only PyTorch's name has becomes the leading axis of our parameter, as scan-over-layers stores it::

    rules = (
        *linear_rules("blocks.{i}.attn.proj", "blocks_{i}/attn/proj"),      # one parameter a block
        *linear_rules("blocks.{i}.ffn.fc1", "blocks/ffn/fc1"),              # one parameter for all, stacked
        Rule("pos_start", "pos_start"),
    )
    params = to_jax(read_state_dict("model.pth"), rules, ignore=("attn_bias_for_masking",))
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

__all__ = [
    "Layout",
    "Rule",
    "same",
    "linear",
    "conv",
    "reshape",
    "linear_rules",
    "conv_rules",
    "norm_rules",
    "to_jax",
    "to_torch",
    "check_shapes",
]

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one array is laid out on either side; the two functions undo each other exactly."""

    to_jax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


def _linear_swap(x: np.ndarray) -> np.ndarray:
    if x.ndim != 2:
        raise ValueError("a linear weight has 2 axes")
    return x.T


def _conv_to_jax(x: np.ndarray) -> np.ndarray:
    if x.ndim < 3:
        raise ValueError("a convolution's weight has at least 3 axes")
    return np.moveaxis(x, (0, 1), (-1, -2))


def _conv_to_torch(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, (-1, -2), (0, 1))


same = Layout(lambda x: x, lambda x: x)
"""Vectors, embeddings, norms, positions."""
linear = Layout(_linear_swap, _linear_swap)
"""[out, in] <-> [in, out]."""
conv = Layout(_conv_to_jax, _conv_to_torch)
"""[out, in, *window] <-> [*window, in, out], over one to three dimensions."""


def reshape(theirs: tuple[int, ...], ours: tuple[int, ...]) -> Layout:
    """Shapes that differ by axes of size 1 or by grouping; each may hold one -1.

    Example:
      >>> reshape((1, -1, 1, 1), (-1,)).to_jax(np.zeros((1, 16, 1, 1))).shape
      (16,)
    """
    return Layout(lambda x: x.reshape(ours), lambda x: x.reshape(theirs))


@dataclasses.dataclass(frozen=True)
class Rule:
    """One family of parameters.

    Attributes:
      theirs: name in the state dict, `.`-separated, with `{field}` for a number.
      ours: path in the params tree, `/`-separated. A field that is missing here is the leading, stacked axis; at most
        one may be.
      layout: of each single (unstacked) array.
      optional: whether a file may have none of these (biases that an option turns off).
    """

    theirs: str
    ours: str
    layout: Layout = same
    optional: bool = False

    def __post_init__(self):
        theirs, ours = _fields(self.theirs), _fields(self.ours)
        if not ours <= theirs or len(theirs - ours) > 1:
            raise ValueError(f"rule {self.theirs!r} -> {self.ours!r}: fields differ by more than one stacked axis")

    @property
    def stacked(self) -> str | None:
        """The field that becomes the leading axis."""
        return next(iter(_fields(self.theirs) - _fields(self.ours)), None)


def linear_rules(theirs: str, ours: str, *, bias: bool = True, optional: bool = False) -> tuple[Rule, ...]:
    """`torch.nn.Linear` -> `flax.linen.Dense`."""
    return _layer_rules(theirs, ours, "kernel", linear, bias, optional)


def conv_rules(theirs: str, ours: str, *, bias: bool = True, optional: bool = False) -> tuple[Rule, ...]:
    """`torch.nn.Conv1d/2d/3d` -> `flax.linen.Conv`."""
    return _layer_rules(theirs, ours, "kernel", conv, bias, optional)


def norm_rules(theirs: str, ours: str, *, bias: bool = True, optional: bool = False) -> tuple[Rule, ...]:
    """`torch.nn.GroupNorm`, `LayerNorm`, ... -> their namesakes in `flax.linen`."""
    return _layer_rules(theirs, ours, "scale", same, bias, optional)


def _layer_rules(theirs, ours, weight, layout, bias, optional) -> tuple[Rule, ...]:
    rules = (Rule(f"{theirs}.weight", f"{ours}/{weight}", layout, optional),)
    return (*rules, Rule(f"{theirs}.bias", f"{ours}/bias", same, optional)) if bias else rules


def to_jax(
    state_dict: Mapping[str, np.ndarray],
    rules: Iterable[Rule],
    *,
    ignore: Sequence[str] = (),
    expected: Params | None = None,
) -> Params:
    """The params tree that a state dict holds.

    Args:
      state_dict: published name -> array.
      rules: the first that fits a name takes it.
      ignore: regular expressions for whole names that are not parameters (buffers, caches) and are left out.
      expected: tree of shapes (see `check_shapes`), to which the result is compared. Without it, every rule that is not
        optional must find at least one name.

    Returns:
      Nested dict of numpy arrays with the dtypes of the file.

    Raises:
      ValueError: listing, with shapes, all names that no rule knows, all that are missing, and (given `expected`) all
        whose shape differs.

    Example:
      >>> params = to_jax({"fc.weight": np.zeros((3, 2)), "fc.bias": np.zeros(3)}, linear_rules("fc", "head"))
      >>> params["head"]["kernel"].shape
      (2, 3)
    """
    rules = tuple(rules)
    unknown: list[str] = []
    pieces: dict[str, dict[int, np.ndarray]] = {}  # path -> index on the stacked axis (0 if there is none) -> array
    source: dict[str, tuple[Rule, dict[str, str]]] = {}
    for name, array in state_dict.items():
        if any(re.fullmatch(pattern, name) for pattern in ignore):
            continue
        rule, fields = _first(rules, name, theirs=True)
        if rule is None:
            unknown.append(f"{name} {_shape(array)}")
            continue
        path, index = rule.ours.format(**fields), int(fields.pop(rule.stacked)) if rule.stacked else 0
        if source.setdefault(path, (rule, fields)) != (rule, fields):
            raise ValueError(f"{name}: {path} is already taken by {_partial(source[path][0].theirs, source[path][1])}")
        try:
            pieces.setdefault(path, {})[index] = rule.layout.to_jax(np.asarray(array))
        except ValueError as error:
            raise ValueError(f"{name} {_shape(array)}: does not fit {path} ({error})") from error

    used = {rule for rule, _ in source.values()}
    missing = [] if expected is not None else [r.theirs for r in rules if r not in used and not r.optional]
    flat = {}
    for path, arrays in pieces.items():
        rule, fields = source[path]
        # A few are enough for the message; a crafted index could leave a billion.
        holes = list(itertools.islice((i for i in range(max(arrays)) if i not in arrays), 20))
        missing += [rule.theirs.format(**fields, **{rule.stacked: i}) for i in holes]
        flat[path] = _stack([arrays[i] for i in sorted(arrays)], rule) if rule.stacked else arrays[0]
    problems = [_listing("unknown names", unknown), _listing("missing names", missing)]
    params = traverse_util.unflatten_dict(flat, sep="/")
    if expected is not None and not missing:
        problems += _differences(params, expected, rules)
    if any(problems):
        raise ValueError("the state dict does not fit the model: " + "; ".join(filter(None, problems)))
    return params


def _stack(arrays: Sequence[np.ndarray], rule: Rule) -> np.ndarray:
    shapes = sorted({_shape(array) for array in arrays})
    if len(shapes) > 1:
        raise ValueError(f"{rule.theirs}: shapes {shapes} differ and cannot be stacked")
    return np.stack(arrays)


def to_torch(params: Params, rules: Iterable[Rule]) -> dict[str, np.ndarray]:
    """The state dict of a params tree: the exact inverse of `to_jax`, buffers aside.

    Raises:
      ValueError: listing, with shapes, all parameters that no rule knows.
    """
    rules = tuple(rules)
    out: dict[str, np.ndarray] = {}
    unknown: list[str] = []
    for path, array in traverse_util.flatten_dict(params, sep="/").items():
        rule, fields = _first(rules, path, theirs=False)
        if rule is None:
            unknown.append(f"{path} {_shape(array)}")
        elif rule.stacked:
            for i, layer in enumerate(np.asarray(array)):
                out[rule.theirs.format(**fields, **{rule.stacked: i})] = rule.layout.to_torch(layer)
        else:
            out[rule.theirs.format(**fields)] = rule.layout.to_torch(np.asarray(array))
    if unknown:
        raise ValueError(_listing("parameters without a published name", unknown))
    return out


def check_shapes(params: Params, expected: Params, rules: Iterable[Rule] = ()) -> None:
    """Checks that `params` has the parameters of `expected` and their shapes.

    Args:
      params: tree of arrays.
      expected: tree of anything with a `shape`, such as `jax.eval_shape(module.init, ...)["params"]`.
      rules: if given, the published name is added to the path of what is wrong.

    Raises:
      ValueError: listing every parameter that is missing, not expected, or of another shape, with both shapes.
    """
    problems = _differences(params, expected, tuple(rules))
    if problems:
        raise ValueError("parameters do not fit the model: " + "; ".join(problems))


def _differences(params: Params, expected: Params, rules: tuple[Rule, ...]) -> list[str]:
    have = traverse_util.flatten_dict(params, sep="/")
    want = traverse_util.flatten_dict(expected, sep="/")

    def named(path: str) -> str:
        rule, fields = _first(rules, path, theirs=False)
        return path if rule is None else f"{path} ({_partial(rule.theirs, fields)})"

    missing = [f"{named(p)} {_shape(want[p])}" for p in want if p not in have]
    extra = [f"{named(p)} {_shape(have[p])}" for p in have if p not in want]
    wrong = [
        f"{named(p)} has {_shape(have[p])}, expected {_shape(want[p])}"
        for p in want
        if p in have and _shape(have[p]) != _shape(want[p])
    ]
    listings = (_listing("missing", missing), _listing("not expected", extra), _listing("wrong shape", wrong))
    return [text for text in listings if text]


_FIELD = re.compile(r"\{(\w+)\}")


def _fields(pattern: str) -> set[str]:
    return set(_FIELD.findall(pattern))


@functools.lru_cache(maxsize=4096)
def _regex(pattern: str) -> re.Pattern:
    """`pattern` with a named group of digits for the first use of a field and a back-reference for later ones."""
    seen: set[str] = set()
    out = []
    for i, part in enumerate(_FIELD.split(pattern)):
        if i % 2 == 0:
            out.append(re.escape(part))
        else:
            out.append(f"(?P={part})" if part in seen else f"(?P<{part}>0|[1-9][0-9]*)")
            seen.add(part)
    return re.compile("".join(out))


def _first(rules: tuple[Rule, ...], name: str, *, theirs: bool) -> tuple[Rule | None, dict[str, str]]:
    """The first rule that fits `name`, and the values of its fields."""
    for rule in rules:
        match = _regex(rule.theirs if theirs else rule.ours).fullmatch(name)
        if match:
            return rule, match.groupdict()
    return None, {}


def _partial(pattern: str, fields: Mapping[str, str]) -> str:
    """`pattern` with known fields filled in and the stacked one as it is."""
    return _FIELD.sub(lambda m: fields.get(m[1], m[0]), pattern)


def _shape(array: Any) -> tuple[int, ...]:
    return tuple(array.shape)


def _listing(title: str, names: Sequence[str], limit: int = 20) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return f"{title}: {', '.join(names[:limit])}{more}" if names else ""
