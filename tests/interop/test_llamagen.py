"""LlamaGen's published layout against the authors' own outputs, and what a caption model's file looks like."""

import jax
import numpy as np
import pytest

from jaxgen.generators import ImageLlama
from jaxgen.interop import llamagen
from jaxgen.interop.files import read_state_dict, write_safetensors
from jaxgen.interop.mapping import to_torch
from jaxgen.nn import Context

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]


@pytest.fixture(scope="module")
def files(shared):
    folder = shared / "fixtures" / "llamagen"
    return dict(generator=str(folder / "c2i_gpt.pt"), tokenizer=str(folder / "c2i_vq.pt"))


@pytest.fixture(scope="module")
def reference(shared):
    return dict(np.load(shared / "fixtures" / "llamagen" / "c2i.npz"))


@pytest.fixture(scope="module")
def model(files):
    return llamagen.load(**files, num_heads=4)


def test_tokens_logits_reconstruction_and_greedy_samples(model, reference):
    assert (model.generator.grid, model.generator.kv_heads, model.num_classes) == (8, 4, 5)
    np.testing.assert_array_equal(model.encode(reference["images"]), reference["tokens"])
    logits = model.logits(reference["cond"], reference["tokens"])
    np.testing.assert_allclose(logits, reference["logits"], atol=1e-4)
    # A 16 x 16 image through a dozen convolutions; the reference is not clipped.
    np.testing.assert_allclose(model.decode(reference["tokens"]), np.clip(reference["reconstruction"], -1, 1), atol=5e-5)
    _, tokens = model.sample(jax.random.key(0), reference["cond"], cfg=2.0, top_k=1)
    np.testing.assert_array_equal(tokens, reference["greedy_cfg2"])


def test_what_is_saved_is_what_was_read(model, files, tmp_path):
    paths = {name: str(tmp_path / f"{name}.safetensors") for name in files}
    model.save(**paths)
    for name, path in paths.items():
        want, got = read_state_dict(files[name], "model"), read_state_dict(path)
        assert {n for n in want if "kv_cache" not in n} == set(got)
        for key in got:
            if key != "quantize.codebook_used":
                np.testing.assert_array_equal(got[key], want[key], err_msg=key)
    again = llamagen.load(**paths, num_heads=4, grid=8)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_a_caption_model_goes_out_and_comes_back(randomize, tmp_path):
    module = ImageLlama(
        vocab=7, grid=3, width=32, heads=4, depth=2, kv_heads=2, hidden=32, caption_width=6, prefix=4, scan_layers=True
    )
    params = randomize(module.param_shapes())
    tensors = llamagen._split_gates(to_torch(params["params"], llamagen.generator_rules(module)))
    assert tensors["layers.1.attention.wqkv.weight"].shape == (32 + 2 * 16, 32)
    assert tensors["cls_embedding.cap_proj.fc1.weight"].shape == (32, 6)
    path = str(tmp_path / "t2i.safetensors")
    write_safetensors(path, tensors)
    found, variables = llamagen.load_generator(path, num_heads=4, grid=3)
    assert found == module
    jax.tree.map(np.testing.assert_array_equal, variables, params)


