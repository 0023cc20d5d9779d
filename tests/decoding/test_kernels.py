"""Kernels: vectors with a head of their own, and refinement under a causal model's eyes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import Out, Sequential, View, speculate, truncate
from jaxgen.decoding.kernels import GuidedUnmask, Unmask, UnmaskVectors
from jaxgen.decoding.next_scale import Known
from jaxgen.decoding.refine import refine
from jaxgen.decoding.reveal import Agreement, Each, LeftToRight, Slots
from jaxgen.decoding.speculate import BROKEN
from jaxgen.decoding.verify import Coupled

pytestmark = pytest.mark.usefixtures("quick_compiles")

V, L, B = 3, 4, 256


def test_vectors_have_the_law_of_their_chain():
    """Each new vector is the sum of the known ones plus noise: in a fixed order of one a pass the covariance is known."""
    rho, b, length, size = 0.6, 8192, 4, 2

    def step(params, cache, view, cond):
        known = jnp.where(jnp.isnan(view.tokens), 0.0, view.tokens)
        return Out(jnp.broadcast_to(params * known.sum(axis=1, keepdims=True), view.tokens.shape)), cache

    def head(keys, out):
        noise = jax.vmap(jax.vmap(lambda key: jax.random.normal(key, (size,))))(keys)
        return out.params + noise

    @jax.jit
    def sample(count, rho=rho, known=None):
        options = dict(batch=b, length=length, key=jax.random.key(0), known=known, pad=-1)
        return refine(step, LeftToRight(Each(count)), UnmaskVectors(size, head), params=rho, **options)

    nothing = Known(jnp.zeros((b, length, size)), jnp.zeros((b, length), bool))
    x = np.asarray(sample(1, known=nothing).tokens, np.float64)
    maker = np.linalg.inv(np.eye(length) - rho * np.tril(np.ones((length, length)), -1))  # x = maker @ noise
    want = maker @ maker.T
    got = np.einsum("bic,bjc->ij", x, x) / (b * size)
    spread = np.sqrt((np.outer(np.diag(want), np.diag(want)) + want**2) / (b * size))
    assert (np.abs(got - want) < 4 * spread).all()
    # Two a pass do not see each other: the control.
    together = np.asarray(sample(2, known=nothing).tokens, np.float64)
    assert abs(np.mean(together[:, 0] * together[:, 1])) < 4 * spread[0, 1] < abs(want[0, 1])
    # Given vectors stay, and rows whose head gives no numbers are reported.
    keep = jnp.broadcast_to(jnp.array([True, False, False, False]), (b, length))
    given = jnp.where(jnp.arange(b)[:, None, None] % 2 == 0, jnp.ones((b, length, size)), jnp.inf)
    result = sample(1, known=Known(given, keep))
    np.testing.assert_array_equal(result.tokens[::2, 0], 1.0)
    assert np.isfinite(result.tokens[::2]).all()
    assert (np.asarray(result.status)[1::2] == BROKEN).all() and (np.asarray(result.status)[::2] != BROKEN).all()
    assert (np.asarray(result.tokens)[1::2, 1:] == -1).all()


def test_the_mask_is_never_drawn():
    """A logit for the mask, however large, changes nothing; without one all ids are tokens."""
    logits = jax.random.normal(jax.random.key(0), (64, 4, 3))
    pos = jnp.broadcast_to(jnp.arange(4), (64, 4))
    slots = Slots(pos >= 0, *jnp.full((2, 64), 4), pos, jnp.arange(64), jax.random.key(1), jnp.full((64, 4), 3))
    draw = jax.jit(lambda x: Unmask(3).draw(Out(x), slots))
    want, got = draw(logits), draw(jnp.concatenate([logits, jnp.full((64, 4, 1), 99.0)], axis=2))
    assert np.asarray(got.value).max() == 2
    np.testing.assert_allclose(got.log_p[..., :3], want.log_p, atol=1e-6)
    picked = np.take_along_axis(np.asarray(got.log_p), np.asarray(got.value)[..., None], axis=2)[..., 0]
    np.testing.assert_array_equal(got.score, picked)


@pytest.fixture(scope="module")
def guided(masked_table, table_model):
    """Refinement of a structureless masked model under a structureless causal one, and the causal one's own greedy tokens."""
    masked, causal = masked_table(vocab=V, length=L), table_model(vocab=V)
    table, law = masked.params(0), causal.params(1)

    @jax.jit
    def run(key, top_k=1, threshold=0.0, ratio=0.0, law=law):
        proposals = Unmask(V, lambda logits, context: truncate(logits, temperature=0.7))
        kernel = GuidedUnmask(proposals, causal.step, law, causal.cache(B), None, top_k, threshold, ratio)
        options = dict(params=table, batch=B, length=L, key=key)
        return refine(masked.step, Agreement(), kernel, **options), refine(
            masked.step, LeftToRight(Each(L)), proposals, **options
        )

    def greedy(first):
        return speculate(
            causal.step,
            Sequential(),
            Coupled(),
            params=law,
            cache=causal.cache(B),
            cond=None,
            prompt=first[:, None],
            max_length=L,
            key=jax.random.key(0),
            transform=lambda logits, context: truncate(logits, top_k=1),
        ).tokens

    run.greedy, run.causal, run.law = jax.jit(greedy), causal, law
    return run


