"""The block-diffusion model: training and sampling see the same, caches are exact, and a tiny overfit decodes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen import masks
from jaxgen.decoding import View, truncate
from jaxgen.decoding.block_cache import Blocks, DualCache
from jaxgen.decoding.kernels import Unmask
from jaxgen.decoding.next_scale import Known
from jaxgen.decoding.refine import refine
from jaxgen.decoding.reveal import FirstHitting, Slots, Threshold
from jaxgen.generators.block_diffusion import BlockDiffusionTransformer
from jaxgen.objectives.diffusion import masked_elbo, stratified_times
from jaxgen.orders import blocks
from jaxgen.paths import Masking

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

B, LENGTH, BLOCK, VOCAB = 3, 12, 4, 7
MODEL = BlockDiffusionTransformer(vocab=VOCAB, block=BLOCK, width=16, heads=2, depth=2, kv_heads=1, hidden=32)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, VOCAB, (B, LENGTH)).astype(np.int32)
NOISY = np.where(RNG.random((B, LENGTH)) < 0.5, VOCAB, TOKENS)


def step(params, cache, view, cond):
    return MODEL.apply(params, cache, view, cond, method="step")


@pytest.fixture(scope="module")
def params(randomize):
    return jax.device_put(randomize(jax.eval_shape(MODEL.init, jax.random.key(0), NOISY, TOKENS)))


def test_a_block_is_sampled_as_it_was_trained(params):
    """The noisy half's logits are those of a step over the noisy block, with the clean blocks before it kept."""
    whole = jax.jit(MODEL.apply)(params, NOISY, TOKENS)

    @jax.jit
    def steps(params):
        cache, out = MODEL.init_cache(B, LENGTH), []
        for start in range(0, LENGTH, BLOCK):
            here, pos = slice(start, start + BLOCK), jnp.arange(start, start + BLOCK)
            out.append(MODEL.apply(params, cache, View(NOISY[:, here], pos), method="step")[0].params)
            cache = MODEL.apply(params, cache, View(TOKENS[:, here], pos), method="step")[1].commit(BLOCK)
        return jnp.concatenate(out, axis=1)

    np.testing.assert_allclose(steps(params), whole, atol=1e-5)
    assert whole.shape == (B, LENGTH, VOCAB) and whole.dtype == jnp.float32


def test_the_mask_is_the_published_one(shared):
    reference = np.load(shared / "fixtures" / "bd3lm" / "dev_bs4.npz")
    model = MODEL.clone(block=int(reference["block_size"]))
    length = len(reference["mask"]) // 2
    np.testing.assert_array_equal(masks.block_diffusion(model.order(length)).dense(), reference["mask"] > 0)


