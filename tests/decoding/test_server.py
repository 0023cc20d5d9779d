"""The scheduler of continuous batching: a thousand mixed requests, and what happens to those that are not just served."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding.batcher import Batcher
from jaxgen.decoding.server import CANCELLED, TIMED_OUT, QueueFull, Server
from jaxgen.decoding.speculate import BROKEN, FULL, STOPPED, Sequential, speculate
from jaxgen.decoding.transforms import Sampling, apply_sampling
from jaxgen.decoding.verify import Coupled
from jaxgen.generators.language import LanguageModel
from jaxgen.generators.state_space import StateSpaceModel

pytestmark = pytest.mark.usefixtures("quick_compiles")

V, S, SLOTS, POISON = 12, 24, 8, 11
MODEL = LanguageModel(vocab=V, width=8, heads=2, depth=1)


class Clock:
    """Time that passes when it is told to, and a little at each look."""

    def __init__(self, tick=0.0):
        self.now, self.tick = 0.0, tick

    def __call__(self):
        self.now += self.tick
        return self.now


def alone(step, params, model):
    """A function of requests: (tokens, lengths, statuses) of each by itself, one after another."""

    @jax.jit
    def every(requests):
        def one(request):
            settings = jax.tree.map(lambda x: x[None], request.settings)
            result = speculate(
                step,
                Sequential(),
                Coupled(),
                params=params,
                cache=model.init_cache(1, S),
                cond=None,
                prompt=request.prompt[None],
                prompt_length=request.length[None],
                max_length=S,
                limit=request.limit[None],
                key=request.key,
                transform=lambda logits, context: apply_sampling(logits, context, settings),
                stop=request.stop,
            )
            return result.tokens[0], result.length[0], result.status[0]

        return jax.lax.map(one, requests)

    return lambda requests: jax.device_get(every(jax.tree.map(lambda *x: jnp.stack(x), *requests)))


@pytest.fixture(scope="module")
def world(randomize):
    """A model that cannot read the token POISON: what follows it is not a number."""
    params = randomize(jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)), seed=1)
    params = jax.tree.map(jnp.asarray, params)
    params["params"]["head"]["kernel"] *= 2
    params["params"]["embed"]["embedding"] = params["params"]["embed"]["embedding"].at[POISON].set(jnp.nan)
    traces = []

    def step(params, cache, view, cond):
        traces.append(view.tokens.shape)
        return MODEL.apply(params, cache, view, cond, method="step")

    batcher = Batcher(step=step, max_length=S, chunk=8, stops=2)

    def server(slots=SLOTS, **options):
        return Server(batcher, params, MODEL.init_cache(slots, batcher.capacity), **{"clock": Clock(), "steps": 4} | options)

    world = type("World", (), {})()
    world.traces, world.batcher, world.alone, world.server = traces, batcher, alone(step, params, MODEL), server
    return world


def mixed(count, seed=0):
    """Requests of all kinds."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        prompt = rng.integers(0, V - 1, rng.integers(1, 16)).tolist()
        settings = Sampling(
            temperature=rng.choice([0.5, 1.0, 1.5]),
            top_k=int(rng.choice([0, 1, 4])),
            top_p=rng.choice([0.7, 1.0]),
            min_p=rng.choice([0.0, 0.05]),
            repetition=rng.choice([1.0, 1.3]),
            frequency=rng.choice([0.0, 0.2]),
        )
        stop = tuple(rng.choice(V - 1, rng.integers(0, 3), replace=False).tolist())
        max_new = [None, int(rng.integers(1, S - len(prompt) + 1))][int(rng.integers(2))]
        yield {"prompt": prompt, "key": jax.random.key(i), "settings": settings, "stop": stop, "max_new": max_new}


@pytest.mark.parametrize("widths", [(), (2, 4)], ids=["fixed", "reordered"])
def test_a_thousand_mixed_requests(world, widths):
    """All get their own tokens; some are cancelled, time out or break; and nothing compiles on the way."""
    rng, clock = np.random.default_rng(1), Clock(tick=0.01)
    server = world.server(clock=clock, queue=32, widths=widths)
    count = 1000 if not widths else 150
    asked, cancelled, hurried = list(mixed(count)), set(), set()
    server.warm_up()
    before, seen = len(world.traces), set()
    for i, arguments in enumerate(asked):
        hurried |= {i} if rng.random() < 0.05 else set()
        number = server.submit(**arguments, timeout=0.3 if i in hurried else 1e6, wait=True)
        assert number == i
        if rng.random() < 0.05:
            victim = int(rng.integers(max(0, i - 40), i + 1))
            cancelled |= {victim} if server.cancel(victim) else set()
        if widths and i % 50 == 49:  # a lull, in which the slots get fewer
            while server.waiting or server.running:
                server.step()
                seen.add(server.slots)
    while server.waiting or server.running:
        server.step()
    outcomes = server.drain()
    assert len(world.traces) == before
    assert sorted(outcomes) == list(range(count)) and seen == set(widths) | ({SLOTS} if widths else set())

    tokens, lengths, statuses = world.alone([world.batcher.request(**arguments) for arguments in asked])
    kinds = set()
    for i, arguments in enumerate(asked):
        want = tokens[i, len(arguments["prompt"]) : lengths[i]].tolist()
        outcome = outcomes[i]
        kinds.add(outcome.status)
        if outcome.status == CANCELLED:
            assert i in cancelled
        elif outcome.status == TIMED_OUT:
            assert i in hurried
        else:
            assert (outcome.tokens, outcome.status) == (want, statuses[i])
            assert outcome.calls == len(want) + (outcome.status == BROKEN)
            assert outcome.submitted <= outcome.started <= outcome.ended
        assert outcome.tokens == want[: len(outcome.tokens)]
    assert kinds == {STOPPED, FULL, BROKEN, CANCELLED, TIMED_OUT}
    assert cancelled == {i for i in outcomes if outcomes[i].status == CANCELLED}
    assert any(0 < len(outcomes[i].tokens) for i in cancelled) and any(outcomes[i].started is None for i in cancelled)