def test_argmax_agreement_gives_the_causal_model_greedy_tokens(guided):
    """Whatever the masked model proposes, in fewer passes than tokens."""
    result, _ = guided(jax.random.key(0))
    np.testing.assert_array_equal(result.tokens, guided.greedy(result.tokens[:, 0]))
    calls = np.asarray(result.row_calls)
    assert calls.min() == 1 and calls.max() <= L and calls.mean() < 0.9 * L


def test_a_guide_that_agrees_needs_one_pass(guided):
    result, at_once = guided(jax.random.key(1), top_k=V)
    assert (np.asarray(result.row_calls) == 1).all()
    np.testing.assert_array_equal(result.tokens, at_once.tokens)


def test_settings_of_the_guide(guided):
    """Each makes agreement harder, compared with its definition on the first pass; rows without numbers are reported."""
    _, at_once = guided(jax.random.key(2))
    proposed = np.asarray(at_once.tokens)
    pos = jnp.broadcast_to(jnp.arange(L), (B, L))
    view = View(at_once.tokens, pos, jnp.tril(jnp.ones((L, L), bool)))
    logits = jax.jit(guided.causal.step)(guided.law, guided.causal.cache(B), view, None)[0].params
    p = np.asarray(jax.nn.softmax(logits, axis=-1))
    p = p[:, :-1]
    chosen = np.take_along_axis(p, proposed[:, 1:, None], axis=2)[..., 0]
    rank = (p > chosen[..., None]).sum(-1)
    calls = {}
    for name, settings, agrees in (
        ("top 2", {"top_k": 2}, rank < 2),
        ("probable", {"top_k": V, "threshold": 0.4}, chosen >= 0.4),
        ("near the best", {"top_k": V, "ratio": 0.5}, chosen >= 0.5 * p.max(-1)),
    ):
        result, _ = guided(jax.random.key(2), **settings)
        first = np.asarray(result.revealed) == 0
        want = np.where(agrees.all(1), L, 2 + np.argmin(agrees, axis=1))
        np.testing.assert_array_equal(first.sum(axis=1), want)
        best = p.argmax(-1)
        for row in range(B):
            n = want[row]
            expected = proposed[row, 1:n].copy()
            if not agrees[row].all():
                expected[-1] = best[row, n - 2]
            np.testing.assert_array_equal(np.asarray(result.tokens)[row, 1:n], expected)
        calls[name] = float(result.row_calls.mean())
    assert len(set(calls.values())) == 3
    broken, _ = guided(jax.random.key(2), law=jnp.full_like(guided.law, jnp.nan))
    assert (np.asarray(broken.status) == BROKEN).all()
