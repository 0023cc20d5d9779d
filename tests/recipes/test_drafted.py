"""Draft models of language models: the stages of S046, S099 and S095, and their published sizes."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import cli
from jaxgen import config as config_lib
from jaxgen.decoding import Coupled, KSeq
from jaxgen.generators.sequence_sampler import SequenceSampler
from jaxgen.objectives.distillation import forward_kl, policy_gradient, total_variation, tvd_plus_plus
from jaxgen.objectives.likelihood import cross_entropy
from jaxgen.recipe import modules
from jaxgen.recipes.drafted import DraftedConfig, align_stage, context_stage

CONFIGS = Path(__file__).parents[2] / "configs"
SPECTR, ALIGNED, TRIFORCE = (
    cli.load_config_file(str(CONFIGS / f"{name}.py")) for name in ("spectr", "direct_alignment", "triforce")
)
STAGES = {
    SPECTR: ["generator", "draft"],
    ALIGNED: ["generator", "draft", "align"],
    TRIFORCE: ["generator", "context", "draft"],
}
KEY = jax.random.key(0)


def count(shapes):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def shapes_of(model):
    return jax.eval_shape(model.init, KEY, jax.ShapeDtypeStruct((1, 8), jnp.int32))


@pytest.mark.parametrize("module", STAGES, ids=["spectr", "direct_alignment", "triforce"])
def test_every_variant_builds_and_survives_json(module):
    for variant in module.VARIANTS:
        recipe = module.get_config(variant)
        assert [stage.name for stage in recipe.stages] == STAGES[module] and recipe.modality == "text"
        assert all(stage.steps > 0 for stage in recipe.stages)
        assert config_lib.from_json(config_lib.to_json(recipe.config)) == recipe.config
    with pytest.raises(ValueError, match="variant 'huge' is not one of"):
        module.get_config("huge")
    with pytest.raises(ValueError, match="budget 'huge' is not one of smoke, small"):
        module.claim("huge")


def test_published_sizes():
    """Llama 2 7B, the draft models of 68 and 115 million weights, and how they are used."""
    sizes = {}
    for module in STAGES:
        config = module.get_config("paper").config
        assert count(shapes_of(config.build_model())) == 6_738_415_616
        sizes[module] = count(shapes_of(config.draft.build()))
    assert sizes[SPECTR] == sizes[TRIFORCE] == 68_030_208
    # The authors' 115M and "1.64%"; two matrices of the vocabulary, and the four layers of their table 1.
    assert sizes[ALIGNED] == 2 * 32000 * 1024 + 4 * (4 * 1024**2 + 3 * 1024 * 2816 + 2 * 1024) + 1024
    spectr = SPECTR.get_config("paper").config.method()
    assert (spectr.topology.drafts, len(spectr.topology.levels), spectr.rule) == (64, 8, KSeq())
    triforce = TRIFORCE.get_config("paper").config.method()
    assert (triforce.length, triforce.budget, triforce.chunk) == (6, 4096, 8)
    assert triforce.sink + triforce.window + triforce.length == 256


def test_the_published_sizes_fit_together():
    """The samplers and the distillation of the paper's sizes are traced, not run."""
    for module in (SPECTR, TRIFORCE):
        config = module.get_config("paper").config
        params = {"generator": shapes_of(config.build_model()), "draft": shapes_of(config.draft.build())}
        sampler, prompt = config.build_sampler(), jax.ShapeDtypeStruct((1, 5000), jnp.int32)
        settings = (jnp.float32(0.6), jnp.int32(0), jnp.float32(0.9))
        length = jnp.full((1,), 5000)
        result = jax.eval_shape(lambda p, t: sampler._sample(p, KEY, t, length, 5016, settings), params, prompt)  # noqa: B023
        assert result.tokens.shape == (1, 5016)
    config = ALIGNED.get_config("paper").config
    stage = config.recipe().stage("align")
    frozen = {name: {name: shapes_of(m)} for name, m in (("generator", config.build_model()), ("draft", config.draft.build()))}
    params, state = jax.eval_shape(stage.init, KEY, frozen)
    batch = {"tokens": jax.ShapeDtypeStruct((1024, 4097), jnp.int32)}
    value, (_, after) = jax.eval_shape(stage.loss, params, state, batch, KEY, jnp.int32(0), frozen)
    assert value.shape == () and after["pool"].shape == state["pool"].shape == (1024, 4097)


