"""NAR's published layout against the authors' own outputs."""

import jax
import numpy as np
import pytest

from jaxgen.interop import nar
from jaxgen.interop.files import read_state_dict, write_safetensors

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]


@pytest.fixture(scope="module")
def path(shared):
    return str(shared / "fixtures" / "nar" / "dev_gpt.pt")


@pytest.fixture(scope="module")
def reference(shared):
    return dict(np.load(shared / "fixtures" / "nar" / "dev.npz"))


@pytest.fixture(scope="module")
def model(path):
    return nar.load(generator=path, num_heads=2, grid=4)


def test_logits_and_greedy_samples(model, reference):
    sizes = (model.generator.depth, model.generator.head_depth, model.generator.hidden, model.num_classes)
    assert sizes == (2, 1, 96, 4) and model.generator.order.steps == 7
    labels = reference["labels"]
    np.testing.assert_allclose(model.logits(labels, reference["tokens"]), reference["logits"], atol=1e-4)
    null = np.full_like(labels, 4)
    np.testing.assert_allclose(model.logits(null, reference["tokens"]), reference["logits_uncond"], atol=1e-4)
    logits = model.logits(labels, reference["greedy_cfg1"])
    np.testing.assert_allclose(logits, reference["greedy_cfg1_logits"], atol=1e-4)
    for cfg, name in ((1.0, "greedy_cfg1"), (2.0, "greedy_cfg2")):
        images, tokens = model.sample(jax.random.key(0), labels, cfg=cfg, top_k=1)
        assert images is None
        np.testing.assert_array_equal(tokens, reference[name])


def test_what_is_saved_is_what_was_read(model, path, tmp_path):
    copy = str(tmp_path / "nar.safetensors")
    model.save(generator=copy)
    want, got = read_state_dict(path, "model"), read_state_dict(copy)
    assert set(want) == set(got)
    for key in got:
        np.testing.assert_array_equal(got[key], want[key], err_msg=key)
    again = nar.load(generator=copy, num_heads=2, grid=4)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_blocks_may_stay_apart(path, model):
    """Not scanned, and with both of the last blocks before the head that looks down."""
    apart = nar.load(generator=path, num_heads=2, grid=4, scan_layers=False, head_depth=2)
    assert (apart.generator.depth, apart.generator.head_depth) == (1, 2)
    mine = apart.params["generator"]["params"]
    theirs = model.params["generator"]["params"]["transformer"]["blocks"]["mlp"]["w2"]["kernel"]
    np.testing.assert_array_equal(mine["stacks_0"]["blocks_0"]["mlp"]["w2"]["kernel"], theirs[1])


def test_bad_input(model, path, tmp_path):
    with pytest.raises(ValueError, match="head_depth=3: .* has 3 blocks"):
        nar.load(generator=path, num_heads=2, head_depth=3)
    with pytest.raises(ValueError, match="tokens span 0..48; the vocabulary is 0..47"):
        model.logits([0], np.array([[0, 1, 2, 48]]))
    for call in (lambda: model.decode(np.zeros((1, 4), int)), lambda: model.encode(np.zeros((1, 4, 4, 3), np.float32))):
        with pytest.raises(ValueError, match="tokenizer=None"):
            call()
    state = read_state_dict(path, "model") | {"layers.2.extra": np.zeros(3, np.float32)}
    state.pop("medusa_norm.weight")
    odd = str(tmp_path / "odd.safetensors")
    write_safetensors(odd, state)
    with pytest.raises(ValueError, match="unknown names: medusa_layers.0.extra.*missing.*medusa_norm"):
        nar.load(generator=odd, num_heads=2)