def _reference(params, key, known, order):
    """A Python loop without a cache: every pass reads everything so far under the block-causal mask."""
    everywhere = jnp.broadcast_to(jnp.arange(LENGTH), (B, LENGTH))
    block = blocks(LENGTH, BLOCK).step_of
    kernel = Unmask(VOCAB)

    @jax.jit
    def pass_(x, open_, total, number):
        """What the pass would put where, and which of it the order reveals."""
        empty = MODEL.init_cache(B, LENGTH).commit(jnp.zeros(B, jnp.int32))
        out, _ = step(params, empty, View(x, everywhere, jnp.asarray(block[:, None] >= block)), None)
        slots = Slots(open_, total, jnp.full(B, number), everywhere, jnp.arange(B), key, x)
        drawn = kernel.draw(out, slots)
        return drawn.value, order.reveal(slots, drawn) & open_

    x = np.where(known.keep, known.tokens, VOCAB)
    for n in range(LENGTH // BLOCK):
        total, number = ((x == VOCAB) & (block == n)).sum(axis=1), 0
        while ((x == VOCAB) & (block == n)).any():
            value, chosen = pass_(x, (x == VOCAB) & (block == n), total, number)
            x, number = np.where(chosen, value, x), number + 1
    return x


# Each row knows a token: in a block of nothing but masks all laws are equal, and rounding would break ties.
KNOWN = Known(jnp.asarray(TOKENS), jnp.asarray(np.arange(LENGTH) < np.array([[1], [5], [9]])))


@pytest.fixture(scope="module")
def sample(params):
    @functools.cache
    def sampler(layout):
        @jax.jit
        def run(key, threshold=0.3, params=params, known=KNOWN):
            return refine(
                step,
                Threshold(threshold),
                Unmask(VOCAB),
                params=params,
                cache=MODEL.init_cache(B, LENGTH),
                batch=B,
                length=LENGTH,
                key=key,
                layout=layout,
                known=known,
            )

        return run

    return sampler


def test_cached_blocks_are_the_full_forward(params, sample):
    """Prompts of three lengths, prefilled in one call where they can be; token by token the uncached Python loop."""
    run = sample(Blocks(BLOCK, prefill=8))
    for seed in range(2):
        got = run(jax.random.key(seed))
        np.testing.assert_array_equal(got.tokens, _reference(params, jax.random.key(seed), KNOWN, Threshold(0.3)))
    assert (np.asarray(got.row_reads) == BLOCK * np.asarray(got.row_calls)).all()


def test_sub_blocks_are_exact_where_one_layer_attends_and_near_where_two_do(params, sample):
    """A first layer's key depends on the token alone, so that nothing that is kept goes stale; a second layer's does."""
    params, silent = (jax.tree.map(lambda x: x, params) for _ in range(2))
    blocks = params["params"]["transformer"]["blocks_1"]
    blocks["attention"]["qkv"]["kernel"] *= 3  # what it attends to matters
    silent["params"]["transformer"]["blocks_1"] = blocks | {
        "attention": blocks["attention"] | {"o": jax.tree.map(jnp.zeros_like, blocks["attention"]["o"])}
    }
    exact, dual = (sample(layout(BLOCK, 0, 2)) for layout in (Blocks, DualCache))
    known, saved, equal = Known(KNOWN.tokens, KNOWN.keep & (jnp.arange(LENGTH) == 0)), 0, []
    for seed in range(4):
        want, got = (run(jax.random.key(seed), 0.4, silent, known) for run in (exact, dual))
        for field in ("tokens", "row_calls", "revealed"):
            np.testing.assert_array_equal(getattr(got, field), getattr(want, field))
        saved += int((want.row_reads - got.row_reads).sum())
        assert int(want.calls) <= int(got.calls) <= 2 * int(want.calls)
        equal.append(np.equal(*(run(jax.random.key(seed), 2.0, params, known).tokens for run in (exact, dual))))
    assert saved > 0  # some passes have read a sub-block alone
    assert 0.5 < np.mean(equal) < 1


def test_a_tiny_overfit_decodes_what_it_learned(params):
    """Three sentences by heart: first-hitting sampling of blocks continues their beginnings."""
    data = np.random.default_rng(5).integers(0, VOCAB, (B, LENGTH)).astype(np.int32)
    data[:, 0] = np.arange(B)  # the first token tells them apart, and is always given
    path, optimizer = Masking(MODEL.mask), optax.adam(1e-2)
    tokens = jnp.tile(jnp.asarray(data), (8, 1))

    def loss(params, key):
        times, noise = jax.random.split(key)
        t = jnp.repeat(stratified_times(times, (len(tokens), LENGTH // BLOCK), low=0.1), BLOCK, axis=1)
        t = t.at[:, 0].set(0.0)
        noisy, masked = path.corrupt(noise, tokens, t)
        return masked_elbo(MODEL.apply(params, noisy, tokens), tokens, masked, path.weight(jnp.maximum(t, 0.1))).mean()

    @jax.jit
    def train(params):
        def update(carry, key):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, key)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(update, (params, optimizer.init(params)), jax.random.split(jax.random.key(1), 150))

    (learned, _), losses = train(params)
    assert float(losses[0]) > 1.5 and float(losses[-20:].mean()) < 0.3

    @jax.jit
    def sample(params, key):
        return refine(
            step,
            FirstHitting(),
            Unmask(MODEL.mask, lambda logits, context: truncate(logits, temperature=0.3)),
            params=params,
            cache=MODEL.init_cache(B, LENGTH),
            batch=B,
            length=LENGTH,
            key=key,
            layout=Blocks(BLOCK),
            known=Known(jnp.asarray(data), jnp.broadcast_to(jnp.arange(LENGTH) == 0, data.shape)),
        )

    result = sample(learned, jax.random.key(2))
    np.testing.assert_array_equal(result.tokens, data)
    assert int(result.calls) == LENGTH - 1 + 2  # a token a pass, and two finished blocks to keep
