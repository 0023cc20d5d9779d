"""Speculative sampling: a proposer drafts, the target checks all drafts in one call, a rule says what stays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgen.decoding.cache import KVCache
from jaxgen.decoding.noise import Noise, gumbel
from jaxgen.decoding.step import Out, StepFn, View
from jaxgen.decoding.topology import RuntimeTree, Topology
from jaxgen.decoding.verify import Rule, Verdict, verify

__all__ = [
    "BROKEN",
    "FULL",
    "Loop",
    "RUNNING",
    "STOPPED",
    "Context",
    "Proposal",
    "Proposer",
    "Result",
    "Sequential",
    "Sequences",
    "Transform",
    "advance",
    "paths_of",
    "prefill",
    "speculate",
    "vocabulary",
]

# Status of a row: still going; met a stop token; reached its length; the model's logits were not numbers.
RUNNING, STOPPED, FULL, BROKEN = 0, 1, 2, 3

PyTree = Any


class Sequences(NamedTuple):
    """The tokens so far.

    Attributes:
      tokens: prompt and generated tokens; what lies behind `length` means nothing.
      length: tokens that are certain.
      rows: number of each request, which its noise depends on.
    """

    tokens: Int[Array, "b s"]
    length: Int[Array, "b"]
    rows: Int[Array, "b"]


class Context(NamedTuple):
    """What a transform of logits may look at.

    Attributes:
      seq: the tokens so far.
      path: for each query, the tokens on its way from the root, the root first; -1 fills the rest.
      pos: the position that each query's law is about.
    """

    seq: Sequences
    path: Int[Array, "b q d"]
    pos: Int[Array, "b q"]


Transform = Callable[[Float[Array, "b q v"], Context], Float[Array, "b q v"]]


class Proposal(NamedTuple):
    """Drafted tokens.

    Attributes:
      tokens: one a node of the topology, the root left out.
      log_q: the law that each was drawn from, given the siblings before it; None if they were chosen, not drawn.
      valid: which of them exist; None is all.
      parents: of each draft (0 is the root, drafts count from 1), if the proposer's topology is a `RuntimeTree`.
    """

    tokens: Int[Array, "b n"]
    log_q: Float[Array, "b n v"] | None = None
    valid: Bool[Array, "b n"] | None = None
    parents: Int[Array, "b n"] | None = None


class Proposer(Protocol):
    """Drafts tokens. Its state is a pytree that the loop carries.

    Attributes:
      topology: of its drafts.
    """

    topology: Topology | RuntimeTree

    def start(self, seq: Sequences, key: Key[Array, ""], vocab: int, out: Out | None) -> PyTree:
        """The state after the prompt; `out` is what the target said of all its tokens but the last, None if that is not known."""

    def propose(self, state: PyTree, seq: Sequences, transform: Transform, key: Key[Array, ""]) -> tuple[Proposal, PyTree]:
        """Drafts what may follow."""

    def update(self, state: PyTree, seq: Sequences, verdict: Verdict, taken: Int[Array, "b"], log_p, out: Out) -> PyTree:
        """The state after the target has spoken.

        `seq` has the new tokens, `taken` of them a row: 0 where a row has stopped; `verdict.path` are the nodes they come
        from. `log_p` are the laws after all nodes, `out` is what the target said of all positions of the query.
        """


@dataclasses.dataclass(frozen=True)
class Sequential:
    """No drafts: plain sampling, one target call a token."""

    topology = Topology()

    def start(self, seq, key, vocab, out):
        return ()

    def propose(self, state, seq, transform, key):
        return Proposal(jnp.zeros((seq.tokens.shape[0], 0), jnp.int32)), state

    def update(self, state, seq, verdict, taken, log_p, out):
        return state


class Result(NamedTuple):
    """What was sampled.

    Attributes:
      tokens: prompt and generated tokens, then `pad`.
      length: of each row, a stop token included.
      status: STOPPED, FULL or BROKEN.
      calls: target calls of the whole batch, the prompt's not counted.
      row_calls: target calls while the row was running.
    """

    tokens: Int[Array, "b s"]
    length: Int[Array, "b"]
    status: Int[Array, "b"]
    calls: Int[Array, ""]
    row_calls: Int[Array, "b"]


class Loop(NamedTuple):
    """What a round of speculative sampling changes.

    Attributes:
      seq: the tokens so far.
      status: RUNNING, or how the row ended.
      cache: of the target.
      state: of the proposer.
      calls, row_calls: see `Result`.
    """

    seq: Sequences
    status: Int[Array, "b"]
    cache: PyTree
    state: PyTree
    calls: Int[Array, ""]
    row_calls: Int[Array, "b"]


def speculate(
    step: StepFn,
    proposer: Proposer,
    rule: Rule,
    *,
    params: PyTree,
    cache: PyTree,
    cond: PyTree,
    prompt: Int[Array, "b p"],
    prompt_length: Int[Array, "b"] | None = None,
    max_length: int,
    limit: Int[Array, "b"] | None = None,
    key: Key[Array, ""],
    transform: Transform = lambda logits, context: logits.astype(jnp.float32),
    stop: tuple[int, ...] | Int[Array, "*b n"] = (),
    rows: Int[Array, "b"] | None = None,
    noise: Noise = gumbel,
    pad: int = 0,
) -> Result:
    """Samples until every row has stopped.

    Position j of a sequence is what `step` reads at `view.pos` = j to give the law of position j + 1. A model that starts from
    a condition instead of a token reads a start token there, whatever it is.

    Call it inside `jax.jit`; all but `step`, `proposer`, `rule`, `max_length`, `transform` and `pad` may be traced.

    Args:
      step: the target.
      proposer: drafts; `Sequential()` for plain sampling.
      rule: which drafts stay. With `Coupled` the tokens are those of plain sampling with the same key.
      params: passed to `step`.
      cache: empty, with room for `max_length` + `topology.queries` - 1 positions.
      cond: passed to `step`.
      prompt: at least one token a row, left-aligned.
      prompt_length: of each row; None is p for all.
      max_length: s, the longest sequence, prompt included.
      limit: the longest of each row; None is `max_length` for all.
      key: of the call; the noise of a row depends on it, on the row's number and on the position only.
      transform: logits to the logits that are sampled from, such as temperature and top-p.
      stop: tokens that end a row; or an array of them, the same for all rows or a list a row, where -1 is none.
      rows: the number of each request; None is 0..b-1.
      noise: that the target's tokens come from, see `jaxgen.decoding.noise.Noise`.
      pad: fills what lies behind a row's end.

    Raises:
      ValueError: a prompt without tokens or longer than `max_length`, a cache without room for the drafts, a step that
        advances its own cache, or drafts from laws over another vocabulary than the target's.
    """
    b, p = prompt.shape
    topology = proposer.topology
    if p < 1 or p > max_length:
        raise ValueError(f"prompt {prompt.shape}: expected 1 to max_length={max_length} tokens")
    need, room = max_length + topology.queries - 1, getattr(cache, "capacity", None)
    if room is not None and room < need:
        raise ValueError(
            f"the cache holds {room} positions; max_length={max_length} and queries of {topology.queries} need {need}"
        )
    width = len(topology.levels) + 1
    length = jnp.full((b,), p, jnp.int32) if prompt_length is None else jnp.asarray(prompt_length, jnp.int32)
    limit = jnp.full((b,), max_length, jnp.int32) if limit is None else jnp.minimum(limit, max_length)
    rows = jnp.arange(b) if rows is None else rows
    # Room for a whole round behind the end, so that writes never need a bound.
    buffer = jnp.zeros((b, max_length + width), jnp.int32).at[:, :p].set(prompt)
    seq = Sequences(buffer, length, rows)
    cache, out = prefill(step, params, cache, cond, prompt, length)
    vocab = vocabulary(step, params, cache, cond, b)
    stops = jnp.asarray(stop, jnp.int32)

    def round_(loop: Loop) -> Loop:
        options = dict(params=params, cond=cond, limit=limit, key=key, transform=transform, stop=stops, noise=noise)
        return advance(step, proposer, rule, loop, **options)

    first = Loop(
        seq,
        jnp.where(length >= limit, FULL, RUNNING),
        cache,
        proposer.start(seq, key, vocab, out),
        jnp.int32(0),
        jnp.zeros((b,), jnp.int32),
    )
    done = jax.lax.while_loop(lambda loop: (loop.status == RUNNING).any(), round_, first)
    inside = jnp.arange(max_length) < done.seq.length[:, None]
    tokens = jnp.where(inside, done.seq.tokens[:, :max_length], pad)
    return Result(tokens, done.seq.length, done.status, done.calls, done.row_calls)


def advance(
    step: StepFn,
    proposer: Proposer,
    rule: Rule,
    loop: Loop,
    *,
    params: PyTree,
    cond: PyTree,
    limit: Int[Array, "b"],
    key: Key[Array, "*b"],
    transform: Transform,
    stop: Int[Array, "*b n"],
    noise: Noise = gumbel,
) -> Loop:
    """One round: the proposer drafts, the target checks, and each running row grows by what stays.

    Arguments are those of `speculate`, besides:
      key: one for all rows, or one a row.
      stop: tokens that end a row, the same for all or a list a row; -1 is none.
    """
    seq, topology, b = loop.seq, proposer.topology, loop.seq.tokens.shape[0]
    proposal, state = proposer.propose(loop.state, seq, transform, key)
    root = jnp.take_along_axis(seq.tokens, seq.length[:, None] - 1, axis=1)
    nodes, shape = jnp.concatenate([root, proposal.tokens], axis=1), topology.shape(proposal.parents, b)
    probes = jnp.tile(jnp.array(topology.probes, jnp.int32), (b, topology.drafts + 1))
    count, at = nodes.shape[1], seq.length[:, None] - 1 + shape.depth
    out, cache = step(params, loop.cache, View(jnp.concatenate([nodes, probes], axis=1), at, shape.mask), cond)
    _check_vocabulary(proposal, out.params.shape[-1])
    logits = transform(out.params[:, :count], Context(seq, paths_of(nodes, shape.paths), at[:, :count] + 1))
    log_p = jax.nn.log_softmax(logits, axis=-1)
    verdict = verify(
        rule,
        topology,
        log_p,
        proposal.tokens,
        proposal.log_q,
        proposal.valid,
        parents=shape.parents,
        key=key,
        rows=seq.rows,
        pos=seq.length,
        noise=noise,
    )
    running = loop.status == RUNNING
    new = _emitted(nodes, verdict)
    # Laws that are not numbers matter on the path that was taken only, where what comes before them stays.
    place = jnp.arange(new.shape[1])
    wrong = jnp.take_along_axis(jnp.isnan(log_p).any(axis=-1), verdict.path, axis=1) & (place <= verdict.accepted[:, None])
    broken = wrong.any(axis=1)
    count = jnp.where(broken, jnp.argmax(wrong, axis=1), verdict.accepted + 1)
    taken, ends = _cut(new, count, limit - seq.length, stop)
    taken = jnp.where(running, taken, 0)
    status = jnp.where(broken, BROKEN, RUNNING)
    status = jnp.where(seq.length + taken >= limit, FULL, status)
    status = jnp.where(running, jnp.where(ends, STOPPED, status), loop.status)
    at = seq.length[:, None] + place
    tokens = seq.tokens.at[jnp.arange(b)[:, None], at].set(new)
    seq = Sequences(tokens, seq.length + taken, seq.rows)
    cache = cache.commit(taken) if topology.is_chain else cache.commit(taken, verdict.path)
    state = proposer.update(state, seq, verdict, taken, log_p, out)
    return Loop(seq, status, cache, state, loop.calls + 1, loop.row_calls + running)


def prefill(
    step: StepFn,
    params: PyTree,
    cache: PyTree,
    cond: PyTree,
    prompt: Int[Array, "b p"],
    length: Int[Array, "b"],
    *,
    chunk: int = 0,
):
    """(cache, out) after all but the last token of each prompt, the first round's root; out is None if there is no other.

    With `chunk`, as many tokens are read at once, and out is None if that is not all at once.
    """
    q = prompt.shape[1] - 1
    cache = cache.commit(jnp.zeros(length.shape, jnp.int32))  # a length a row from here on
    if not q:
        return cache, None
    if chunk and q > chunk:
        return _prefill_in_chunks(step, params, cache, cond, prompt[:, :q], length - 1, chunk), None
    view = View(prompt[:, :q], jnp.broadcast_to(jnp.arange(q), (prompt.shape[0], q)), jnp.tril(jnp.ones((q, q), bool)))
    out, cache = step(params, cache, view, cond)
    return cache.commit(length - 1), out


def _prefill_in_chunks(step, params, cache, cond, tokens, length, chunk: int):
    b, q = tokens.shape
    tokens = jnp.pad(tokens, ((0, 0), (0, -q % chunk)))
    mask = jnp.tril(jnp.ones((chunk, chunk), bool))

    def read(carry):
        start, cache = carry
        block = jax.lax.dynamic_slice_in_dim(tokens, start, chunk, axis=1)
        view = View(block, jnp.broadcast_to(start + jnp.arange(chunk), (b, chunk)), mask)
        _, cache = step(params, cache, view, cond)
        return start + chunk, cache.commit(jnp.clip(length - start, 0, chunk))

    # As many chunks as the longest prompt has, however many would fit.
    return jax.lax.while_loop(lambda carry: carry[0] < length.max(), read, (jnp.int32(0), cache))[1]


def vocabulary(step: StepFn, params: PyTree, cache: PyTree, cond: PyTree, b: int) -> int:
    """v, the tokens that the step's laws are over.

    Raises:
      ValueError: a step that advances its `KVCache`; what is kept is for the sampler to decide.
    """
    view = View(jnp.zeros((b, 1), jnp.int32), jnp.zeros((b, 1), jnp.int32), jnp.ones((1, 1), bool))
    # A length that is known while tracing shows whether the step moves it.
    still = dataclasses.replace(cache, length=0) if isinstance(cache, KVCache) else cache
    out, after = jax.eval_shape(lambda: step(params, still, view, cond))
    if isinstance(after, KVCache) and not (isinstance(after.length, int) and after.length == 0):
        raise ValueError(f"the step advances its own cache, from length 0 to {after.length}: a step stages, the sampler commits")
    return out.params.shape[-1]


def _check_vocabulary(proposal: Proposal, vocab: int) -> None:
    if proposal.log_q is not None and proposal.log_q.shape[-1] != vocab:
        raise ValueError(f"drafts come from laws over {proposal.log_q.shape[-1]} tokens; the target has {vocab}")


def paths_of(nodes: Int[Array, "b n"], paths: Int[Array, "*b m d"]) -> Int[Array, "b m d"]:
    """The tokens of `nodes` on the way to each of some nodes, -1 where `paths` (rows of `Shape.paths`) has ended."""
    paths = jnp.broadcast_to(jnp.asarray(paths), (nodes.shape[0], *paths.shape[-2:]))
    tokens = jnp.take_along_axis(nodes[:, None], jnp.maximum(paths, 0), axis=2)
    return jnp.where(paths >= 0, tokens, -1)


def _emitted(nodes: Int[Array, "b m"], verdict: Verdict) -> Int[Array, "b d"]:
    """The accepted drafts, then the emitted token; what follows means nothing."""
    accepted = jnp.take_along_axis(nodes, verdict.path, axis=1)[:, 1:]
    accepted = jnp.pad(accepted, ((0, 0), (0, 1)))
    place = jnp.arange(accepted.shape[1])
    return jnp.where(place == verdict.accepted[:, None], verdict.token[:, None], accepted)


def _cut(new: Int[Array, "b d"], count: Int[Array, "b"], room: Int[Array, "b"], stop: Int[Array, "*b n"]):
    """(how many of the new tokens count, whether they end with a stop token)."""
    place = jnp.arange(new.shape[1])
    count = jnp.minimum(count, room)
    stops = (new[..., None] == stop[..., None, :]).any(axis=-1) & (place < count[:, None])
    first = jnp.argmax(stops, axis=1)
    return jnp.where(stops.any(axis=1), first + 1, count), stops.any(axis=1)
