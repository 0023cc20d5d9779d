"""The compiled part of continuous batching: whatever else is in the slots, a request gets the tokens that it gets alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding.batcher import FREE, Batcher
from jaxgen.decoding.cache import KVCache
from jaxgen.decoding.grammar import constrain
from jaxgen.decoding.jacobi import Jacobi
from jaxgen.decoding.proposers import NGram
from jaxgen.decoding.speculate import FULL, RUNNING, STOPPED, Sequential, speculate
from jaxgen.decoding.step import Out
from jaxgen.decoding.transforms import Sampling, apply_sampling
from jaxgen.decoding.verify import Rejection

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

V, S = 6, 14
PROMPTS = [[1], [3, 0, 2], [5, 4, 3, 2, 1, 0, 1], [2, 2], [0, 1, 0, 1, 0, 1, 0, 1, 0], [4, 4, 4, 4]]
OPTIONS = [
    {"settings": Sampling(temperature=0.7)},
    {"settings": Sampling(top_k=2), "stop": (3, 5)},
    {"settings": Sampling(top_p=0.8, repetition=1.5), "max_new": 3},
    {"settings": Sampling(temperature=1.5, min_p=0.2), "stop": (0,)},
    {"settings": Sampling(presence=0.5, frequency=0.3)},
    {"row": 7},
]


@pytest.fixture(scope="module")
def world(table_model):
    model = table_model(vocab=V)
    params = model.params(0)
    traces = []

    def step(params, cache, view, cond):
        """Adds the request's own bias, if it has one."""
        traces.append(view.tokens.shape)
        out, cache = model.step(params, cache, view, None)
        return (out if cond is None else Out(out.params + cond[:, None])), cache

    def batcher(**options):
        return Batcher(**{"step": step, "max_length": S, "chunk": 3, "stops": 2} | options)

    def alone(batcher, request):
        """The request by itself, from `speculate`."""

        @jax.jit
        def sample(request):
            settings = jax.tree.map(lambda x: x[None], request.settings)
            return speculate(
                step,
                batcher.proposer,
                batcher.rule,
                params=params,
                cache=model.cache(1),
                cond=jax.tree.map(lambda x: x[None], request.cond),
                prompt=request.prompt[None],
                prompt_length=request.length[None],
                max_length=S,
                limit=request.limit[None],
                key=request.key,
                rows=request.row[None],
                transform=lambda logits, context: batcher.transform(logits, context, settings),
                stop=request.stop,
            )

        compiled = world.compiled.setdefault(batcher, sample)
        result = compiled(request)
        n = int(result.length[0])
        return result.tokens[0, :n].tolist(), int(result.status[0]), int(result.row_calls[0])

    world = type("World", (), {})()
    world.model, world.params, world.traces, world.compiled = model, params, traces, {}
    world.batcher, world.alone, world.step = batcher, alone, step
    world.plain = batcher()
    world.requests = requests(world.plain)
    return world


def requests(batcher, **more):
    return [
        batcher.request(prompt, key=jax.random.key(i), **options | {name: value(i) for name, value in more.items()})
        for i, (prompt, options) in enumerate(zip(PROMPTS, OPTIONS))
    ]


def go(world, batcher, requests, *, slots, cond=None, steps=2, order=None):
    """All requests through `slots` slots, each freed slot filled at once; what came out of each, and how many runs it took."""
    state = batcher.start(world.params, world.model.cache(slots), cond)
    assert (np.asarray(state.loop.status) == FREE).all()
    waiting, running, found, runs = list(order or range(len(requests))), [None] * slots, {}, 0
    while waiting or any(i is not None for i in running):
        for slot in range(slots):
            if running[slot] is None and waiting:
                running[slot] = waiting.pop(0)
                state = batcher.insert(world.params, state, np.int32(slot), requests[running[slot]])
        state = batcher.run(world.params, state, np.int32(steps), np.bool_(len(waiting)))
        runs += 1
        loop = jax.device_get(state.loop._replace(cache=None, state=None))
        for slot, i in enumerate(running):
            if i is not None and loop.status[slot] != RUNNING:
                tokens = loop.seq.tokens[slot, : loop.seq.length[slot]].tolist()
                found[i], running[slot] = (tokens, int(loop.status[slot]), int(loop.row_calls[slot])), None
    return [found[i] for i in range(len(requests))], runs


