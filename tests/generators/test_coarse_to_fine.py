"""Coarse to fine: the law by enumeration, what either model sees, and the sampler against a plain loop."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import Settings, gumbel
from jaxgen.generators import CoarseToFineLlama, CoarseToFineSampler, NextTokenSampler
from jaxgen.tokenizers import FlexibleTokenizer

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

V, K, CLASSES = 5, 2, 3
MODEL = CoarseToFineLlama(
    vocab=V, clusters=K, grid=2, num_classes=CLASSES, width=24, heads=2, depth=1, fine_depth=2, scan_layers=True
)
CLUSTER = np.array([0, 1, 1, 0, 1])
LABELS = np.array([0, 2], np.int32)
SETTINGS, FINE = Settings(1.5, 0.9, 0, 0.8), Settings(0.5, 1.3, 2, 0.0)
ALL = np.array(list(itertools.product(range(V), repeat=4)), np.int32)


@pytest.fixture(scope="module")
def params(randomize):
    return MODEL.with_labels(jax.device_put(randomize(MODEL.param_shapes())), CLUSTER)


@pytest.fixture(scope="module")
def logits(params):
    run = jax.jit(MODEL.apply)
    return lambda labels, tokens: np.asarray(run(params, labels, tokens))


@pytest.fixture(scope="module")
def parts(params):
    """What each model says by itself: of clusters in turn, of codes at once."""
    first = jax.jit(MODEL.first.apply)
    second = jax.jit(lambda labels, coarse: MODEL.apply(params, labels, coarse, method="refine")[0])
    coarse_params = {"params": params["params"]["coarse"]}
    return lambda labels, coarse: (
        np.asarray(first(coarse_params, labels, coarse)),
        np.asarray(second(labels, coarse)),
    )


def test_the_law_of_whole_images_sums_to_one_and_is_the_product(logits, parts):
    labels = np.full(len(ALL), 1, np.int32)
    law = logits(labels, ALL)
    np.testing.assert_allclose(np.exp(law).sum(-1), 1, rtol=1e-5)  # also at every place
    of_images = np.take_along_axis(law, ALL[..., None], -1)[..., 0].sum(-1)
    assert np.exp(np.float64(of_images)).sum() == pytest.approx(1, rel=1e-5)

    coarse = CLUSTER[ALL].astype(np.int32)
    turn, once = (np.float64(part) for part in parts(labels, coarse))
    turn = np.exp(turn) / np.exp(turn).sum(-1, keepdims=True)
    once = np.exp(once) * (CLUSTER == coarse[..., None])
    once /= once.sum(-1, keepdims=True)
    want = np.take_along_axis(turn, coarse[..., None], -1)[..., 0] * np.take_along_axis(once, ALL[..., None], -1)[..., 0]
    np.testing.assert_allclose(np.exp(of_images), want.prod(-1), rtol=1e-4)


def test_what_each_model_sees(parts):
    coarse = np.array([[0, 1, 1, 0], [1, 1, 0, 0]], np.int32)
    turn, once = parts(LABELS, coarse)
    for i in range(4):
        changed = coarse.copy()
        changed[:, i] = 1 - changed[:, i]
        other = parts(LABELS, changed)
        np.testing.assert_array_equal(np.abs(other[0] - turn).max((0, 2)) > 1e-6, np.arange(4) > i)
        assert np.all(np.abs(other[1] - once).max(-1) > 1e-6)  # everything, behind it and before
    for mine, others in zip((turn, once), parts((LABELS + 1) % CLASSES, coarse)):
        assert np.all(np.abs(mine - others).max(-1) > 1e-6)


def test_training_keeps_the_clusters(params):
    def loss(params):
        law = MODEL.apply(params, LABELS, ALL[100:102], train=True, rngs={"dropout": jax.random.key(0)})
        return -jnp.take_along_axis(law, ALL[100:102, :, None], -1).mean()

    grads = jax.jit(jax.grad(loss))(params)["params"]
    assert not np.any(grads["cluster"])
    for part in ("coarse", "fine"):
        assert all(np.isfinite(g).all() and np.any(g) for g in jax.tree.leaves(grads[part]))
    np.testing.assert_array_equal(MODEL.apply(params, method="labels_of"), CLUSTER)


def test_the_sampler_is_a_plain_loop(params, parts):
    """Clusters by choices of guided logits plus noise from whole passes, then codes of those clusters; compiled once."""
    sampler, key = CoarseToFineSampler(generator=MODEL, tokenizer=None), jax.random.key(3)
    counts = NextTokenSampler._sample._cache_size(), CoarseToFineSampler._refine._cache_size()
    got = np.asarray(sampler({"generator": params}, key, LABELS, SETTINGS, FINE)[1])

    def choose(mixed, noise, settings):
        mixed = mixed / settings.temperature
        kept = np.argsort(-mixed)[: settings.top_k or None]
        kept = kept[np.isfinite(mixed[kept])]
        if settings.top_p:
            law = np.exp(mixed[kept]) / np.exp(mixed[kept]).sum()
            kept = kept[np.cumsum(law) - law < settings.top_p]
        return kept[np.argmax(mixed[kept] + noise[kept])]

    def mixed(which, coarse, settings):
        null = np.full(2, CLASSES, np.int32)
        return (1 + settings.cfg) * parts(LABELS, coarse)[which] - settings.cfg * parts(null, coarse)[which]

    coarse, tokens = np.zeros((2, 4), np.int32), np.zeros((2, 4), np.int32)
    noise = np.asarray(gumbel(key, jnp.arange(2), jnp.arange(4), K))
    for i in range(4):
        law = mixed(0, coarse, SETTINGS)
        coarse[:, i] = [choose(law[b, i], noise[b, i], SETTINGS) for b in range(2)]
    noise = np.asarray(gumbel(jax.random.fold_in(key, 1), jnp.arange(2), jnp.arange(4), V))
    law = np.where(CLUSTER == coarse[..., None], mixed(1, coarse, FINE), -np.inf)
    for b, i in itertools.product(range(2), range(4)):
        tokens[b, i] = choose(law[b, i], noise[b, i], FINE)
    np.testing.assert_array_equal(got, tokens)

    def sample(labels=LABELS, settings=SETTINGS, fine=FINE, seed=3):
        return np.asarray(sampler({"generator": params}, jax.random.key(seed), labels, settings, fine)[1])

    # Codes follow their own settings, and clusters theirs, over several keys.
    seeds = range(12)
    for change in (dict(cfg=9.0), dict(temperature=9.0), dict(top_k=1)):
        plain = np.stack([sample(seed=s) for s in seeds])
        first = np.stack([sample(settings=SETTINGS._replace(**change), seed=s) for s in seeds])
        second = np.stack([sample(fine=FINE._replace(**change), seed=s) for s in seeds])
        assert np.any(CLUSTER[first] != CLUSTER[plain]) and np.any(second != plain), change
        np.testing.assert_array_equal(CLUSTER[second], CLUSTER[plain])
    assert any(np.any(sample(seed=s) != sample(labels=LABELS[::-1], seed=s)) for s in seeds)
    assert counts == (NextTokenSampler._sample._cache_size() - 1, CoarseToFineSampler._refine._cache_size() - 1)


def test_bad_sizes_and_settings(params):
    for clusters in (0, 6):
        with pytest.raises(ValueError, match=f"clusters={clusters}: expected 1..5"):
            MODEL.clone(clusters=clusters)
    tokenizer = FlexibleTokenizer(ch=8, ch_mult=(1,), groups=4, z_channels=4, vocab=6, width=4, patch_nums=(2,))
    with pytest.raises(ValueError, match=r"generator \(length=4, vocab=5\) does not fit tokenizer \(length=4, vocab=6\)"):
        CoarseToFineSampler(generator=MODEL, tokenizer=tokenizer)
    sampler = CoarseToFineSampler(generator=MODEL, tokenizer=None)
    for settings in ((SETTINGS._replace(top_k=3), FINE), (SETTINGS, FINE._replace(top_k=6))):
        with pytest.raises(ValueError, match="top_k=.: must be in 0.."):
            sampler({"generator": params}, jax.random.key(0), LABELS, *settings)
