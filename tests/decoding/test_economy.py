"""Fewer blocks and fewer MLPs: what is left out, what stays, and that nothing reads a key that was never written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import View
from jaxgen.decoding.economy import SkipDecode, SkipFeedForward
from jaxgen.generators.language import LanguageModel
from jaxgen.generators.sequence_sampler import SequenceSampler

pytestmark = pytest.mark.usefixtures("quick_compiles")

DEPTH, LENGTH = 5, 9
MODEL = LanguageModel(vocab=7, width=8, heads=2, depth=DEPTH)
SCHEDULE = SkipDecode(depth=DEPTH, most=4, least=2, start=3, end=7, warmup=1)


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(tree, [0.5 * jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(leaves)])


def step(params, cache, view, cond, **options):
    return MODEL.apply(params, cache, view, cond, method="step", **options)


def one_by_one(step, params, tokens):
    """Laws of a loop in Python over a cache full of numbers that would be noticed."""
    b, length = tokens.shape
    cache = MODEL.init_cache(b, length)
    cache = jax.tree.map(lambda x: jnp.full_like(x, 1e3), cache).commit(jnp.zeros((b,), jnp.int32))
    call, laws = jax.jit(lambda cache, view: step(params, cache, view, None)), []
    for i in range(length):
        out, cache = call(cache, View(tokens[:, i : i + 1], jnp.full((b, 1), i), jnp.ones((1, 1), bool)))
        cache = cache.commit(1)
        laws.append(out.params[:, 0])
    return np.stack(laws, 1)


def test_the_schedule_falls_and_is_nested():
    assert SCHEDULE.budget(jnp.arange(LENGTH)).tolist() == [4, 4, 4, 4, 4, 3, 2, 2, 2]
    active = np.asarray(SCHEDULE.active(jnp.arange(LENGTH)))
    assert active[0].tolist() == [True, False, True, True, True] and active[-1].tolist() == [True, False, False, False, True]
    assert (active[1:] <= active[:-1]).all()


def test_skipping_blocks_is_the_masked_forward_pass(params):
    tokens = jax.random.randint(jax.random.key(1), (2, LENGTH), 0, 7)
    want = MODEL.apply(params, tokens, active=SCHEDULE.active(jnp.arange(LENGTH)))
    np.testing.assert_allclose(one_by_one(SCHEDULE(step), params, tokens), want, atol=1e-4)
    assert np.abs(want - MODEL.apply(params, tokens)).max() > 0.1


def by_hand(params, tokens, rule):
    """The rule a token at a time, in Python."""
    mask = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))

    def block(i, half, x, **options):
        return MODEL.apply(params, x, method=lambda m, x: getattr(m.transformer.blocks[i], half)(x, **options))

    skipped = np.zeros((*tokens.shape, DEPTH), bool)
    x = MODEL.apply(params, method=lambda m: m.embed(tokens))
    for i in range(DEPTH):
        x, _ = block(i, "attend", x, pos=jnp.arange(LENGTH), mask=mask)
        after = np.array(block(i, "feed_forward", x))
        for place in np.ndindex(tokens.shape):
            a, b = np.asarray(x[place]), after[place]
            if skipped[place][i]:
                after[place] = a
            elif rule.blocks[0] <= i < rule.blocks[1] and place[1] >= rule.free:
                if a @ b / np.linalg.norm(a) / np.linalg.norm(b) >= rule.threshold:
                    skipped[place][i + 1 : rule.blocks[1]] = True
        x = jnp.asarray(after)
    return MODEL.apply(params, x, method="logits"), skipped


def test_skipping_mlps_is_the_rule_a_token_at_a_time(params):
    tokens = jax.random.randint(jax.random.key(1), (2, LENGTH), 0, 7)
    rule = SkipFeedForward(0.6, (1, 4), free=2)
    want, skipped = by_hand(params, tokens, rule)
    assert 0 < skipped[:, 2:].mean() < 0.4 and not skipped[:, :2].any() and not skipped[..., [0, 1, 4]].any()
    view = View(tokens, jnp.arange(LENGTH), jnp.tril(jnp.ones((LENGTH, LENGTH), bool)))
    out, _ = rule(step)(params, MODEL.init_cache(2, LENGTH), view, None)
    np.testing.assert_array_equal(out.aux, skipped)
    np.testing.assert_allclose(out.params, want, atol=1e-4)
    np.testing.assert_allclose(one_by_one(rule(step), params, tokens), want, atol=1e-4)


FULL = {
    "all blocks": SkipDecode(depth=DEPTH, most=DEPTH, least=DEPTH, start=0, end=1),
    "no MLP": SkipFeedForward(1.1, (0, DEPTH)),
}


@pytest.mark.parametrize("name", FULL)
def test_a_full_budget_is_the_whole_model(params, name):
    samplers = [SequenceSampler(model=MODEL, wrap=wrap) for wrap in (None, FULL[name])]
    want, got = (s({"generator": params}, jax.random.key(3), [[1, 2], [3, 4]], max_length=LENGTH) for s in samplers)
    np.testing.assert_array_equal(got.tokens, want.tokens)


def test_skipped_blocks_cost_nothing(params):
    """The compiled program branches: blocks that do not run are not computed and selected away."""
    view = View(jnp.zeros((1, 1), jnp.int32), jnp.full((1, 1), 8), jnp.ones((1, 1), bool))
    text = jax.jit(lambda c: SCHEDULE(step)(params, c, view, None)).lower(MODEL.init_cache(1, LENGTH)).as_text()
    assert text.count("stablehlo.case") == DEPTH


def test_bad_input(params):
    with pytest.raises(ValueError, match="least=5, most=4"):
        SkipDecode(depth=5, most=4, least=5, start=0, end=1)
    with pytest.raises(ValueError, match="start=3 and end=3"):
        SkipDecode(depth=5, most=4, least=2, start=3, end=3)
    with pytest.raises(ValueError, match="threshold=-2"):
        SkipFeedForward(-2, (0, 1))
    scanned = MODEL.clone(scan_layers=True)
    with pytest.raises(ValueError, match="scan"):
        jax.eval_shape(lambda: scanned.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32), active=jnp.ones((4, 5), bool)))