def test_requests_get_the_tokens_that_they_get_alone(world):
    want = [world.alone(world.plain, request) for request in world.requests]
    assert {status for _, status, _ in want} == {STOPPED, FULL}
    for slots in (1, 3):
        got, _ = go(world, world.plain, world.requests, slots=slots)
        assert got == want
    got, _ = go(world, world.plain, world.requests, slots=3, steps=100, order=[4, 2, 0, 5, 1, 3])
    assert got == want
    other, _ = go(world, world.plain, [r._replace(key=jax.random.key(9)) for r in world.requests], slots=3)
    assert other != want


def test_nothing_compiles_as_requests_come_and_go(world):
    go(world, world.plain, world.requests, slots=3)
    before = len(world.traces)
    go(world, world.plain, world.requests, slots=3, steps=5)
    assert len(world.traces) == before


def test_a_chunk_changes_nothing(world):
    want, _ = go(world, world.plain, world.requests, slots=3)
    batcher = world.batcher(chunk=8)
    assert go(world, batcher, world.requests, slots=3)[0] == want
    assert world.plain.capacity == S + 2 and batcher.capacity == S + 7


def test_speculation_inside_the_step(world):
    """Coupled: the tokens of plain sampling, in fewer calls. By rejection: the tokens of the request alone."""
    want, _ = go(world, world.plain, world.requests, slots=3)
    got, _ = go(world, world.batcher(proposer=NGram(2, 1)), world.requests, slots=3)
    assert [x[:2] for x in got] == [x[:2] for x in want]
    assert sum(x[2] for x in got) < sum(x[2] for x in want)
    jacobi = world.batcher(proposer=Jacobi(2), rule=Rejection())
    got, _ = go(world, jacobi, world.requests, slots=3)
    assert got == [world.alone(jacobi, request) for request in world.requests]
    assert sum(x[2] for x in got) < sum(len(x[0]) - len(prompt) for x, prompt in zip(got, PROMPTS))


def test_conditions_and_settings_of_ones_own(world):
    """A bias a request as its condition; and settings that hold the state of a grammar in which each request starts."""
    bias = np.eye(V, dtype=np.float32)[:5] * 3
    table = np.array([[0, 0, -1, -1, 0, 0], [-1, -1, 1, 1, 1, -1]], np.int32)

    def transform(logits, context, settings):
        logits = constrain(logits, context, table=table, start=settings["state"], begin=settings["begin"])
        return apply_sampling(logits, context, settings["sampling"])

    class Numbers(dict):
        """A tree of numbers that can be hashed, as the fields of a batcher must."""

        def __hash__(self):
            return hash(tuple(self.items()))

    jax.tree_util.register_pytree_node(Numbers, lambda x: (list(x.values()), tuple(x)), lambda k, v: Numbers(zip(k, v)))
    batcher = world.batcher(settings=Numbers(state=0, begin=1, sampling=Sampling()), transform=transform)
    own = [
        batcher.request(
            prompt,
            key=jax.random.key(i),
            cond=bias[i % 5],
            settings=Numbers(state=i % 2, begin=len(prompt), sampling=Sampling(temperature=1 + i / 5)),
        )
        for i, prompt in enumerate(PROMPTS)
    ]
    got, _ = go(world, batcher, own, slots=2, cond=bias[0])
    assert got == [world.alone(batcher, request) for request in own]
    for i, (tokens, _, _) in enumerate(got):
        assert set(tokens[len(PROMPTS[i]) :]) <= ({2, 3, 4} if i % 2 else {0, 1, 4, 5})


