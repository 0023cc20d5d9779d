"""The masked transformer: what it sees, its steps, and decoding after a tiny overfit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen.decoding import Guided, View, guide, truncate
from jaxgen.decoding.block_cache import FreeCache, Whole
from jaxgen.decoding.guidance import GuidedCache
from jaxgen.decoding.kernels import Unmask
from jaxgen.decoding.next_scale import Known
from jaxgen.decoding.refine import refine
from jaxgen.decoding.reveal import ByConfidence, Scheduled
from jaxgen.generators.masked import MaskedTransformer
from jaxgen.objectives.diffusion import masked_prediction, stratified_times
from jaxgen.paths import Cosine, Masking

pytestmark = pytest.mark.usefixtures("quick_compiles")

LENGTH, VOCAB, CLASSES = 8, 7, 3
MODEL = MaskedTransformer(vocab=VOCAB, num_classes=CLASSES, length=LENGTH, width=16, heads=2, depth=2)
LABELS = np.array([0, 2, 1], np.int32)
TOKENS = np.random.default_rng(0).integers(0, VOCAB + 1, (3, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module")
def params(randomize):
    return jax.device_put(randomize(jax.eval_shape(MODEL.init, jax.random.key(0), LABELS, TOKENS)))


def test_every_position_sees_every_other_and_the_class(params):
    run = jax.jit(MODEL.apply)
    whole = np.asarray(run(params, LABELS, TOKENS))
    assert whole.shape == (3, LENGTH, VOCAB) and whole.dtype == np.float32  # the mask is read, not predicted
    for i in (0, LENGTH - 1):
        changed = TOKENS.copy()
        changed[:, i] = (changed[:, i] + 1) % (VOCAB + 1)
        assert (np.abs(np.asarray(run(params, LABELS, changed)) - whole).max(axis=(0, 2)) > 1e-4).all()
    assert (np.abs(np.asarray(run(params, (LABELS + 1) % CLASSES, TOKENS)) - whole).max(-1) > 1e-3).all()

    @jax.jit
    def step(cache):
        return MODEL.apply(params, cache, View(TOKENS, jnp.arange(LENGTH)), LABELS, method="step")

    out, cache = step(())
    np.testing.assert_allclose(out.params, whole, atol=1e-6)
    assert cache == () and out.feats.shape == (3, LENGTH, 16)
    np.testing.assert_allclose(step(MODEL.init_cache(3))[0].params, whole, atol=1e-5)


@pytest.fixture(scope="module")
def sample():
    """MaskGIT's decoder with guidance, compiled once a layout; labels are those of all classes."""

    def step(params, cache, view, cond):
        return MODEL.apply(params, cache, view, cond, method="step")

    @functools.cache
    def sampler(layout):
        everyone = jnp.arange(CLASSES)

        @jax.jit
        def run(params, key, known, weight=0.0, temperature=0.5):
            return refine(
                guide(step),
                ByConfidence(Scheduled(4), 1.0),
                Unmask(MODEL.mask, lambda logits, context: truncate(logits, temperature=temperature)),
                params=params,
                cache=GuidedCache(MODEL.init_cache(2 * CLASSES)),
                cond=Guided(jnp.concatenate([everyone, jnp.full_like(everyone, CLASSES)]), weight),
                batch=CLASSES,
                length=LENGTH,
                key=key,
                layout=layout,
                known=known,
            )

        return run

    return sampler


def test_a_frozen_prefix_is_exact_where_one_layer_attends_and_near_where_two_do(params, sample):
    """A first layer's keys depend on tokens alone; with a second one the prefix goes stale."""
    blocks = params["params"]["transformer"]["blocks_1"]
    silent = jax.tree.map(lambda x: x, params)
    silent["params"]["transformer"]["blocks_1"] = blocks | {
        "attention": blocks["attention"] | {"proj": jax.tree.map(jnp.zeros_like, blocks["attention"]["proj"])}
    }
    loud = jax.tree.map(lambda x: 2 * x, params)
    prompt = Known(jnp.asarray(TOKENS % VOCAB), jnp.broadcast_to(jnp.arange(LENGTH) < 4, TOKENS.shape))
    whole, frozen, saved, equal = Whole(), FreeCache(4), 0, []
    for seed in range(4):
        key = jax.random.key(seed)
        want, got = (sample(layout)(silent, key, prompt, 0.5, 1.0) for layout in (whole, frozen))
        for field in ("tokens", "row_calls", "revealed", "calls"):
            np.testing.assert_array_equal(getattr(got, field), getattr(want, field))
        saved += int((want.row_reads - got.row_reads).sum())
        equal.append(np.equal(*(sample(layout)(loud, key, prompt, 0.5, 2.0).tokens for layout in (whole, frozen))))
    assert saved == 4 * CLASSES * 3 * 4  # after the first pass, those over the prompt
    assert 0.5 < np.mean(equal) < 1
    other = sample(whole)(params, jax.random.key(0), prompt, 3.0, 1.0).tokens
    assert (other != sample(whole)(params, jax.random.key(0), prompt, 0.0, 1.0).tokens).any()


def test_a_tiny_overfit_decodes_what_it_learned(params, sample):
    """One picture a class: MaskGIT's decoder, with a prefix that is frozen, finds them, and fills in what is missing."""
    data = np.random.default_rng(1).integers(0, VOCAB, (CLASSES, LENGTH)).astype(np.int32)
    path, optimizer = Masking(MODEL.mask, Cosine()), optax.adam(1e-2)
    labels = jnp.tile(jnp.arange(CLASSES), 8)
    tokens = jnp.asarray(data)[labels]

    def loss(params, key):
        times, noise = jax.random.split(key)
        noisy, masked = path.corrupt(noise, tokens, stratified_times(times, labels.shape), exact=True)
        return masked_prediction(MODEL.apply(params, labels, noisy), tokens, masked, label_smoothing=0.0)

    @jax.jit
    def train(params):
        def update(carry, key):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, key)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(update, (params, optimizer.init(params)), jax.random.split(jax.random.key(1), 120))

    (learned, _), losses = train(params)
    assert float(losses[0]) > 1.5 and float(losses[-20:].mean()) < 0.15
    run = sample(FreeCache(4))
    result = run(learned, jax.random.key(2), Known(jnp.asarray(data), jnp.zeros(data.shape, bool)))
    np.testing.assert_array_equal(result.tokens, data)
    assert int(result.calls) == 4
    # In-filling: what is given stays even where it is wrong, the rest follows the class.
    keep = np.zeros(data.shape, bool)
    keep[:, 6] = True
    wrong = np.where(keep, (data + 1) % VOCAB, data)
    filled = np.asarray(run(learned, jax.random.key(3), Known(jnp.asarray(wrong), jnp.asarray(keep))).tokens)
    np.testing.assert_array_equal(filled[keep], wrong[keep])
    assert (filled[~keep] == data[~keep]).mean() > 0.7