def published_logits(x, module, features, mask, tokens):
    """The authors' forward pass in float64, on tensors under their names: features padded on the left, a mask over valid text
    that spares the diagonal, rotations of rows and columns, and none, but zeros, for the text."""
    n, heads, groups, d = module.prefix, module.heads, module.kv_heads, module.width
    size = d // heads

    def norm(h, weight):
        return h / np.sqrt((h * h).mean(-1, keepdims=True) + 1e-5) * weight

    def gelu(h):
        return 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))

    told = gelu(features @ x["cls_embedding.cap_proj.fc1.weight"].T) @ x["cls_embedding.cap_proj.fc2.weight"].T
    h = np.concatenate([told, x["tok_embeddings.weight"][tokens[:, :-1]]], axis=1)
    length = h.shape[1]
    rates = 10000.0 ** (-np.arange(0, size // 2, 2) / (size // 2))
    cells = np.indices((module.grid, module.grid)).reshape(2, -1).T
    angles = np.concatenate([cells[:, :1] * rates, cells[:, 1:] * rates], axis=1)
    turn = np.concatenate([np.zeros((n, size // 2)), np.exp(1j * angles)])[:length, None]
    seen = np.tril(np.ones((length, length), bool)) & np.pad(mask, ((0, 0), (0, length - n)), constant_values=True)[:, None]
    seen |= np.eye(length, dtype=bool)

    def rotated(q):
        q = (q[..., ::2] + 1j * q[..., 1::2]) * turn
        return np.stack([q.real, q.imag], axis=-1).reshape(*q.shape[:-1], size)

    for i in range(module.depth):
        w = {name.removeprefix(f"layers.{i}."): a for name, a in x.items() if name.startswith(f"layers.{i}.")}
        qkv = norm(h, w["attention_norm.weight"]) @ w["attention.wqkv.weight"].T
        q, k, v = np.split(qkv.reshape(*h.shape[:2], -1, size), [heads, heads + groups], axis=2)
        q, k, v = rotated(q), rotated(k).repeat(heads // groups, axis=2), v.repeat(heads // groups, axis=2)
        scores = np.where(seen[:, None], np.einsum("bqhk,bshk->bhqs", q, k) / size**0.5, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        read = np.einsum("bhqs,bshk->bqhk", weights / weights.sum(-1, keepdims=True), v).reshape(*h.shape[:2], d)
        h = h + read @ w["attention.wo.weight"].T
        y = norm(h, w["ffn_norm.weight"])
        gate = y @ w["feed_forward.w1.weight"].T
        h = h + (gate / (1 + np.exp(-gate)) * (y @ w["feed_forward.w3.weight"].T)) @ w["feed_forward.w2.weight"].T
    return (norm(h, x["norm.weight"]) @ x["output.weight"].T)[:, n - 1 :]


def test_captions_are_read_as_published(randomize, tmp_path):
    module = ImageLlama(
        vocab=7, grid=3, width=32, heads=4, depth=2, kv_heads=2, hidden=32, caption_width=6, prefix=4, scan_layers=True
    )
    params = randomize(module.param_shapes())
    tensors = llamagen._split_gates(to_torch(params["params"], llamagen.generator_rules(module)))
    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(0, 7, (3, 9)), np.array([[False] * 3 + [True], [False, True, True, True], [True] * 4])
    features = rng.standard_normal((3, 4, 6)) * mask[..., None]
    want = published_logits({name: np.float64(x) for name, x in tensors.items()}, module, features, mask, tokens)
    model = llamagen.LlamaGen(generator=module, tokenizer=None, params={"generator": jax.device_put(params)})
    np.testing.assert_allclose(model.logits(Context(features, mask), tokens), want, atol=2e-5)
    # Guided: the learned features, as many as the caption has.
    null = np.where(mask[..., None], np.float64(tensors["cls_embedding.uncond_embedding"]), 0)
    _, made = model.sample(jax.random.key(0), Context(features, mask), cfg=3.0, top_k=1)
    laws = [published_logits({n: np.float64(x) for n, x in tensors.items()}, module, f, mask, made) for f in (features, null)]
    np.testing.assert_array_equal((laws[1] + 3 * (laws[0] - laws[1])).argmax(-1), made)


def test_bad_input(model, files, tmp_path):
    with pytest.raises(ValueError, match="does not tell the heads of width 64; pass num_heads"):
        llamagen.load(**files)
    with pytest.raises(ValueError, match="tokens span 0..64; the vocabulary is 0..63"):
        model.logits([0], np.array([[0, 1, 2, 64]]))
    with pytest.raises(ValueError, match="expected integers .* of square images"):
        model.decode(np.zeros((1, 5), int))
    with pytest.raises(ValueError, match=r"images \(1, 5, 6, 3\): .*multiples of 2"):
        model.encode(np.zeros((1, 5, 6, 3), np.float32))
    state = read_state_dict(files["generator"], "model") | {"layers.0.extra": np.zeros(3, np.float32)}
    state.pop("norm.weight")
    write_safetensors(str(tmp_path / "odd.safetensors"), state)
    with pytest.raises(ValueError, match="unknown names: layers.0.extra.*missing.*norm"):
        llamagen.load(generator=str(tmp_path / "odd.safetensors"), tokenizer=files["tokenizer"], num_heads=4)
