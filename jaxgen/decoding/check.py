"""Whether a step function keeps the contract of `jaxgen.decoding.step`, said in plain words before any sampler runs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxgen.decoding.step import StepFn, View
from jaxgen.decoding.topology import Topology

__all__ = ["check_step"]

# A tree with a path that is not the first one, so that a wrong gather shows.
_TREE = Topology((0, 0, 1, 2, 2))
_PATH = (0, 2, 5)


def check_step(
    step: StepFn,
    *,
    params: Any,
    cache: Any,
    cond: Any,
    batch: int,
    vocab: int,
    length: int = 7,
    tolerance: float = 1e-3,
    trees: bool = True,
    seed: int = 0,
) -> None:
    """Tries a step function on random tokens and raises an error that lists all that is wrong with it.

    Args:
      step: see `jaxgen.decoding.step`.
      params: passed to `step`.
      cache: empty, `batch` rows, room for `length` + 6 positions.
      cond: passed to `step`.
      batch: b; at least 2, so that rows can be told apart.
      vocab: v, token ids to draw from.
      length: tokens to try; at least 3.
      tolerance: of log-probabilities, absolute.
      trees: whether tree queries are to work; models that only serve chains may leave them out.
      seed: of the tokens.

    Raises:
      ValueError: the list of what is wrong.

    Example:
      >>> check_step(my_step, params=params, cache=empty_cache(2), cond=None, batch=2, vocab=50)    # doctest: +SKIP
    """
    if batch < 2 or length < 3:
        raise ValueError(f"batch={batch} must be at least 2 and length={length} at least 3")
    trial = _Trial(step, params, cache.commit(jnp.zeros((batch,), jnp.int32)), cond, batch, vocab, tolerance)
    tokens = jnp.asarray(np.random.default_rng(seed).integers(0, vocab, (batch, length + 6)), jnp.int32)
    problems = trial.shapes(tokens[:, :length])
    if not problems:
        checks = [trial.causal, trial.incremental, trial.staging, trial.rows, *([trial.tree, trial.path] if trees else [])]
        problems = [problem for check in checks for problem in check(tokens, length)]
    if problems:
        raise ValueError("this step function breaks the contract of jaxgen.decoding.step:\n- " + "\n- ".join(problems))


class _Trial:
    """One step function with the pieces that every check needs."""

    def __init__(self, step, params, cache, cond, batch, vocab, tolerance):
        self.cache, self.batch, self.vocab, self.tolerance = cache, batch, vocab, tolerance
        jitted = jax.jit(lambda params, cache, view, cond: step(params, cache, view, cond))
        self.call = lambda cache, view: jitted(params, cache, view, cond)

    def read(self, cache, tokens: Int[Array, "b q"], start: int, mask=None, pos=None):
        """(log-laws [b, q, v], cache) after reading `tokens` at positions from `start`."""
        q = tokens.shape[1]
        pos = start + (jnp.arange(q) if pos is None else jnp.asarray(pos))
        mask = jnp.tril(jnp.ones((q, q), bool)) if mask is None else jnp.asarray(mask)
        out, cache = self.call(cache, View(tokens, jnp.broadcast_to(pos, (self.batch, q)), mask))
        return np.asarray(jax.nn.log_softmax(out.params.astype(jnp.float32), axis=-1)), cache

    def differ(self, a, b) -> bool:
        return not np.allclose(a, b, rtol=0, atol=self.tolerance)

    def shapes(self, tokens) -> list[str]:
        q = tokens.shape[1]
        view = View(tokens, jnp.broadcast_to(jnp.arange(q), tokens.shape), jnp.tril(jnp.ones((q, q), bool)))
        out, cache = self.call(self.cache, view)
        got, want = getattr(out.params, "shape", None), (self.batch, q, self.vocab)
        if got != want:
            return [f"it returns params of shape {got} for {q} tokens in {self.batch} rows; expected {want}"]
        problems = []
        if not np.isfinite(np.asarray(out.params)).all():
            problems.append("it returns logits that are not finite numbers")
        if jax.tree.structure(cache) != jax.tree.structure(self.cache):
            problems.append("it returns a cache of another structure than the one it was given")
        before, after = (getattr(c, "length", None) for c in (self.cache, cache))
        if before is not None and not np.array_equal(before, after):
            problems.append(f"it advances its own cache (length {before} -> {after}); the sampler commits what it keeps")
        return problems

    def causal(self, tokens, n) -> list[str]:
        first, _ = self.read(self.cache, tokens[:, :n], 0)
        other, _ = self.read(self.cache, tokens[:, :n].at[:, -1].add(1) % self.vocab, 0)
        if self.differ(first[:, :-1], other[:, :-1]):
            return ["a token changes the laws before it: view.mask is not obeyed, or the input is shifted"]
        return []

    def incremental(self, tokens, n) -> list[str]:
        full, _ = self.read(self.cache, tokens[:, :n], 0)
        cache, laws = self.cache, []
        for i in range(n):
            law, cache = self.read(cache, tokens[:, i : i + 1], i)
            cache = cache.commit(jnp.ones((self.batch,), jnp.int32))
            laws.append(law[:, 0])
        if self.differ(full, np.stack(laws, axis=1)):
            return ["reading tokens one at a time with the cache gives other laws than reading them at once"]
        return []

    def staging(self, tokens, n) -> list[str]:
        want, _ = self.read(self.cache, tokens[:, :n], 0)
        _, cache = self.read(self.cache, tokens[:, :2], 0)
        cache = cache.commit(jnp.full((self.batch,), 2, jnp.int32))
        _, dirty = self.read(cache, (tokens[:, 2:5] + 1) % self.vocab, 2)
        got, _ = self.read(dirty, tokens[:, 2:n], 2)
        if self.differ(want[:, 2:], got):
            return ["tokens that were staged but not committed are still seen by the next call"]
        return []

    def rows(self, tokens, n) -> list[str]:
        want, _ = self.read(self.cache, tokens[:, :n], 0)
        got, _ = self.read(self.cache, tokens[:, :n].at[1:].add(1) % self.vocab, 0)
        if self.differ(want[0], got[0]):
            return ["a row's law depends on the tokens of other rows"]
        ragged = jnp.arange(self.batch, dtype=jnp.int32) % 2 + 1  # rows that have committed 1 and 2 tokens
        _, cache = self.read(self.cache, tokens[:, :2], 0)
        cache = cache.commit(ragged)
        at = ragged[:, None] + jnp.arange(2)
        mask = jnp.tril(jnp.ones((2, 2), bool))
        out, _ = self.call(cache, View(jnp.take_along_axis(tokens, at, axis=1), at, mask))
        got = np.asarray(jax.nn.log_softmax(out.params.astype(jnp.float32), axis=-1))
        if self.differ(np.take_along_axis(want, np.asarray(at)[..., None], axis=1), got):
            return ["rows that have committed different numbers of tokens get wrong laws"]
        return []

    def tree(self, tokens, n) -> list[str]:
        _, cache = self.read(self.cache, tokens[:, :2], 0)
        cache = cache.commit(jnp.full((self.batch,), 2, jnp.int32))
        nodes = tokens[:, n : n + 6]
        got, _ = self.read(cache, nodes, 2, _TREE.ancestors, _TREE.depth)
        for node, path in enumerate(_TREE.paths):
            path = path[path >= 0]
            want, _ = self.read(cache, nodes[:, path], 2)
            if self.differ(want[:, -1], got[:, node]):
                return ["a node of a tree has another law than its path alone: view.mask or view.pos is not obeyed"]
        return []

    def path(self, tokens, n) -> list[str]:
        nodes = tokens[:, n : n + 6]
        _, cache = self.read(self.cache, nodes, 0, _TREE.ancestors, _TREE.depth)
        path = jnp.broadcast_to(jnp.array(_PATH), (self.batch, len(_PATH)))
        cache = cache.commit(jnp.full((self.batch,), len(_PATH), jnp.int32), path)
        got, _ = self.read(cache, tokens[:, :1], len(_PATH))
        want, _ = self.read(self.cache, jnp.concatenate([nodes[:, list(_PATH)], tokens[:, :1]], axis=1), 0)
        if self.differ(want[:, -1:], got):
            return ["after cache.commit(n, path) of a tree's path, laws differ from reading that path in order"]
        return []
