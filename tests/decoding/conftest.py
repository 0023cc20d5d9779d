"""A tiny model without any structure: an own random law for every prefix, as a step function with cache, staging and rollback."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxgen.decoding import Out


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefixCache:
    """The prefix as a number, and the numbers of staged nodes."""

    code: jax.Array
    staged: jax.Array

    def commit(self, n, path=None):
        b = self.code.shape[0]
        n = jnp.broadcast_to(n, (b,))
        if self.staged.shape[1] == 0:
            return self
        last = jnp.maximum(n - 1, 0)
        node = last if path is None else jnp.take_along_axis(path, last[:, None], axis=1)[:, 0]
        code = jnp.take_along_axis(self.staged, node[:, None], axis=1)[:, 0]
        return PrefixCache(jnp.where(n > 0, code, self.code), self.staged[:, :0])

    def restore(self, saved):
        return PrefixCache(saved.code, saved.staged[:, :0])

    def take(self, rows):
        return PrefixCache(self.code[rows], self.staged[rows])


@dataclasses.dataclass(frozen=True)
class TableModel:
    vocab: int = 4
    spread: float = 1.0
    size: int = 4099

    def params(self, seed):
        return self.spread * jax.random.normal(jax.random.key(seed), (self.size, self.vocab))

    def cache(self, b):
        return PrefixCache(jnp.ones((b,), jnp.int32), jnp.zeros((b, 0), jnp.int32))

    def step(self, table, cache, view, cond):
        """The law after a node depends on all tokens before it, in order."""
        b, q = view.tokens.shape
        seen = jnp.broadcast_to(jnp.ones((q, q), bool) if view.mask is None else view.mask, (b, q, q))
        depth = seen.sum(-1)
        base = jnp.int32(self.vocab + 1)
        weight = jnp.where(seen, base ** (depth[:, :, None] - depth[:, None, :]), 0)
        code = cache.code[:, None] * base**depth + (weight * (view.tokens + 1)[:, None, :]).sum(-1)
        return Out(table[code % self.size]), PrefixCache(cache.code, code)


@pytest.fixture(scope="session")
def table_model():
    return TableModel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FieldCache:
    """What is kept as a number, and that number after each staged position more."""

    code: jax.Array
    staged: jax.Array

    def commit(self, n, path=None):
        n = jnp.broadcast_to(n, self.code.shape)
        added = jnp.take_along_axis(self.staged, n[:, None], axis=1)[:, 0]
        return FieldCache(self.code + added, jnp.zeros((len(n), 1), jnp.int32))


@dataclasses.dataclass(frozen=True)
class MaskedTable:
    """A model without structure for `refine`: an own random law at each place for every pattern of tokens and masks.

    The id `vocab` is the mask; places that the model does not see count as another digit. `cond` shifts the table.
    """

    vocab: int = 3
    length: int = 4
    spread: float = 1.0

    @property
    def base(self):
        return self.vocab + 2

    def params(self, seed):
        return self.spread * jax.random.normal(jax.random.key(seed), (self.base**self.length * self.length, self.vocab))

    def cache(self, b):
        return FieldCache(jnp.zeros((b,), jnp.int32), jnp.zeros((b, 1), jnp.int32))

    def step(self, table, cache, view, cond):
        b, q = view.tokens.shape
        pos = jnp.broadcast_to(view.pos, (b, q))
        seen = jnp.broadcast_to(jnp.ones((q, q), bool) if view.mask is None else view.mask, (b, q, q))
        digits = (view.tokens + 1) * jnp.int32(self.base) ** pos
        code = jnp.where(seen, digits[:, None], 0).sum(-1)
        if isinstance(cache, FieldCache):
            staged = jnp.cumsum(jnp.pad(digits, ((0, 0), (1, 0))), axis=1)
            code, cache = code + cache.code[:, None], FieldCache(cache.code, staged)
        shift = 0 if cond is None else 977 * cond[:, None]
        return Out(table[(code * self.length + pos + shift) % len(table)]), cache


@pytest.fixture(scope="session")
def masked_table():
    return MaskedTable
