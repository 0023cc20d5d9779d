"""Block-sparse attention in XLA: loops over live blocks with a running softmax. Works on every device."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas.attention.problem import Problem
from kernels_pallas.block_mask import PARTIAL, BlockMask
from kernels_pallas.device import Device

__all__ = ["Blocks", "backward", "dense_backward", "dense_forward", "forward", "refuses", "static_choice"]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Queries and keys of a tile; a mask that fits in one tile is computed without loops."""

    q: int
    k: int


def static_choice(problem: Problem, device: Device) -> Blocks:
    """Tile sizes: the fastest of 64 to 680 on two CPU cores (length 680, 2 x 8 heads); elsewhere, not measured, large enough
    that one product fills the matrix units.
    """
    return Blocks(128, 128) if device.platform == "cpu" else Blocks(512, 512)


def refuses(problem: Problem, device: Device) -> str | None:
    """Never refuses."""
    return None


def forward(q, k, v, *, mask: BlockMask, scale: float, device: Device):
    """o [b, sq, h, d] in the dtype of q and lse float32 [b, sq, h]; dead rows give 0 and -inf.

    Online softmax over the live blocks of each row of blocks (Milakov and Gimelshein 2018; Dao et al. 2022, algorithm 1).
    """
    blocks = static_choice(Problem.of(q, k, mask, scale), device)
    if _one_block(mask, blocks):
        o, lse = dense_forward(q, k, v, mask.traced(), scale)
        return o.astype(q.dtype), lse
    plan, groups = _Plan(mask, blocks, device), k.shape[2]
    k, v = _key_tiles(k, blocks.k), _key_tiles(v, blocks.k)

    def row(args):
        qi, live = args

        def step(t, carry):
            (o, top, total), j = carry, live.index[t]
            s = plan.masked(_scores(qi, _at(k, j), scale), live, t)
            new_top = jnp.maximum(top, s.max(axis=-1))
            # While a row has seen no key, its maximum is -inf; any finite number serves in its place.
            finite = jnp.where(new_top == -jnp.inf, 0.0, new_top)
            p, shrink = jnp.exp(s - finite[..., None]), jnp.exp(top - finite)
            o = o * shrink[..., None] + _product("bgrqk,bgkd->bgrqd", p, _at(v, j))
            return o, new_top, total * shrink + p.sum(axis=-1)

        o = jnp.zeros_like(qi, dtype=jnp.float32)
        none = jnp.full_like(o[..., 0], -jnp.inf)
        o, top, total = jax.lax.fori_loop(0, live.count, step, (o, none, jnp.zeros_like(none)))
        return _normalise(o, top, total)

    o, lse = jax.lax.map(row, (_query_tiles(q, groups, blocks.q), plan.rows))
    return _queries(o, q.shape[1]).astype(q.dtype), _queries(lse[..., None], q.shape[1])[..., 0]


