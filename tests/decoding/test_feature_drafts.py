"""Feature drafters on a tiny target whose law can be enumerated: exactness, coupled identity, and trees against single paths."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import Out, View, truncate
from jaxgen.decoding.conformance import chi_square, sequence_law
from jaxgen.decoding.feature_drafts import BeamDrafts, BlockDrafts, designed_tree
from jaxgen.decoding.speculate import FULL, STOPPED, Proposal, Sequences, Sequential, prefill, speculate
from jaxgen.decoding.topology import RuntimeTree, Topology, branches
from jaxgen.decoding.verify import Coupled, Rejection, Verdict
from jaxgen.generators.feature_drafter import FeatureDraft, FeatureDrafter, embed_tokens, unit_features
from jaxgen.generators.language import LanguageModel
from jaxgen.generators.sequence_sampler import stepper

pytestmark = pytest.mark.usefixtures("quick_compiles")

V, L, B, STOP = 4, 4, 1024, 2
PROMPT = (1, 3)
TEMPERATURES = (0.7, 1.3)
MODEL = LanguageModel(vocab=V, width=16, heads=2, depth=1)
FALCON = FeatureDrafter(width=16, heads=2, block=2, recurrent=2)
EAGLE = FeatureDrafter(width=16, heads=2)
TREE = Topology((0, 0, 0, 1, 1, 2, 4, 4, 5, 7, 10))  # five levels, three passes of two


@pytest.fixture(scope="module")
def params(randomize):
    tokens, vectors = jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 4, 16))
    shapes = {"generator": jax.eval_shape(MODEL.init, jax.random.key(0), tokens)}
    for name, drafter in (("falcon", FALCON), ("eagle", EAGLE)):
        shapes[name] = jax.eval_shape(drafter.init, jax.random.key(0), vectors, vectors)
    made = {name: randomize(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    made["generator"]["params"]["head"]["kernel"] *= 1.5
    made["generator"]["params"]["embed"]["embedding"] *= 3
    return made


METHODS = {
    "falcon": lambda rule, **options: FeatureDraft(MODEL, FALCON, TREE, rule, name="falcon", **options),
    "one token a pass": lambda rule, **options: FeatureDraft(MODEL, EAGLE, branches((2, 2, 1)), rule, name="eagle", **options),
    "beam": lambda rule, **options: FeatureDraft(MODEL, EAGLE, RuntimeTree(5, 3), rule, beam=2, name="eagle", **options),
}


def sampler(method, params, *, b=B, prompt=PROMPT, change=lambda proposer: proposer):
    """Samples with a method, or plainly if it is None; `traces` counts compilations."""
    prompt = jnp.broadcast_to(jnp.array(prompt, jnp.int32), (b, len(prompt)))
    traces = []

    @jax.jit
    def sample(key, temperature=1.0, prompt=prompt, prompt_length=None, rows=None):
        traces.append(1)
        length = len(PROMPT) + L
        proposer, rule = (Sequential(), Coupled()) if method is None else method(params, prompt, length)
        return speculate(
            stepper(MODEL),
            change(proposer),
            rule,
            params=params["generator"],
            cache=MODEL.init_cache(prompt.shape[0], length + proposer.topology.queries),
            cond=None,
            prompt=prompt,
            prompt_length=prompt_length,
            max_length=length,
            key=key,
            transform=lambda logits, context: truncate(logits, temperature=temperature, top_k=3, top_p=0.95),
            stop=(STOP,),
            rows=rows,
        )

    sample.traces = traces
    return sample


@pytest.fixture(scope="module")
def laws(params):
    def law(temperature):
        return sequence_law(
            jax.jit(stepper(MODEL)),
            params=params["generator"],
            cache=MODEL.init_cache(V**L, L + len(PROMPT)),
            cond=None,
            prompt=list(PROMPT),
            vocab=V,
            length=L,
            transform=lambda logits, context: truncate(logits, temperature=temperature, top_k=3, top_p=0.95),
            stop=(STOP,),
        )

    return {temperature: law(temperature) for temperature in TEMPERATURES}


def counted(sample, temperature, batches=4):
    counts = collections.Counter()
    for i in range(batches):
        result = sample(jax.random.key(i), temperature)
        rows = zip(np.asarray(result.tokens), np.asarray(result.length))
        counts.update(tuple(row[len(PROMPT) : n].tolist()) for row, n in rows)
    return counts, result


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_drafts_keep_the_law(name, params, laws):
    sample = sampler(METHODS[name](Rejection()), params)
    for temperature, law in laws.items():
        counts, result = counted(sample, temperature)
        assert abs(chi_square(counts, law)) < 4
        assert set(np.unique(result.status)) <= {STOPPED, FULL}
    assert len(sample.traces) == 1
    assert int((result.length - len(PROMPT)).sum()) > 1.15 * int(result.row_calls.sum())


class Forgetful:
    """Says that siblings were drawn independently, although they were not: the control that has to fail."""

    def __init__(self, inner):
        self.inner, self.topology = inner, inner.topology
        self.start, self.update = inner.start, inner.update

    def propose(self, state, seq, transform, key):
        proposal, state = self.inner.propose(state, seq, transform, key)
        parents = np.array(self.topology.parents)
        eldest = np.array([np.flatnonzero(parents == parent)[0] for parent in parents])
        return Proposal(proposal.tokens, proposal.log_q[:, eldest]), state


@pytest.fixture(scope="module")
def plain(params):
    return sampler(None, params)


@pytest.mark.slow
def test_the_wrong_law_fails(params, laws, plain):
    counts, _ = counted(sampler(METHODS["falcon"](Rejection()), params, change=Forgetful), 1.3)
    assert chi_square(counts, laws[1.3]) > 10
    counts, _ = counted(plain, 0.7)
    assert abs(chi_square(counts, laws[0.7])) < 4 and chi_square(counts, laws[1.3]) > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["falcon", "beam"])
def test_coupled_drafts_give_the_tokens_of_plain_sampling(name, params, plain):
    options = {} if name == "beam" else {"coupled": True}
    sample = sampler(METHODS[name](Coupled(), **options), params)
    want, got = (s(jax.random.key(5), 1.0) for s in (plain, sample))
    for field in ("tokens", "length", "status"):
        np.testing.assert_array_equal(getattr(got, field), getattr(want, field))
    assert int(got.row_calls.sum()) < 0.9 * int(want.row_calls.sum())


@pytest.mark.slow
def test_ragged_rows_are_what_they_are_alone(params):
    prompt = jnp.array([[1, 3, 0], [1, 1, 1], [3, 0, 0]], jnp.int32)
    lengths, method = jnp.array([3, 2, 1]), METHODS["falcon"](Rejection())
    sample = sampler(method, params)
    result = sample(jax.random.key(1), 1.0, prompt, lengths, jnp.arange(3))
    # With its own prompt of one token there is nothing that the target has said of it.
    alone = sampler(method, params, b=1)(jax.random.key(1), 1.0, prompt[2:, :1], None, jnp.array([2]))
    np.testing.assert_array_equal(alone.tokens[0], result.tokens[2])
    assert int(alone.row_calls[0]) == int(result.row_calls[2])
    # Other rows beside it, in another order.
    order = jnp.array([1, 2, 0])
    got = sample(jax.random.key(1), 1.0, prompt[order], lengths[order], order)
    np.testing.assert_array_equal(got.tokens, result.tokens[order])


def proposals(method, params, tokens, length, rounds=2):
    """What a proposer drafts for known sequences that grow by a few tokens a round, and how long they were."""
    b, s = tokens.shape
    proposer, _ = method(params, tokens, s)
    start, update = jax.jit(proposer.start, static_argnums=2), jax.jit(proposer.update)
    propose = jax.jit(lambda state, seq: proposer.propose(state, seq, lambda logits, context: logits, jax.random.key(2)))
    cache = MODEL.init_cache(b, s + proposer.topology.queries)
    step = jax.jit(stepper(MODEL))
    text, _ = step(params["generator"], cache, _view(tokens), None)
    seq = Sequences(tokens, length, jnp.arange(b))
    _, out = prefill(step, params["generator"], cache, None, tokens[:, :2], length)
    state, found = start(seq, jax.random.key(0), V, out), []
    for taken in (jnp.array([3, 1, 0]), jnp.array([1, 2, 4]))[:rounds]:
        proposal, state = propose(state, seq)
        found.append((seq.length, proposal))
        # A query's features: node i of the path is the i-th token from the root on.
        at = (seq.length - 1)[:, None] + jnp.arange(len(proposer.topology.levels) + 1)
        feats = jnp.take_along_axis(text.feats, jnp.minimum(at, s - 1)[..., None], axis=1)
        verdict = Verdict(jnp.broadcast_to(jnp.arange(at.shape[1]), at.shape), taken, taken)
        seq = seq._replace(length=seq.length + taken)
        state = update(state, seq, verdict, taken, None, Out(None, feats))
    found.append((seq.length, propose(state, seq)[0]))
    return proposer, found, unit_features(text.feats)


def _view(tokens):
    b, q = tokens.shape
    return View(tokens, jnp.broadcast_to(jnp.arange(q), (b, q)), jnp.tril(jnp.ones((q, q), bool)))


@functools.partial(jax.jit, static_argnums=0)
def whole(drafter, variables, target, tokens, behind, shift):
    """(features, log-laws) of all vectors of one row, without a cache."""
    made = drafter.apply(variables, embed_tokens(MODEL, target, tokens[None]), behind[None], shift=shift)
    return made[0], jax.nn.log_softmax(MODEL.apply(target, made, method="logits"))[0]


def guesses(drafter, variables, params, tokens, feats, path):
    """Log-laws of the k tokens after a path of drafts below known tokens, without cache or tree: whole blocks of the path are
    read with the features that the blocks before them guessed. What stands behind the path is never seen."""
    k, room = drafter.block, 16
    known = np.zeros((room, 16), np.float32)
    known[1 : len(tokens)] = feats
    for i in range(len(path) // k + 1):
        end = len(tokens) + i * k
        text = np.zeros(room, np.int32)
        text[:end] = [*tokens, *path][:end]
        made, laws = whole(drafter, variables, params["generator"], text, known, (1 - end) % k)
        known[end : end + k] = made[end - 1 : end - 1 + k]
    return np.asarray(laws[end - 1 : end - 1 + k])


TOKENS = jnp.array([[1, 3, 0, 2, 1, 1, 3, 0, 2, 3], [2, 2, 1, 0, 3, 3, 1, 2, 0, 1], [0, 1, 2, 3, 2, 1, 0, 3, 2, 2]], jnp.int32)


@pytest.mark.slow
def test_a_block_tree_is_its_paths(params):
    """Rows of different lengths, over rounds that accept different numbers: the law recorded for each first sibling."""
    proposer, found, feats = proposals(METHODS["falcon"](Rejection()), params, TOKENS, jnp.array([2, 2, 1]))
    assert isinstance(proposer, BlockDrafts) and proposer._passes == ((0,), (4, 5), (10,))
    for length, proposal in found:
        for row in range(3):
            n = int(length[row])
            nodes = np.concatenate([TOKENS[row, n - 1 : n], proposal.tokens[row]])
            for node, parent in enumerate(TREE.parents, 1):
                if TREE.parents.index(parent) != node - 1:
                    continue
                path = [nodes[i] for i in TREE.paths[parent] if i > 0]
                law = guesses(FALCON, params["falcon"], params, TOKENS[row, :n].tolist(), feats[row, : n - 1], path)
                np.testing.assert_allclose(proposal.log_q[row, node - 1], law[len(path) % 2], atol=1e-4)
        # Younger siblings are drawn from what is left.
        tokens, log_q = np.asarray(proposal.tokens), np.asarray(proposal.log_q)
        for family in ((0, 1, 2), (3, 4), (6, 7)):
            for i, node in enumerate(family):
                assert np.isinf(log_q[:, node][np.arange(3)[:, None], tokens[:, list(family[:i])]]).all()
        np.testing.assert_allclose(np.exp(log_q).sum(-1), 1, atol=1e-5)


def best_paths(params, tokens, feats, *, beam, height, count):
    """The search as a loop over lists."""
    frontier, scored = [((), 0.0)], {}
    for _ in range(height):
        children = {}
        for path, score in frontier:
            law = guesses(EAGLE, params["eagle"], params, tokens, feats, path)[0]
            children |= {(*path, int(x)): score + law[x] for x in np.argsort(-law)[:beam]}
        scored |= children
        frontier = sorted(children.items(), key=lambda item: -item[1])[:beam]
    return {path for path, _ in sorted(scored.items(), key=lambda item: -item[1])[:count]}


@pytest.mark.slow
def test_a_beam_tree_keeps_the_best_paths(params):
    proposer, found, feats = proposals(METHODS["beam"](Rejection()), params, TOKENS, jnp.array([2, 2, 1]))
    assert isinstance(proposer, BeamDrafts)
    for length, proposal in found:
        parents = np.asarray(proposal.parents)
        assert (parents < np.arange(1, 6)).all() and (parents >= 0).all() and proposal.tokens.shape == (3, 5)
        for row in range(3):
            n = int(length[row])
            best = best_paths(params, TOKENS[row, :n].tolist(), feats[row, : n - 1], beam=2, height=3, count=5)
            paths = {0: ()}
            for node, (parent, token) in enumerate(zip(parents[row], np.asarray(proposal.tokens[row])), 1):
                paths[node] = (*paths[parent], int(token))
            assert set(paths.values()) - {()} == best


def test_tokens_that_cannot_be_are_no_drafts(params):
    """With one token left by top-k, a beam's other children are marked."""
    proposer, _ = METHODS["beam"](Rejection())(params, TOKENS, 10)
    seq = Sequences(TOKENS, jnp.ones(3, jnp.int32), jnp.arange(3))

    @jax.jit
    def propose(seq):
        state = proposer.start(seq, jax.random.key(0), V, None)
        return proposer.propose(state, seq, lambda logits, context: truncate(logits, top_k=1), jax.random.key(1))[0]

    proposal = propose(seq)
    np.testing.assert_array_equal(proposal.valid.sum(axis=1), [3, 3, 3])


