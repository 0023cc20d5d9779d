"""RAR's published layout against the authors' own outputs."""

import jax
import numpy as np
import pytest

from jaxgen.generators import next_token_sampler
from jaxgen.interop import rar
from jaxgen.interop.files import read_state_dict, write_safetensors

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]


@pytest.fixture(scope="module")
def path(shared):
    return str(shared / "fixtures" / "rar" / "dev_rar.bin")


@pytest.fixture(scope="module")
def reference(shared):
    return dict(np.load(shared / "fixtures" / "rar" / "dev.npz"))


@pytest.fixture(scope="module")
def model(path):
    return rar.load(generator=path)


def test_logits_in_raster_and_other_orders(model, reference):
    generator = model.generator
    assert (generator.heads, generator.length, generator.vocab, model.num_classes) == (2, 16, 48, 4)
    labels, tokens, orders = (reference[name] for name in ("labels", "tokens", "orders"))
    np.testing.assert_allclose(model.logits(labels, tokens), reference["logits"], atol=1e-5)
    np.testing.assert_allclose(model.logits([4] * 3, tokens), reference["logits_uncond"], atol=1e-5)
    np.testing.assert_allclose(model.logits(labels, tokens, orders), reference["logits_permuted"], atol=1e-5)
    np.testing.assert_array_equal(np.take_along_axis(tokens, orders, 1), reference["labels_permuted"])
    loss = jax.jit(generator.apply)(model.params["generator"], labels, tokens, orders)
    np.testing.assert_allclose(loss, reference["logits_permuted"][:, :-1], atol=1e-5)


def test_greedy_samples_and_one_trace(model, reference, monkeypatch):
    traces, original = [], next_token_sampler.sample_tokens
    monkeypatch.setattr(next_token_sampler, "sample_tokens", lambda *a, **k: traces.append(1) or original(*a, **k))
    for name, options in {
        "greedy_cfg4_pow1": dict(cfg=4.0, power=1.0),
        "greedy_cfg3_pow2p75": dict(cfg=3.0, power=2.75),
        "greedy_cfg0": dict(cfg=0.0),
    }.items():
        tokens = model.sample(jax.random.key(0), reference["labels"], top_k=1, **options)
        np.testing.assert_array_equal(tokens, reference[name], err_msg=name)
    plain = model.sample(jax.random.key(0), reference["labels"], temperature=2.0)
    assert (np.asarray(plain) != np.asarray(model.sample(jax.random.key(1), reference["labels"], temperature=2.0))).any()
    assert len(traces) <= 1


def test_what_is_saved_is_what_was_read(model, path, tmp_path):
    saved = str(tmp_path / "rar.safetensors")
    model.save(generator=saved)
    want, got = read_state_dict(path), read_state_dict(saved)
    assert {name: x.shape for name, x in got.items()} == {name: x.shape for name, x in want.items()}
    # What no model reads: the mask token and positions beyond the image.
    read = {
        "embeddings.weight": np.r_[:48, 49:54],
        "pos_embed": np.r_[:18],
        "target_aware_pos_embed": np.r_[2:18],
        "timesteps_embeddings": np.r_[:18],
    }
    for name in want:
        rows = read.get(name, slice(None))
        axis = 1 if name.endswith("embed") or name.endswith("embeddings") else 0
        a, b = (np.moveaxis(x, axis, 0)[rows] for x in (got[name], want[name]))
        np.testing.assert_array_equal(a, b, err_msg=name)
    again = rar.load(generator=saved)
    assert again.generator == model.generator
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_unscanned_blocks_hold_the_same(model, path):
    plain = rar.load(generator=path, scan_layers=False).params["generator"]["params"]["transformer"]
    stacked = model.params["generator"]["params"]["transformer"]["blocks"]
    for i in range(2):
        jax.tree.map(np.testing.assert_array_equal, plain[f"blocks_{i}"], jax.tree.map(lambda x, i=i: x[i], stacked))


def test_bad_input(model, path, tmp_path):
    tokens = np.zeros((1, 16), int)
    with pytest.raises(ValueError, match="tokens span 0..48; the vocabulary is 0..47"):
        model.logits([0], tokens + np.eye(16, dtype=int)[:1] * 48)
    with pytest.raises(ValueError, match=r"expected integers \[b, 16\]"):
        model.logits([0], tokens[:, :15])
    with pytest.raises(ValueError, match=r"orders \(1, 16\): .*permutation"):
        model.logits([0], tokens, tokens)
    with pytest.raises(ValueError, match="label 5 is out of range 0..4"):
        model.sample(jax.random.key(0), [5])
    with pytest.raises(ValueError, match="power=0: must be > 0"):
        model.sample(jax.random.key(0), [0], power=0)
    with pytest.raises(ValueError, match="cfg=nan: must be finite"):
        model.sample(jax.random.key(0), [0], cfg=np.nan)
    state = read_state_dict(path) | {"blocks.0.extra": np.zeros(3, np.float32)}
    state.pop("cls_token")
    odd = str(tmp_path / "odd.safetensors")
    write_safetensors(odd, state)
    with pytest.raises(ValueError, match="odd.safetensors: .*unknown names: blocks.0.extra"):
        rar.load(generator=odd)
    state.pop("blocks.0.extra")
    write_safetensors(odd, state)
    with pytest.raises(ValueError, match="missing: start .cls_token"):
        rar.load(generator=odd)
