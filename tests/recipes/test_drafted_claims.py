"""The measurements of S046, S099 and S095; training and timing are stubs."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import cli
from jaxgen.decoding.verify import KSeq, Level, Rejection
from jaxgen.recipes import claims, drafted_claims

CONFIGS = Path(__file__).parents[2] / "configs"


def load(name):
    return cli.load_config_file(str(CONFIGS / f"{name}.py"))


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 3])
def test_acceptances_are_those_of_the_rules(k):
    """Against the rules themselves on drafts drawn from one pair of laws."""
    rng = np.random.default_rng(0)
    p, q = rng.normal(0, 1.2, (2, 5)).astype(np.float32)
    n = 20_000
    tokens = jax.random.categorical(jax.random.key(0), jnp.asarray(q), shape=(n, k))
    log_p, log_q = (jnp.broadcast_to(jax.nn.log_softmax(x), (n, *(k,) * i, 5)) for i, x in enumerate((p, q)))
    level = Level(log_p, tokens, log_q, jnp.ones((n, k), bool), jax.random.uniform(jax.random.key(1), (n, k)), jnp.zeros((n, 5)))
    exact = drafted_claims.acceptances(p[None], q[None], k)
    for name, rule in (("K-SEQ", KSeq()), ("recursive", Rejection())):
        share = float((rule(level)[0] >= 0).mean())
        assert abs(share - exact[name]) < 4 * (exact[name] * (1 - exact[name]) / n) ** 0.5
    assert exact["K-SEQ"] <= exact["bound"] + 1e-9 and exact["recursive"] <= exact["bound"] + 1e-9
    if k == 1:
        overlap = np.minimum(*(np.asarray(jax.nn.softmax(x)) for x in (p, q))).sum()
        np.testing.assert_allclose(list(exact.values()), overlap, rtol=1e-5)


@pytest.fixture
def seen(monkeypatch, randomize):
    """Random weights in place of trained ones; times in place of measured ones."""
    seen = {"given": [], "samplers": []}

    def weights(model, seed=0):
        return randomize(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32)), seed)

    def trained(config, seed, log):
        seen["base"] = type(config).__name__
        return None, {"generator": {"generator": weights(config.build_model())}}

    def train_all(config, seed, given, log):
        seen["given"].append((sorted(given), getattr(getattr(config, "align", None), "loss", None), seed))
        new = {} if "draft" in given else {"draft": {"draft": weights(config.draft.build(), 1)}}
        if hasattr(config, "align"):
            new["align"] = {"draft": weights(config.draft.build(), 2 + seed)}
        return None, given | new, {}

    def compare(samplers, params, prompts, *, new_tokens, repeats, baseline="plain", **settings):
        seen["samplers"].append((list(samplers), prompts.shape, new_tokens, repeats))
        return [{"method": name, "tokens a target call": 1.0 + i, "speed-up, batch 1": 2.0} for i, name in enumerate(samplers)]

    monkeypatch.setattr(claims, "trained", trained)
    monkeypatch.setattr(claims, "train_all", train_all)
    monkeypatch.setattr(drafted_claims, "compare_samplers", compare)
    return seen


@pytest.mark.slow
def test_selection_is_compared(seen):
    rows, exact = load("spectr").claim("smoke", seeds=1, log=lambda line: None)
    names = ["plain", "one chain", "2 chains, K-SEQ", "2 chains, recursive"]
    assert [row["method"] for row in rows.rows] == names == seen["samplers"][0][0]
    assert seen["base"] == "LanguageConfig" and seen["given"] == [(["generator"], None, 0)]
    assert "2 chains, recursive, 2.00 times those of one chain" in rows.notes
    one, *more = exact.rows
    assert one["K-SEQ"] == one["recursive"] == one["bound"] and [row["drafts"] for row in more] == [2, 4, 8]
    for fewer, row in zip(exact.rows, more):
        assert fewer["K-SEQ"] < row["K-SEQ"] <= row["bound"] and fewer["recursive"] < row["recursive"] <= row["bound"]


@pytest.mark.slow
def test_alignment_is_compared(seen):
    (claim,) = load("direct_alignment").claim("smoke", seeds=2, log=lambda line: None)
    losses = ["likelihood", "kl", "tvd", "tvd++", "tvd", "tvd++"]
    aligned = [(["draft", "generator"], loss, seed) for loss in losses for seed in (0, 1)]
    assert seen["given"] == [(["generator"], None, 0), *aligned]
    assert len(claim.rows) == 7 and claim.rows[0]["loss"] == "none"
    assert claim.rows[0]["acceptance on text"] != claim.rows[1]["acceptance on text"]
    assert claim.rows[1]["block efficiency, 3 drafts"] == "2 (0)" and claim.rows[0]["speed-up, 3 drafts"] == 2.0
    with pytest.raises(ValueError, match="seeds=0"):
        load("direct_alignment").claim("smoke", seeds=0)


@pytest.mark.slow
def test_levels_and_caches_are_compared(seen):
    """With room for the whole prompt a sparse cache is the full one; with less it is not."""
    levels, caches = load("triforce").claim("smoke", seeds=1, log=lambda line: None)
    assert [row["method"] for row in levels.rows] == ["plain", "draft model, 3 drafts", "TriForce", "TriForce, all of the cache"]
    assert seen["samplers"][0][1:] == ((2, 40), 8, 1)
    whole = caches.rows[-1]
    assert whole == {"positions of the prompt": 40, "acceptance, retrieved": 1, "acceptance, first and last": 1}
    assert all(value < 1 for name, value in caches.rows[0].items() if name != "positions of the prompt")


def test_small_budgets_measure_the_small_variants(monkeypatch):
    seen = {}

    def noted(name):
        return lambda config, **settings: seen.update({name: (config, settings)}) or [name]

    for name in ("compare_selection", "compare_alignment", "compare_levels", "compare_caches"):
        monkeypatch.setattr(drafted_claims, name, noted(name))
    measured = {"spectr": "compare_selection", "direct_alignment": "compare_alignment", "triforce": "compare_levels"}
    for name, called in measured.items():
        module = load(name)
        module.claim("small", seeds=2, edits=["data.seed=3"])
        want = module.get_config("small").config
        assert seen[called][0] == dataclasses.replace(want, data=dataclasses.replace(want.data, seed=3))
    assert seen["compare_alignment"][1]["seeds"] == 2 and seen["compare_alignment"][1]["lengths"] == (3, 5)