def test_models_with_a_state(randomize):
    """Mamba-2 and attention in turns: a slot holds the memory of the one and the keys and values of the other."""
    model = StateSpaceModel(vocab=V, width=8, depth=2, attention_every=2, heads=2, state_size=4, head_size=4)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    params = jax.tree.map(jnp.asarray, randomize(shapes, seed=2))

    def step(params, cache, view, cond):
        return model.apply(params, cache, view, cond, method="step")

    batcher = Batcher(step=step, max_length=S, chunk=8, stops=2)
    server, asked = Server(batcher, params, model.init_cache(2, batcher.capacity)), list(mixed(7))
    for arguments in asked:
        server.submit(**arguments)
    outcomes = server.drain()
    tokens, lengths, statuses = alone(step, params, model)([batcher.request(**arguments) for arguments in asked])
    for i, arguments in enumerate(asked):
        assert outcomes[i].tokens == tokens[i, len(arguments["prompt"]) : lengths[i]].tolist()
        assert outcomes[i].status == statuses[i]


def forever(**more):
    """A request that lasts."""
    return {"prompt": [1], "key": jax.random.key(0), "settings": Sampling(top_k=1)} | more


def test_back_pressure(world):
    server = world.server(slots=2, queue=3)
    for _ in range(3):
        server.submit(**forever())
    with pytest.raises(QueueFull, match="3 requests wait, as many as may"):
        server.submit(**forever())
    assert server.waiting == 3 and server.running == 0
    server.step()
    assert server.waiting == 1 and server.running == 2
    assert [server.submit(**forever(), wait=True) for _ in range(3)] == [3, 4, 5]
    assert server.waiting <= 3
    outcomes = server.drain()
    assert len(outcomes) == 6 and len({tuple(outcome.tokens) for outcome in outcomes.values()}) == 1
    assert server.drain() == {} and server.step() == {}


def test_cancelling_frees_the_slot(world):
    server = world.server(slots=1)
    first, second, third = (server.submit(**forever()) for _ in range(3))
    server.step()
    assert server.running == 1 and server.waiting == 2
    with pytest.raises(ValueError, match="1 requests are running"):
        server.warm_up()
    assert server.cancel(first) and server.cancel(third)
    assert server.running == 0 and server.waiting == 1
    assert not server.cancel(first)
    partial, whole, none = (server.result(number) for number in (first, second, third))
    assert (partial.status, none.status, none.tokens, none.started) == (CANCELLED, CANCELLED, [], None)
    assert whole.tokens[: len(partial.tokens)] == partial.tokens and len(partial.tokens) == partial.calls == 4
    with pytest.raises(KeyError, match="request 0"):
        server.result(first)
    with pytest.raises(KeyError, match="request 7"):
        server.cancel(7)


def test_time_outs_free_slots_and_places_in_the_queue(world):
    clock = Clock()
    server = world.server(slots=1, clock=clock)
    running = server.submit(**forever(), timeout=2.0)
    waiting = server.submit(**forever(), timeout=1.0)
    patient = server.submit(**forever())
    server.step()
    clock.now = 1.0
    server.step()
    assert server.running == 1 and server.waiting == 1
    clock.now = 2.5
    server.step()
    first, second, third = (server.result(number) for number in (running, waiting, patient))
    assert (first.status, second.status) == (TIMED_OUT, TIMED_OUT) and third.status in (STOPPED, FULL)
    assert len(first.tokens) == 8 and second.tokens == [] and third.tokens[:8] == first.tokens
    assert (second.ended, first.ended, third.started) == (1.0, 2.5, 2.5)


def test_streams(world):
    server = world.server(slots=2)
    numbers = [server.submit(**arguments) for arguments in mixed(5, seed=3)]
    streams = [server.stream(number) for number in numbers]
    first = [next(stream) for stream in streams]  # in turns
    rest = [list(stream) for stream in streams]
    for number, head, tail in zip(numbers, first, rest):
        assert server.result(number).tokens == [head, *tail]
    with pytest.raises(KeyError):
        next(server.stream(numbers[0]))


def test_bad_input(world):
    for options, message in (
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"queue": 0}, "queue=0"),
        ({"widths": (0,)}, "widths=0"),
        ({"widths": (9,)}, "widths=9: must be at least 1 and at most 8"),
    ):
        with pytest.raises(ValueError, match=message):
            world.server(**options)
    server = world.server()
    with pytest.raises(ValueError, match="timeout=0: must be > 0"):
        server.submit(**forever(), timeout=0)
    with pytest.raises(ValueError, match=r"prompt of shape \(0,\)"):
        server.submit([], key=jax.random.key(0))
    assert server.waiting == 0