def test_designed_trees():
    """The example of the paper's code: paths of branch numbers."""
    tree = designed_tree("0 1 2 00 01 10 000 0000")
    assert tree.parents == (0, 0, 0, 1, 1, 2, 4, 7)
    assert len(designed_tree("0 1 2 3 4 5 6 7 8 9 a b").parents) == 12
    for bad in ("", "0 0", "1", "0 10", "0 02", "0 0-"):
        with pytest.raises(ValueError, match="tree="):
            designed_tree(bad)


def test_bad_input(params):
    def build(drafter, topology, beam=2, name="falcon"):
        method = FeatureDraft(MODEL, drafter, topology, beam=beam, name=name)
        return method(params, TOKENS, 10)

    with pytest.raises(ValueError, match="block=2: a beam expands one level"):
        build(FALCON, RuntimeTree(4, 2))
    with pytest.raises(ValueError, match="beam=2 scores 6 nodes down to depth 2; the tree keeps drafts=7"):
        build(EAGLE, RuntimeTree(7, 2), name="eagle")
    with pytest.raises(ValueError, match="beam=5 is larger than the vocabulary, 4"):
        proposer, _ = build(EAGLE, RuntimeTree(7, 2), beam=5, name="eagle")
        proposer.start(Sequences(TOKENS, jnp.ones(3, jnp.int32), jnp.arange(3)), jax.random.key(0), V, None)
    with pytest.raises(ValueError, match="block=0 must be at least 1"):
        FeatureDrafter(width=16, heads=2, block=0).init(jax.random.key(0), jnp.zeros((1, 4, 16)), jnp.zeros((1, 4, 16)))
    proposer, _ = build(EAGLE, RuntimeTree(4, 2), name="eagle")
    with pytest.raises(ValueError, match="the target's step returns no feats"):
        proposer.start(Sequences(TOKENS, jnp.ones(3, jnp.int32), jnp.arange(3)), jax.random.key(0), V, Out(jnp.zeros((3, 2, V))))
