"""The next-token transformer of any order; its values are checked in tests/interop/test_rar.py against the authors'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import View
from jaxgen.generators import RandomOrderTransformer

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

B, LENGTH, VOCAB, CLASSES = 2, 5, 7, 3
MODEL = RandomOrderTransformer(
    vocab=VOCAB, num_classes=CLASSES, length=LENGTH, width=16, heads=2, depth=2, dropout=0.3, scan_layers=True
)
LABELS = np.array([0, 2], np.int32)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, VOCAB, (B, LENGTH)).astype(np.int32)
ORDERS = np.array([[3, 0, 4, 1, 2], [1, 4, 2, 0, 3]], np.int32)


@pytest.fixture(scope="module")
def params(randomize):
    return jax.device_put(randomize(MODEL.param_shapes()))


@pytest.fixture(scope="module")
def full(params):
    run = jax.jit(MODEL.apply)
    return lambda tokens, orders=ORDERS: np.asarray(run(params, LABELS, tokens, orders))


def test_what_is_seen_follows_the_order(full):
    """A changed token moves what comes after it in its row's order, and nothing else."""
    whole = full(TOKENS)
    for place in range(LENGTH):
        changed = TOKENS.copy()
        changed[:, place] = (changed[:, place] + 1) % VOCAB
        moved = np.abs(full(changed) - whole).max(-1) > 1e-4
        rank = (ORDERS == place).argmax(axis=1)
        np.testing.assert_array_equal(moved, np.arange(LENGTH) > rank[:, None])


def test_the_next_place_is_known(full):
    """Orders that agree up to a token, and differ in which comes next, ask for different laws."""
    other = ORDERS.copy()
    other[:, [2, 3]] = other[:, [3, 2]]
    moved = np.abs(full(TOKENS, other) - full(TOKENS)).max(-1) > 1e-4
    np.testing.assert_array_equal(moved[:, :3], [[False, False, True]] * B)


def test_cached_steps_in_pieces_are_the_whole(params, full):
    @jax.jit
    def run(params):
        cache, out, start = MODEL.apply(params, MODEL.init_cache(B), LABELS, method="begin"), [], 0
        before = jnp.concatenate([jnp.full((B, 1), -1), TOKENS[:, :-1]], axis=1)
        for n in (1, 3, 1):
            view = View(before[:, start : start + n], jnp.arange(start, start + n), jnp.tril(jnp.ones((n, n), bool)))
            result, cache = MODEL.apply(params, cache, view, LABELS, method="step")
            cache, start = cache.commit(n), start + n
            out.append(result.params)
        return jnp.concatenate(out, axis=1)

    raster = np.broadcast_to(np.arange(LENGTH), (B, LENGTH)).astype(np.int32)
    np.testing.assert_allclose(run(params), full(TOKENS, raster), atol=1e-5)


def test_it_starts_as_the_identity_and_drops_while_it_trains(params):
    """Gates, scales and shifts start at 0; dropout acts in training."""
    fresh = jax.jit(MODEL.init)(jax.random.key(0), LABELS, TOKENS)
    assert not np.any(fresh["params"]["transformer"]["blocks"]["ada"]["dense"]["kernel"])

    @jax.jit
    def run(key):
        return MODEL.apply(params, LABELS, TOKENS, train=True, rngs={"dropout": key})

    assert np.abs(run(jax.random.key(0)) - run(jax.random.key(1))).max() > 1e-3
