"""Match, then replace: tokens that are sampled already are swapped for their nearest code (S074 IndexMark, Tong et al. 2025).

Codes are paired with their like; one of each pair, at random, is green. A red token becomes its green partner, which decodes
to nearly the same picture. Nothing here is part of sampling, so every sampler can be followed by it, speculative ones too.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

__all__ = ["Crops", "green_of_pairs", "pair_codes", "place_crop", "replace_red"]


def pair_codes(
    codebook: Float[np.ndarray, "v c"], *, cosine: bool = False, neighbours: int = 10, sweeps: int = 20
) -> Int[np.ndarray, "v"]:
    """Pairs every code with a like one; the total similarity of the pairs is made large.

    Greedy matching, most similar pair first, then exchanges: while two pairs (a, b), (c, d) with c among the nearest codes of a
    are better off as (a, c), (b, d), they change partners. (The authors ran a blossom algorithm over the ten nearest neighbours.)

    Args:
      codebook: v codes.
      cosine: similarity is the cosine, for codebooks that are looked up so; else minus the squared distance.
      neighbours: exchanges are tried with so many nearest codes.
      sweeps: at most so many rounds of exchanges.

    Returns:
      partner: each code's partner; a code that is left over, where v is odd, is its own.

    Raises:
      ValueError: fewer than two codes.
    """
    x = np.asarray(codebook, np.float32)
    v = len(x)
    if v < 2:
        raise ValueError(f"codebook of {v} codes: pairs need at least 2")
    if cosine:
        x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    norms = np.zeros(v, np.float32) if cosine else np.square(x).sum(axis=1)
    similarity = (1 if cosine else 2) * (x @ x.T) - norms[:, None] - norms
    similarity = np.maximum(similarity, similarity.T)  # rounding may leave it asymmetric
    np.fill_diagonal(similarity, -np.inf)
    partner = _greedy(similarity)
    count = min(neighbours, v - 1)
    near = np.stack([np.argpartition(-row, count - 1)[:count] for row in similarity])
    for _ in range(sweeps):
        if not _exchange(similarity, partner, near):
            break
    return partner


def _greedy(similarity: Float[np.ndarray, "v v"]) -> Int[np.ndarray, "v"]:
    """The most similar pair of those without partners, again and again."""
    rest, partner = similarity.copy(), np.arange(len(similarity))
    left, nearest = np.arange(len(similarity)), np.argmax(similarity, axis=1)
    while len(left) > 1:
        # Codes that are each other's nearest are pairs of the greedy matching, whatever comes before them.
        mutual = nearest[nearest[left]] == left
        matched = left[mutual]
        partner[matched] = nearest[matched]
        rest[:, matched] = -np.inf
        left = left[~mutual]
        stale = left[np.isin(nearest[left], matched)]
        nearest[stale] = np.argmax(rest[stale], axis=1)
    return partner


def _exchange(similarity, partner, near) -> bool:
    """Changes partners in place wherever it helps; whether it did anywhere."""
    changed = False
    for a in range(len(partner)):
        for c in near[a]:
            b, d = partner[a], partner[c]
            if b in (a, c) or d == c:
                continue
            if similarity[a, c] + similarity[b, d] > similarity[a, b] + similarity[c, d] + 1e-12:
                partner[[a, c, b, d]] = c, a, d, b
                changed = True
    return changed


def green_of_pairs(key: Key[Array, ""], partner: Int[Array, "v"]) -> Bool[Array, "v"]:
    """One green code a pair, by a fair coin each; a code without partner is red.

    Args:
      key: the secret.
      partner: see `pair_codes`.
    """
    code = jnp.arange(partner.shape[0])
    coin = jax.random.bernoulli(key, shape=partner.shape)[jnp.minimum(code, partner)]
    return ((code < partner) == coin) & (code != partner)


def replace_red(
    tokens: Int[Array, "b l"],
    log_p: Float[Array, "b l v"],
    partner: Int[Array, "v"],
    green: Bool[Array, "v"],
    share,
) -> Int[Array, "b l"]:
    """Red tokens become their green partners, where the model is least sure that the partner is worse.

    The confidence ratio of a token is log p(token) - log p(partner); of each row the floor(share l) positions with the lowest
    ratios may change (the authors take the percentile over a whole batch, so that images depend on their neighbours).

    Args:
      tokens: sampled.
      log_p: the laws they were sampled from.
      partner: see `pair_codes`.
      green: see `green_of_pairs`.
      share: in [0, 1], may be traced: 0 changes nothing, 1 leaves no red token that has a partner.

    Raises:
      ValueError: a share out of range.
    """
    if not isinstance(share, jax.core.Tracer) and not 0 <= share <= 1:
        raise ValueError(f"share={share}: must be in [0, 1]")
    other = partner[tokens]
    own, others = (jnp.take_along_axis(log_p, x[..., None], axis=-1)[..., 0] for x in (tokens, other))
    rank = jnp.argsort(jnp.argsort(own - others, axis=-1), axis=-1)
    may = rank < jnp.floor(share * tokens.shape[-1] + 1e-4)
    return jnp.where(may & ~green[tokens] & green[other], other, tokens)


class Crops(NamedTuple):
    """A piece of a picture at every place of the token grid that it may come from.

    Attributes:
      images: the piece on a canvas of the full size, its border pixels repeated around it.
      inside: [o, h w], the tokens, row by row, that the piece covers with a margin around them.
    """

    images: Float[Array, "b o H W C"]
    inside: Bool[Array, "o l"]


def place_crop(piece: Float[Array, "b y x C"], *, size: tuple[int, int], factor: int, margin: int = 1) -> Crops:
    """Where a crop lay on the grid is not known, up to the factor^2 shifts that leave other pixels to a cell: all are tried.

    Which row of cells it came from does not matter to a list that serves all positions.

    Args:
      piece: part of a picture, or all of it.
      size: (H, W) of full pictures.
      factor: pixels along a side of a token's cell.
      margin: cells at the edge of the piece that are not looked at, as their surroundings are missing.

    Raises:
      ValueError: a piece that does not fit, or that is so small that no cell is left.
    """
    b, y, x, channels = piece.shape
    if size[0] % factor or size[1] % factor or y > size[0] or x > size[1]:
        raise ValueError(f"a piece of {y}x{x} on a canvas of {size[0]}x{size[1]} with cells of {factor}: it must fit")
    grid = size[0] // factor, size[1] // factor
    images, inside = [], []
    for top in range(min(factor, size[0] - y + 1)):
        for left in range(min(factor, size[1] - x + 1)):
            edges = ((0, 0), (top, size[0] - y - top), (left, size[1] - x - left), (0, 0))
            images.append(jnp.pad(piece, edges, mode="edge"))
            rows, columns = (
                _covered(start, length, cells, factor, margin) for start, length, cells in ((top, y, grid[0]), (left, x, grid[1]))
            )
            inside.append((rows[:, None] & columns).reshape(-1))
    if not np.stack(inside).any(axis=1).all():
        raise ValueError(f"a piece of {y}x{x} leaves no cell of {factor}x{factor} with a margin of {margin} cells")
    return Crops(jnp.stack(images, axis=1), jnp.asarray(np.stack(inside)))


def _covered(start: int, length: int, cells: int, factor: int, margin: int) -> Bool[np.ndarray, "n"]:
    """Cells that lie in start .. start + length together with their neighbours; all, if the piece is the whole side."""
    first = np.arange(cells) * factor
    whole = (first >= start) & (first + factor <= start + length)
    padded = np.pad(whole, margin, constant_values=whole.all())
    return np.stack([padded[i : i + cells] for i in range(2 * margin + 1)]).all(axis=0)