def backward(q, k, v, lse, do, delta, *, mask: BlockMask, scale: float, device: Device):
    """dq, dk, dv in the input dtypes, in one pass over the live blocks that recomputes p = exp(s - lse).

    dv = p^T do, ds = p (do v^T - delta), dq = scale ds k, dk = scale ds^T q (Dao et al. 2022, appendix B.4).
    """
    blocks = static_choice(Problem.of(q, k, mask, scale), device)
    if _one_block(mask, blocks):
        grads = dense_backward(q, k, v, lse, do, delta, mask.traced(), scale)
        return tuple(x.astype(like.dtype) for x, like in zip(grads, (q, k, v)))
    plan, groups, sk = _Plan(mask, blocks, device), k.shape[2], k.shape[1]
    k_tiles, v_tiles = _key_tiles(k, blocks.k), _key_tiles(v, blocks.k)

    def row(sums, args):
        qi, doi, lse_i, delta_i, live = args

        def step(t, carry):
            (dq, dk, dv), j = carry, live.index[t]
            kj, vj = _at(k_tiles, j), _at(v_tiles, j)
            s = plan.masked(_scores(qi, kj, scale), live, t)
            p, ds = _p_and_ds(s, vj, lse_i, doi, delta_i, scale)
            dq += _product("bgrqk,bgkd->bgrqd", ds, kj)
            dk = _add_at(dk, j, _product("bgrqk,bgrqd->bgkd", ds, qi))
            return dq, dk, _add_at(dv, j, _product("bgrqk,bgrqd->bgkd", p, doi))

        dq, *sums = jax.lax.fori_loop(0, live.count, step, (jnp.zeros_like(qi, dtype=jnp.float32), *sums))
        return tuple(sums), dq

    # Rows of zeros, which fill the last tile, add nothing: their p is finite, do and delta are 0.
    rows = [_query_tiles(x, groups, blocks.q) for x in (q, do, lse[..., None], delta[..., None])]
    rows = (rows[0], rows[1], rows[2][..., 0], rows[3][..., 0], plan.rows)
    zeros = tuple(jnp.zeros_like(x, dtype=jnp.float32) for x in (k_tiles, v_tiles))
    (dk, dv), dq = jax.lax.scan(row, zeros, rows)
    return _queries(dq, q.shape[1]).astype(q.dtype), _keys(dk, sk).astype(k.dtype), _keys(dv, sk).astype(v.dtype)


def dense_forward(
    q: Float[Array, "b n h d"], k: Float[Array, "b s g d"], v: Float[Array, "b s g d"], allowed: Bool[Array, "n s"] | None, scale
) -> tuple[Float[Array, "b n h d"], Float[Array, "b n h"]]:
    """o and lse in float32, of one tile that holds all keys; `allowed` None is everybody."""
    qi = _query_tiles(q, k.shape[2], q.shape[1])[0]
    s = _masked(_scores(qi, _heads_first(k), scale), allowed)
    top = s.max(axis=-1)
    p = jnp.exp(s - jnp.where(top == -jnp.inf, 0.0, top)[..., None])
    o = _product("bgrqk,bgkd->bgrqd", p, _heads_first(v))
    o, lse = _normalise(o, top, p.sum(axis=-1))
    return _queries(o[None], q.shape[1]), _queries(lse[None, ..., None], q.shape[1])[..., 0]


def dense_backward(q, k, v, lse, do, delta, allowed: Bool[Array, "n s"] | None, scale):
    """dq, dk and dv in float32 of one tile; `lse` may be that of a softmax over more keys than these."""
    groups, n = k.shape[2], q.shape[1]
    qi, doi, lse_i, delta_i = (_query_tiles(x, groups, n)[0] for x in (q, do, lse[..., None], delta[..., None]))
    k, v = _heads_first(k), _heads_first(v)
    s = _masked(_scores(qi, k, scale), allowed)
    p, ds = _p_and_ds(s, v, lse_i[..., 0], doi, delta_i[..., 0], scale)
    dq = _product("bgrqk,bgkd->bgrqd", ds, k)
    dk, dv = _product("bgrqk,bgrqd->bgkd", ds, qi), _product("bgrqk,bgrqd->bgkd", p, doi)
    return _queries(dq[None], n), dk.transpose(0, 2, 1, 3), dv.transpose(0, 2, 1, 3)


def _one_block(mask: BlockMask, blocks: Blocks) -> bool:
    return mask.shape[0] <= blocks.q and mask.shape[1] <= blocks.k


class _Row(NamedTuple):
    """A row of blocks (or all, with a leading axis): its live blocks, as in `Lists`, and its metadata [m, block_q]."""

    count: Array
    index: Array
    kind: Array
    q_meta: Array


