"""Images through `speculate`: the coupled rule gives one and the same picture for every proposer, guidance included."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import Coupled, Jacobi, NGram, Sequential, Settings, branches, gumbel
from jaxgen.decoding.relaxed import Grouped
from jaxgen.decoding.speculate import BROKEN, FULL
from jaxgen.generators import NextTokenTransformer
from jaxgen.generators.speculative_image_sampler import Draft, SpeculativeImageSampler
from jaxgen.tokenizers import MultiScaleTokenizer

pytestmark = pytest.mark.usefixtures("quick_compiles")

VOCAB, CLASSES, SIDE = 12, 3, 3
LENGTH = SIDE * SIDE
LABELS = np.array([0, 2, 1, 3], np.int32)
SETTINGS = Settings(cfg=1.5, temperature=0.8, top_k=9, top_p=0.95)
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def world(randomize):
    tokenizer = MultiScaleTokenizer(
        ch=4, ch_mult=(1, 2), res_blocks=1, attention=False, groups=2, vocab=VOCAB, width=4, patch_nums=(SIDE,), channels=1
    )
    sizes = dict(vocab=VOCAB, num_classes=CLASSES, length=LENGTH)
    generator = NextTokenTransformer(**sizes, width=16, heads=2, depth=2)
    draft = NextTokenTransformer(**sizes, width=8, heads=2, depth=1)
    tokens, labels = jnp.zeros((1, LENGTH), jnp.int32), jnp.zeros((1,), jnp.int32)
    image = jax.ShapeDtypeStruct((1, *tokenizer.image_size, 1), jnp.float32)
    params = {"tokenizer": randomize(jax.eval_shape(tokenizer.init, jax.random.key(0), image))}
    for seed, (name, module) in enumerate({"generator": generator, "draft": draft}.items(), 1):
        params[name] = randomize(jax.eval_shape(module.init, jax.random.key(0), labels, tokens), seed)

    def sampler(proposer):
        return SpeculativeImageSampler(generator=generator, tokenizer=tokenizer, proposer=proposer)

    world = types.SimpleNamespace(tokenizer=tokenizer, generator=generator, draft=draft, sampler=sampler)
    world.params = jax.device_put(params)
    world.plain = sampler(Sequential())
    return world


@pytest.mark.slow
def test_no_drafts_is_the_python_loop(world):
    """Guided laws by full forwards, cut and sampled in NumPy with the noise of position i + 1."""
    got = world.plain(world.params, KEY, LABELS, SETTINGS, Coupled())
    forward = jax.jit(world.generator.apply)
    noise = np.asarray(gumbel(KEY, jnp.arange(len(LABELS)), 1 + jnp.arange(LENGTH), VOCAB))
    tokens = np.zeros((len(LABELS), LENGTH), np.int32)
    for i in range(LENGTH):
        laws = [
            np.float64(forward(world.params["generator"], labels, tokens)[:, i])
            for labels in (LABELS, np.full_like(LABELS, CLASSES))
        ]
        logits = ((1 + SETTINGS.cfg) * laws[0] - SETTINGS.cfg * laws[1]) / SETTINGS.temperature
        for b in range(len(LABELS)):
            order = np.argsort(-logits[b])[: SETTINGS.top_k]
            law = np.exp(logits[b, order]) / np.exp(logits[b, order]).sum()
            order = order[np.cumsum(law) - law < SETTINGS.top_p]
            tokens[b, i] = order[np.argmax(logits[b, order] + noise[b, i, order])]
    np.testing.assert_array_equal(got.tokens, tokens)
    assert (np.asarray(got.status) == FULL).all() and (np.asarray(got.row_calls) == LENGTH).all() and int(got.calls) == LENGTH
    images = world.tokenizer.apply(world.params["tokenizer"], jnp.asarray(tokens), method="decode")
    np.testing.assert_allclose(got.images, images, atol=1e-5)


PROPOSERS = {
    "Jacobi": lambda w: Jacobi(4, coupled=True, initial="repeat_above", width=SIDE),
    "chain": lambda w: Draft(w.draft, branches((1, 1)), coupled=True),
    "tree": lambda w: Draft(w.draft, branches((2, 2)), coupled=True),
    "n-gram": lambda w: NGram(2, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROPOSERS)
def test_the_coupled_rule_gives_the_same_pictures_in_fewer_calls(world, name):
    labels = np.arange(24, dtype=np.int32) % (CLASSES + 1)
    want = world.plain(world.params, KEY, labels, SETTINGS, Coupled())
    got = world.sampler(PROPOSERS[name](world))(world.params, KEY, labels, SETTINGS, Coupled())
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.images, want.images, atol=1e-5)
    assert (np.asarray(got.row_calls) <= LENGTH).all() and got.row_calls.mean() < LENGTH


@pytest.mark.slow
def test_settings_and_thresholds_share_a_program(world):
    """And each changes something."""
    sampler, count = world.sampler(Jacobi(3)), SpeculativeImageSampler._sample._cache_size
    codebook = jax.random.normal(jax.random.key(0), (VOCAB, 4))

    def run(settings=SETTINGS, **fields):
        return sampler(world.params, KEY, LABELS, settings, Grouped(codebook, p_radius=0.02, **fields))

    usual, before = run(), count()
    for change in ({"cfg": 6.0}, {"temperature": 3.0}, {"top_k": 1}, {"top_p": 0.1}):
        assert np.any(run(SETTINGS._replace(**change)).tokens != usual.tokens), change
    assert np.any(run(d_radius=1e3).tokens != usual.tokens)
    assert count() == before
    # A row does not depend on its batch.
    alone = sampler(world.params, KEY, LABELS[:2], SETTINGS, Grouped(codebook, p_radius=0.02))
    np.testing.assert_array_equal(alone.tokens, usual.tokens[:2])


def test_rows_without_numbers_are_reported(world):
    """A class whose embedding is not a number stops its rows; the others go on."""
    table = world.params["generator"]["params"]["class_embed"]["embedding"]
    broken = dict(world.params["generator"]["params"], class_embed={"embedding": table.at[2].set(jnp.nan)})
    params = world.params | {"generator": {"params": broken}}
    got = world.plain(params, KEY, LABELS, SETTINGS, Coupled())
    want = world.plain(world.params, KEY, LABELS, SETTINGS, Coupled())
    np.testing.assert_array_equal(np.asarray(got.status) == BROKEN, LABELS == 2)
    np.testing.assert_array_equal(np.asarray(got.tokens)[LABELS != 2], np.asarray(want.tokens)[LABELS != 2])


def test_bad_input(world):
    with pytest.raises(ValueError, match="label 4 is out of range 0..3"):
        world.plain(world.params, KEY, [4], SETTINGS)
    with pytest.raises(ValueError, match="temperature=0"):
        world.plain(world.params, KEY, LABELS, Settings(temperature=0.0))
    with pytest.raises(ValueError, match=r"draft \(length=9, vocab=5\) does not fit tokenizer \(length=9, vocab=12\)"):
        world.sampler(Draft(world.draft.clone(vocab=5), branches((1,))))
    with pytest.raises(ValueError, match="draft has num_classes=7; the generator has 3"):
        world.sampler(Draft(world.draft.clone(num_classes=7), branches((1,))))
