"""Who may attend to whom, made from an order. Each function returns a `kernels_pallas.BlockMask`.

Masks of one shape combine: `a & b`, `a | b`, `~a`; `mask[i:j, k:l]` cuts. So a causal 7x7 neighbourhood is
`neighbourhood(scales((h,)), 7) & block_causal(raster(h * h))`, and packed documents are
`documents(segments) & block_causal(raster(l))`.

The predicates run inside kernels, on tiles of metadata: they compare the rows of queries with those of keys, one by one, and
combine. All arithmetic (windows, residues, tours of a tree) is done here, on the host, in the metadata; where one number is
compared twice its row is there twice, since kernels load all rows and Mosaic needs a use for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxgen.orders import Order
from kernels_pallas import BlockMask

__all__ = [
    "Regrouped",
    "block_causal",
    "block_diagonal",
    "block_diffusion",
    "dilated",
    "documents",
    "draw",
    "neighbourhood",
    "prefix",
    "skip_causal",
    "sliding",
    "tree",
]

_BLOCK = (128, 64)


def _not_later(q, k):
    return q[0] >= k[0]


def _same(q, k):
    return q[0] == k[0]


def _same_document(q, k):
    return (q[0] == k[0]) & (k[0] > 0)


def _itself_or_clean_before(q, k):
    """Rows: step, and 1 where clean."""
    return ((q[0] == k[0]) & (q[1] == k[1])) | ((k[1] == 1) & (k[0] < q[0]))


def _in_range(q, k):
    """Rows of queries: group, first, last; of keys: group, place, place."""
    return (q[0] == k[0]) & (q[1] <= k[1]) & (q[2] >= k[2])


def _in_rectangle(q, k):
    """Rows as in `_in_range`, then first and last along a second axis, and twice the place there."""
    return _in_range(q, k) & (q[3] <= k[3]) & (q[4] >= k[4])


def _in_box(q, k):
    return _in_rectangle(q, k) & (q[5] <= k[5]) & (q[6] >= k[6])


def _inside_subtree(q, k):
    """Rows of queries: entry, entry; of keys: entry, exit."""
    return (q[0] >= k[0]) & (q[1] < k[1])


def _build(pred, q_rows, k_rows, block) -> BlockMask:
    return BlockMask.build(pred, np.stack(q_rows), np.stack(k_rows), block)


def block_causal(order: Order, *, block: tuple[int, int] = _BLOCK) -> BlockMask:
    """Each position sees its own step and all earlier ones (VAR, Tian et al. 2024, fig. 3b).

    With `raster(l)` this is the plain causal mask.
    """
    return _build(_not_later, [order.step_of], [order.step_of], block)


def block_diagonal(order: Order, *, block: tuple[int, int] = _BLOCK) -> BlockMask:
    """Each position sees its own step only: the scale-Markov mask (HMAR, Kumbong et al. 2025).

    The previous scale reaches a scale through its inputs, which are the picture so far, resized to its grid.
    """
    return _build(_same, [order.step_of], [order.step_of], block)


def neighbourhood(
    order: Order,
    window: int | Sequence[int],
    *,
    back: int = 0,
    edges: str = "shift",
    since: int = 0,
    block: tuple[int, int] = _BLOCK,
) -> BlockMask:
    """Each position sees a window of a grid around its own place, within one step.

    On a single map (`scales((h,))`) this is neighbourhood attention (Hassani et al. 2023). On scales it is the spatial-Markov
    attention of MVAR (Zhang et al. 2025), whose queries, keys and values are all of scale l, since what scale l reads is the
    adjacent previous scale, resized to its grid. With `back=1` keys are those of the previous scale itself, around the
    corresponding place; `neighbourhood(order, 7) | neighbourhood(order, 7, back=1)` sees both.

    Args:
      order: steps with grids of rank 1 to 3.
      window: positions along each axis, odd: one number or one an axis.
      back: how many steps before its own a position looks; steps that have none so far back look at themselves.
      edges: "shift" keeps windows whole by moving them inside the grid, so that every position sees the same number of keys;
        "cut" leaves them centred, so that fewer are seen at the edges.
      since: positions of steps before this one see the whole grid.
      block: see `BlockMask`.

    Raises:
      ValueError: grids of differing rank or of more than three axes, a window that is even or not positive or of another rank,
        a negative `back` or `since`, or another word for `edges`.
    """
    coords = order.coords
    rank = len(coords)
    if rank > 3:
        raise ValueError(f"shapes {order.shapes}: neighbourhoods have one to three axes, not {rank}")
    windows = (window,) * rank if np.ndim(window) == 0 else tuple(window)
    if len(windows) != rank or any(w < 1 or w % 2 == 0 for w in windows):
        raise ValueError(f"window={window} must be odd and positive, one number or one for each of {rank} axes")
    if back < 0:
        raise ValueError(f"back={back} must not be negative")
    if since < 0:
        raise ValueError(f"since={since} must not be negative")
    if edges not in ("shift", "cut"):
        raise ValueError(f"edges={edges!r} is not 'shift' or 'cut'")
    step = order.step_of
    source = np.where(step >= back, step - back, step)
    shapes = np.array(order.shapes)
    bounds = []
    for axis, w in enumerate(windows):
        size, size_there = shapes[step, axis], shapes[source, axis]
        # The cell of the other grid that holds the centre of this one.
        first = (2 * coords[axis] + 1) * size_there // (2 * size) - w // 2
        if edges == "shift":
            first = np.clip(first, 0, np.maximum(size_there - w, 0))
        whole = step < since
        bounds += [np.where(whole, 0, first), np.where(whole, size_there, first + w) - 1]
    pred = (_in_range, _in_rectangle, _in_box)[rank - 1]
    return _build(pred, [source, *bounds], [step, *np.repeat(coords, 2, axis=0)], block)


def block_diffusion(order: Order, *, block: tuple[int, int] = _BLOCK) -> BlockMask:
    """For [noisy, clean] sequences of 2l positions: training of all steps of block diffusion at once.

    Noisy step i sees itself and the clean steps < i, clean step i the clean steps <= i (BD3-LM, Arriola et al. 2025:
    block-diagonal, offset block-causal and block-causal parts).
    """
    return _noisy_and_clean(order, (0, 1), block)


def skip_causal(order: Order, *, block: tuple[int, int] = _BLOCK) -> BlockMask:
    """For [clean, noisy] sequences of 2l positions: the skip-causal mask (ACDiT, Hu et al. 2024).

    Who sees whom is as in `block_diffusion`; the authors put the clean half first.
    """
    return _noisy_and_clean(order, (1, 0), block)


def _noisy_and_clean(order, clean, block) -> BlockMask:
    rows = [np.tile(order.step_of, 2), np.repeat(clean, order.length)]
    return _build(_itself_or_clean_before, rows, rows, block)


def sliding(order: Order, window: int, *, causal: bool = True, block: tuple[int, int] = _BLOCK) -> BlockMask:
    """Each position sees the last `window` steps, its own included (Beltagy et al. 2020, section 3.1).

    With `raster(l)` these are positions, with steps that are frames it is a window of frames.

    Args:
      order: the steps.
      window: how many steps back, at least 1.
      causal: False sees as many ahead, 2 window - 1 steps in all.
      block: see `BlockMask`.

    Raises:
      ValueError: a window below 1.
    """
    first, last = _reach(order.step_of, window, causal)
    none = np.zeros_like(first)
    return _build(_in_range, [none, first, last], [none, order.step_of, order.step_of], block)


def _reach(place, window: int, causal: bool):
    if window < 1:
        raise ValueError(f"window={window} must be at least 1")
    return place - window + 1, place if causal else place + window - 1


class Regrouped(NamedTuple):
    """A mask over positions in another order, in which its live blocks are few.

    Attributes:
      mask: between `x[:, permutation]` and itself.
      permutation: int32 [l], the position that comes i-th.
      inverse: int32 [l], where each position went: `x[:, permutation][:, inverse]` is x.
    """

    mask: BlockMask
    permutation: np.ndarray
    inverse: np.ndarray


def dilated(order: Order, window: int, dilation: int, *, causal: bool = True, block: tuple[int, int] = _BLOCK) -> Regrouped:
    """Each position sees every `dilation`-th step, `window` of them, its own included (Beltagy et al. 2020, fig. 2c).

    Steps of one residue modulo `dilation` see one another and nobody else, so positions are regrouped by residue: the mask is
    then `dilation` sliding windows down the diagonal, where in the original order every block near it is live.

    Args:
      order: the steps.
      window: how many steps are seen, at least 1.
      dilation: distance between them, at least 1.
      causal: False sees as many ahead, 2 window - 1 steps in all.
      block: see `BlockMask`.

    Returns:
      The mask of regrouped positions, the permutation that regroups and its inverse.

    Raises:
      ValueError: a window or dilation below 1.

    Example:
      >>> mask, permutation, inverse = dilated(raster(8192), 128, 8)
      >>> out = attend(*(x[:, permutation] for x in (q, k, v)), mask)[:, inverse]    # doctest: +SKIP
    """
    if dilation < 1:
        raise ValueError(f"dilation={dilation} must be at least 1")
    turn, residue = np.divmod(order.step_of, dilation)
    permutation = np.argsort(residue, kind="stable").astype(np.int32)
    turn, residue = turn[permutation], residue[permutation]
    mask = _build(_in_range, [residue, *_reach(turn, window, causal)], [residue, turn, turn], block)
    return Regrouped(mask, permutation, np.argsort(permutation).astype(np.int32))


def prefix(order: Order, steps: int, *, block: tuple[int, int] = _BLOCK) -> BlockMask:
    """The first `steps` steps see one another, and later ones themselves and all before (prefix LM, Raffel et al. 2020, fig. 3).

    Raises:
      ValueError: more steps than the order has, or a negative number.
    """
    if not 0 <= steps <= order.steps:
        raise ValueError(f"steps={steps} must be within 0..{order.steps}, the steps of the order")
    group = np.maximum(order.step_of, steps - 1)
    return _build(_not_later, [group], [group], block)


def documents(segments: Sequence[int], *, block: tuple[int, int] = _BLOCK) -> BlockMask:
    """Positions see those of their own document: several of them packed into one row (Krell et al. 2021).

    Args:
      segments: [l], the document of each position, from 1; 0 is padding, which sees nothing and is seen by nobody.
      block: see `BlockMask`.

    Raises:
      ValueError: another rank, or negative numbers.
    """
    segments = np.asarray(segments)
    if segments.ndim != 1 or segments.dtype.kind not in "iu" or segments.min(initial=0) < 0:
        raise ValueError(f"segments {segments.shape} must be whole numbers [l] and not negative")
    return _build(_same_document, [segments], [segments], block)


def tree(parents: Sequence[int], *, block: tuple[int, int] = _BLOCK) -> BlockMask:
    """Each node sees itself and its ancestors: candidates of speculative decoding in one pass (Miao et al. 2024).

    A walk through the tree that numbers nodes as it enters them gives each the interval of its subtree; i sees j where j's
    interval holds i.

    Args:
      parents: [l], the index of each node's parent; -1 is a root, of which there may be several.
      block: see `BlockMask`.

    Raises:
      ValueError: another rank, an index that is out of range, or a cycle.
    """
    parents = np.asarray(parents)
    if parents.ndim != 1 or parents.dtype.kind not in "iu" or not ((parents >= -1) & (parents < len(parents))).all():
        raise ValueError(f"parents {parents.tolist()} must be indices [l] from -1 to {parents.size - 1}")
    children: list[list[int]] = [[] for _ in range(len(parents) + 1)]  # the last list is of the roots, whose parent is -1
    for node, parent in enumerate(parents):
        children[parent].append(node)
    enter, leave = np.full((2, len(parents)), -1)
    clock, stack = 0, [(node, False) for node in children[-1]]
    while stack:
        node, done = stack.pop()
        if done:
            leave[node] = clock
            continue
        enter[node] = clock
        clock += 1
        stack += [(node, True), *((child, False) for child in children[node])]
    if clock < len(parents):
        raise ValueError(f"parents {parents.tolist()}: nodes {np.flatnonzero(enter < 0).tolist()} are on a cycle or below one")
    return _build(_inside_subtree, [enter, enter], [enter, leave], block)


def draw(mask: BlockMask) -> str:
    """The mask as text, a row a query: `#` allowed, `.` not."""
    return "\n".join("".join("#" if x else "." for x in row) for row in mask.dense())