@pytest.fixture(scope="module")
def aligned(randomize):
    """(config, frozen parameters by stage, a batch) of the smallest pair."""
    config = ALIGNED.get_config("smoke").override(["align.temperatures=0.5,1.5"]).config
    frozen = {
        name: {name: jax.device_put(randomize(shapes_of(model), seed))}
        for seed, (name, model) in enumerate((("generator", config.build_model()), ("draft", config.draft.build())))
    }
    batch = next(iter(align_stage(config).data(0, 1)))
    return config, frozen, {name: jnp.asarray(value) for name, value in batch.items()}


@pytest.fixture(scope="module")
def update(aligned):
    """(the stage's first state, a jitted step of gradient descent)."""
    config, frozen, batch = aligned
    stage = align_stage(config)
    loss = jax.value_and_grad(stage.loss, has_aux=True)

    @jax.jit
    def update(params, state, key, step, rate):
        (_, (metrics, state)), grads = loss(params, state, batch, key, step, frozen)
        return jax.tree.map(lambda p, g: p - rate * g, params, grads), state, metrics["acceptance"]

    return stage.init(KEY, frozen), update


@pytest.mark.slow
def test_responses_are_the_targets_and_made_anew_in_time(aligned, update):
    config, frozen, batch = aligned
    assert batch["tokens"].shape == (8, 33)
    ((params, state), update), pools = update, []
    for step in range(4):
        _, state, accepted = update(params, state, jax.random.fold_in(KEY, step), step, 0.0)
        assert 0 < accepted < 1
        pools.append(np.asarray(state["pool"]))
    same = [np.array_equal(a, b) for a, b in zip(pools, pools[1:])]
    assert same == [True, True, False]  # refresh=3
    # Plain sampling with the same key, one temperature after another.
    sampler = SequenceSampler(model=config.build_model())
    key, prompt = jax.random.split(jax.random.fold_in(KEY, 0), 3)[0], batch["tokens"][:, : config.align.prompt]
    for i, temperature in enumerate((0.5, 1.5)):
        want = sampler(modules(frozen), key, prompt, max_length=33, temperature=temperature).tokens
        np.testing.assert_array_equal(pools[0][i::2], want[i::2])