class _Plan:
    """A mask cut into tiles; `rows` is to be scanned over."""

    def __init__(self, mask: BlockMask, blocks: Blocks, device: Device):
        size = (blocks.q, blocks.k)
        q_meta, k_meta = (x.reshape(x.shape[0], -1, n).swapaxes(0, 1) for x, n in zip(mask.padded(size), size))
        self.rows = _Row(*(jnp.asarray(x) for x in (*mask.rows(size), q_meta[:, :-1])))
        self._pred, self._k_meta, self._branch = mask.pred, jnp.asarray(k_meta), device.platform == "cpu"

    def masked(self, s: Float[Array, "b g r n s"], row: _Row, t: Array) -> Float[Array, "b g r n s"]:
        """Scores of the t-th live block of a row: -inf where the mask forbids, and at padding."""

        def where(s, k_meta):
            return jnp.where(self._pred(row.q_meta[:, :, None], k_meta[:-1, None, :]) & (k_meta[-1] == 1), s, -jnp.inf)

        k_meta = _at(self._k_meta, row.index[t])
        if not self._branch:
            return where(s, k_meta)
        # XLA's CPU compiler would evaluate the predicate once a head, in a loop that it cannot vectorise; a branch keeps it
        # apart (2.5 times faster in all). On an accelerator the fusion is free and a branch waits for the host.
        return jax.lax.cond(row.kind[t] == PARTIAL, where, lambda s, _: s, s, k_meta)


def _heads_first(x: Float[Array, "b s g d"]) -> Float[Array, "b g s d"]:
    return x.transpose(0, 2, 1, 3)


def _query_tiles(x: Float[Array, "b q h d"], groups: int, size: int) -> Float[Array, "n b g r size d"]:
    """Tiles of `size` queries, the last filled with zeros; head g * r + i is head i of group g."""
    b, _, h, d = x.shape
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)))
    return x.reshape(b, -1, size, groups, h // groups, d).transpose(1, 0, 3, 4, 2, 5)


def _queries(tiles: Float[Array, "n b g r size d"], length: int) -> Float[Array, "b q h d"]:
    """The inverse of `_query_tiles`."""
    n, b, g, r, size, d = tiles.shape
    return tiles.transpose(1, 0, 4, 2, 3, 5).reshape(b, n * size, g * r, d)[:, :length]


def _key_tiles(x: Float[Array, "b s g d"], size: int) -> Float[Array, "n b g size d"]:
    b, _, g, d = x.shape
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)))
    return x.reshape(b, -1, size, g, d).transpose(1, 0, 3, 2, 4)


def _keys(tiles: Float[Array, "n b g size d"], length: int) -> Float[Array, "b s g d"]:
    """The inverse of `_key_tiles`."""
    n, b, g, size, d = tiles.shape
    return tiles.transpose(1, 0, 3, 2, 4).reshape(b, n * size, g, d)[:, :length]


def _at(tiles: Array, j: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(tiles, j, keepdims=False)


def _add_at(tiles: Array, j: Array, x: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(tiles, _at(tiles, j) + x, j, 0)


def _product(dims: str, a: Array, b: Array) -> Array:
    """Products in the dtype of `b`, summed in float32."""
    return jnp.einsum(dims, a.astype(b.dtype), b, preferred_element_type=jnp.float32)


def _scores(q: Float[Array, "b g r n d"], k: Float[Array, "b g s d"], scale: float) -> Float[Array, "b g r n s"]:
    return _product("bgrqd,bgkd->bgrqk", q, k) * scale


def _masked(s: Array, allowed: Bool[Array, "n s"] | None) -> Array:
    return s if allowed is None else jnp.where(allowed, s, -jnp.inf)


def _normalise(o: Array, top: Array, total: Array) -> tuple[Array, Array]:
    """Output and log-sum-exp from a running softmax; 0 and -inf where there was no key."""
    dead = total == 0
    total = jnp.where(dead, 1.0, total)
    return o / total[..., None], jnp.where(dead, -jnp.inf, top + jnp.log(total))


def _p_and_ds(s, v, lse, do, delta, scale):
    """p = exp(s - lse) and ds of a tile, with `scale` in ds; a dead row has p = 0."""
    p = jnp.exp(s - jnp.where(lse == -jnp.inf, 0.0, lse)[..., None])
    return p, p * (_product("bgrqd,bgkd->bgrqk", do, v) - delta[..., None]) * scale