def test_reordering_moves_requests(world):
    """Half way through, the slots are put in another order, made fewer and more."""
    want, _ = go(world, world.plain, world.requests[:3], slots=3)
    state = world.plain.start(world.params, world.model.cache(3))
    for slot in range(3):
        state = world.plain.insert(world.params, state, np.int32(slot), world.requests[slot])
    state = world.plain.run(world.params, state, np.int32(1), np.bool_(False))
    state = world.plain.reorder(world.params, state, np.array([2, 0]))
    state = world.plain.run(world.params, state, np.int32(1), np.bool_(False))
    state = world.plain.reorder(world.params, state, np.array([1, -1, 0]))
    assert np.asarray(state.loop.status).tolist()[1] == FREE
    state = world.plain.run(world.params, state, np.int32(50), np.bool_(False))
    seq = jax.device_get(state.loop.seq)
    for slot, i in ((0, 0), (2, 2)):
        assert (seq.tokens[slot, : seq.length[slot]].tolist(), int(state.loop.status[slot])) == want[i][:2]


def test_a_run_ends_when_asked_to(world):
    batcher, slots = world.plain, 2

    def state():
        state = batcher.start(world.params, world.model.cache(slots))
        for slot, max_new in enumerate((2, 9)):
            request = batcher.request([1, 2], key=jax.random.key(slot), max_new=max_new)
            state = batcher.insert(world.params, state, np.int32(slot), request)
        return state

    for steps, wake, calls in ((1, False, 1), (50, False, 9), (50, True, 2), (5, True, 2)):
        after = batcher.run(world.params, state(), np.int32(steps), np.bool_(wake))
        assert int(after.loop.calls) == calls
    freed = batcher.free(state(), np.array([True, False]))
    assert np.asarray(freed.loop.status).tolist() == [FREE, RUNNING]
    after = batcher.run(world.params, freed, np.int32(3), np.bool_(True))
    assert np.asarray(after.loop.seq.length).tolist() == [2, 5]


def test_bad_input(world):
    b = world.plain
    key = jax.random.key(0)
    for arguments, message in (
        ({"prompt": []}, r"prompt of shape \(0,\): expected 1 to 13 tokens"),
        ({"prompt": [1] * 14}, r"prompt of shape \(14,\)"),
        ({"prompt": [0.5]}, "prompt of shape"),
        ({"prompt": [2, -1]}, "token -1"),
        ({"max_new": 0}, r"max_new=0: must be in 1\.\.12"),
        ({"max_new": 13}, "max_new=13"),
        ({"stop": (1, 2, 3)}, r"stop=\(1, 2, 3\): expected at most 2"),
        ({"stop": (-1,)}, r"stop=\(-1,\)"),
        ({"settings": Sampling(temperature=0)}, "temperature=0: must be > 0"),
        ({"settings": Sampling(repetition=-1.0)}, "repetition=-1.0"),
        ({"settings": (1.0, 2.0)}, "expected the structure of"),
        ({"key": jnp.zeros(2, jnp.uint32)}, "expected one of jax.random.key"),
        ({"key": jax.random.split(key)}, "expected one of jax.random.key"),
    ):
        with pytest.raises(ValueError, match=message):
            b.request(**{"prompt": [1, 2], "key": key} | arguments)
    for bad in ({"max_length": 1}, {"chunk": 0}, {"stops": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            world.batcher(**bad)
    with pytest.raises(ValueError, match="tuple has no take"):
        b.start(world.params, (1, 2))
    small = KVCache.zeros(layers=1, batch=2, capacity=S + 1, heads=1, head_size=2)
    with pytest.raises(ValueError, match=f"the cache holds {S + 1} positions; max_length=14, chunk=3 and queries of 1 need 16"):
        b.start(world.params, small)
    assert isinstance(b.proposer, Sequential)