@pytest.mark.slow
def test_losses_are_those_of_the_objectives(aligned):
    """On the text itself, where nothing has to be sampled by the target."""
    config, frozen, batch = aligned
    tokens = batch["tokens"][:4]
    models = {"draft": config.draft.build(), "generator": config.build_model()}
    q, p = (model.apply(frozen[name][name], tokens[:, :-1]) for name, model in models.items())
    drawn = jax.random.categorical(jax.random.split(KEY, 3)[2], q)
    want = {
        ("likelihood", False): cross_entropy(q, tokens[:, 1:]),
        ("kl", False): forward_kl(q, p),
        ("tvd", False): total_variation(q, p),
        ("tvd++", False): tvd_plus_plus(q, p),
        ("tvd", True): policy_gradient(q, p, drawn, normalise=False),
        ("tvd++", True): policy_gradient(q, p, drawn),
    }
    for (loss, sampled), values in want.items():
        options = dataclasses.replace(config.align, loss=loss, sampled=sampled, share=0.0)
        stage = align_stage(dataclasses.replace(config, align=options))
        state = {"pool": jnp.zeros((8, 33), jnp.int32), "round": jnp.int32(-1)}
        got, (metrics, _) = stage.loss(frozen["draft"], state, batch, KEY, jnp.int32(0), frozen)
        np.testing.assert_allclose(got, values.mean(), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(metrics["acceptance"], 1 - total_variation(q, p).mean(), rtol=1e-5)
    evaluated = stage.eval_loss(frozen["draft"], (), {"tokens": tokens}, KEY, frozen)
    for name, value in (("loss", want["tvd", False]), ("kl", want["kl", False]), ("nll", want["likelihood", False])):
        np.testing.assert_allclose(evaluated[name], value.mean(), rtol=1e-4)


@pytest.mark.slow
def test_alignment_raises_acceptance(update):
    """A few large steps on one pool."""
    ((params, state), update), accepted = update, []
    for i in range(60):
        params, state, share = update(params, state, jax.random.fold_in(KEY, i), 0, 0.3)
        accepted.append(float(share))
    assert np.mean(accepted[-5:]) > np.mean(accepted[:5]) + 0.05


@pytest.mark.slow
def test_later_stages_start_from_earlier_ones(randomize):
    """The context's stage goes on with the target, on longer examples, and its weights are the ones sampled from."""
    config = TRIFORCE.get_config("smoke").config
    generator = {"generator": randomize(shapes_of(config.build_model()))}
    stage = context_stage(config)
    params, _ = stage.init(KEY, {"generator": generator})
    jax.tree.map(np.testing.assert_array_equal, params, generator)
    assert next(iter(stage.data(0, 1)))["tokens"].shape[1] == 49 and config.data.length == 32
    assert config.recipe().stage("draft").data(0, 1) is not None
    assert modules({"generator": {"generator": 1}, "context": {"generator": 2}})["generator"] == 2


def test_options_reach_the_method():
    def method(*edits):
        return SPECTR.get_config("smoke").override(edits).config.method()

    assert method().topology.drafts == 16 and method("drafting.paths=2", "drafting.length=3").topology.drafts == 6
    coupled = method("drafting.paths=1", "drafting.rule=coupled")
    assert coupled.rule == Coupled() and coupled.coupled and not coupled.replacement


@pytest.mark.parametrize(
    "module, edit, words",
    [
        (SPECTR, "drafting.rule=best", "drafting.rule='best': expected one of k_seq, rejection, coupled"),
        (SPECTR, "drafting.rule=coupled", "drafting.paths=4: independent paths cannot share"),
        (SPECTR, "drafting.length=0", "drafting.length=0: expected at least 1"),
        (SPECTR, "draft.vocab=300", "draft.vocab=300: drafts are the target's tokens, model.vocab=256"),
        (ALIGNED, "align.loss=mse", "align.loss='mse': expected one of likelihood, kl, tvd, tvd\\+\\+"),
        (ALIGNED, "align.share=1.5", "align.share=1.5: expected a share"),
        (ALIGNED, "align.temperatures=0.0,1.0", "align.temperatures=\\(0.0, 1.0\\): expected numbers > 0"),
        (ALIGNED, "align.pool=3", "align.pool=3: expected at least align.batch_size=4"),
        (ALIGNED, "align.prompt=33", "align.prompt=33: responses need room in data.length=32"),
        (TRIFORCE, "sparse.budget=9", "sparse.chunk=4: must divide budget=9"),
        (TRIFORCE, "sparse.recent=3", "sparse.chunk=4: must divide budget=8 and be at most recent=3"),
        (TRIFORCE, "context.length=0", "context.length=0: expected at least 1"),
    ],
)
def test_fields_are_checked(module, edit, words):
    with pytest.raises(ValueError, match=words):
        module.get_config("smoke").override([edit])


def test_only_estimates_are_sampled():
    with pytest.raises(ValueError, match="align.sampled=True: only 'tvd' and 'tvd\\+\\+'"):
        ALIGNED.get_config("smoke").override(["align.sampled=true", "align.loss=kl"])
    assert isinstance(ALIGNED.get_config("smoke").config, DraftedConfig)
