import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import masks
from jaxgen.decoding import KVCache
from jaxgen.nn import AdaLNTransformer, Mamba2
from jaxgen.orders import scales

pytestmark = pytest.mark.numeric

ORDER = scales((1, 2))
WIDTH, HEADS, DEPTH = 16, 2, 2
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 5, WIDTH)).astype(np.float32)
COND = RNG.normal(size=(2, WIDTH)).astype(np.float32)


def build(**kwargs):
    return AdaLNTransformer(WIDTH, HEADS, DEPTH, mask=masks.block_causal(ORDER), **kwargs)


def unrolled_params(module, randomize):
    return randomize(jax.eval_shape(module.clone(scan_layers=False).init, jax.random.key(0), X, COND))


def stacked(params):
    inner = dict(params["params"])
    blocks = [inner.pop(f"blocks_{i}") for i in range(DEPTH)]
    return {"params": {**inner, "blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)}}


def reference(params, x, cond, *, shared, l2_norm, scale):
    """The stack in float64, from Peebles & Xie's block and the published order of the six vectors."""
    p = jax.tree.map(np.float64, params["params"])
    x, cond = np.float64(x), np.float64(cond)
    allowed = ORDER.step_of[:, None] >= ORDER.step_of[None]

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    def six(cond, dense):
        return np.einsum("bd,dpw->bpw", cond / (1 + np.exp(-cond)), dense["kernel"]) + dense["bias"]

    for i in range(DEPTH):
        b = p[f"blocks_{i}"]
        ada = six(cond, p["shared_ada"]) + b["ada"]["offset"] if shared else six(cond, b["ada"]["dense"])
        gate1, gate2, scale1, scale2, shift1, shift2 = np.moveaxis(ada[:, :, None], 1, 0)
        h = norm(x) * (1 + scale1) + shift1
        q, k, v = np.moveaxis(np.einsum("bld,dphk->bplhk", h, b["attention"]["qkv"]["kernel"]), 1, 0)
        q, v = q + b["attention"]["q_bias"], v + b["attention"]["v_bias"]
        if l2_norm:
            q, k = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
            q = q * np.exp(b["attention"]["log_scale"])
        logits = np.einsum("bqhk,bshk->bhqs", q, k) * (1.0 if l2_norm else scale)
        weights = np.exp(np.where(allowed, logits, -np.inf))
        out = np.einsum("bhqs,bshk->bqhk", weights / weights.sum(-1, keepdims=True), v)
        x = x + gate1 * (np.einsum("blhk,hkd->bld", out, b["attention"]["proj"]["kernel"]) + b["attention"]["proj"]["bias"])
        h = (norm(x) * (1 + scale2) + shift2) @ b["mlp"]["fc1"]["kernel"] + b["mlp"]["fc1"]["bias"]
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + gate2 * (h @ b["mlp"]["fc2"]["kernel"] + b["mlp"]["fc2"]["bias"])
    return x


@pytest.mark.parametrize(("shared", "l2_norm", "scale"), [(False, True, None), (True, False, 0.1)])
def test_unrolled_and_scanned_are_the_equations(randomize, shared, l2_norm, scale):
    module = build(shared_adaln=shared, l2_norm=l2_norm, attention_scale=scale)
    params = unrolled_params(module, randomize)
    want = reference(params, X, COND, shared=shared, l2_norm=l2_norm, scale=scale)
    unrolled, cache = jax.jit(module.apply)(params, X, COND)
    scanned, _ = jax.jit(module.clone(scan_layers=True).apply)(stacked(params), X, COND)
    assert cache is None
    np.testing.assert_allclose(unrolled, want, atol=2e-5)
    np.testing.assert_allclose(scanned, want, atol=2e-5)


def test_shared_modulation_is_one_projection_and_an_offset_a_block(randomize):
    params = unrolled_params(build(shared_adaln=True), randomize)["params"]
    assert params["shared_ada"]["kernel"].shape == (WIDTH, 6, WIDTH)
    assert [params[f"blocks_{i}"]["ada"]["offset"].shape for i in range(DEPTH)] == [(6, WIDTH)] * DEPTH
    assert "shared_ada" not in unrolled_params(build(), randomize)["params"]


@pytest.mark.parametrize("scan", [False, True])
def test_a_cache_in_pieces_is_the_whole(randomize, scan):
    module = build(l2_norm=True, scan_layers=scan)
    params = unrolled_params(module, randomize)
    params = stacked(params) if scan else params
    whole, _ = jax.jit(module.apply)(params, X, COND)
    step = jax.jit(module.apply)
    cache = KVCache.zeros(layers=DEPTH, batch=2, capacity=5, heads=HEADS, head_size=WIDTH // HEADS)
    for part, want in zip(ORDER.split(X), ORDER.split(whole)):
        out, cache = step(params, part, COND, cache)
        cache = cache.commit(part.shape[1])
        np.testing.assert_allclose(out, want, atol=3e-6)


def test_neither_remat_nor_scan_changes_values_or_gradients(randomize):
    params = unrolled_params(build(), randomize)

    def value_and_grad(params, scan, remat):
        module = build(scan_layers=scan, remat=remat)

        def loss(p):
            return jnp.mean(jnp.square(module.apply(p, X, COND)[0]))

        traced = jax.jit(jax.value_and_grad(loss)).trace(params)
        assert ("checkpoint" in str(traced.jaxpr) or "remat" in str(traced.jaxpr)) == remat
        return traced.lower().compile()(params)

    plain_value, plain = value_and_grad(params, False, False)
    plain = jax.tree.map(np.asarray, plain)
    for scan in (False, True):
        value, grads = value_and_grad(stacked(params) if scan else params, scan, True)
        np.testing.assert_allclose(value, plain_value, rtol=1e-6)
        want = stacked(plain) if scan else plain
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, want)


def test_half_precision_is_close_and_keeps_float32_parameters(randomize):
    module = build(l2_norm=True)
    params = unrolled_params(module, randomize)
    want, _ = jax.jit(module.apply)(params, X, COND)
    half = module.clone(dtype=jnp.bfloat16)
    got, _ = jax.jit(half.apply)(params, X, COND)
    assert got.dtype == jnp.bfloat16
    error = np.abs(got.astype(np.float32) - want).max() / np.abs(want).max()
    assert 1e-4 < error < 0.03, error
    initial = jax.eval_shape(half.init, jax.random.key(0), X, COND)
    assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {jnp.dtype(jnp.float32)}


def test_initial_scales():
    module = AdaLNTransformer(64, 2, 8, init_std=0.05, gate_init=1e-3, rest_init=0.5, mlp_ratio=3.0, scan_layers=True)
    x, cond = np.zeros((1, 5, 64), np.float32), np.zeros((1, 64), np.float32)
    p = jax.jit(module.init)(jax.random.key(0), x, cond)["params"]["blocks"]
    assert p["mlp"]["fc1"]["kernel"].shape == (8, 64, 192)
    stds = [p["attention"]["qkv"], p["mlp"]["fc1"], p["attention"]["proj"], p["mlp"]["fc2"]]
    want = [0.05, 0.05, 0.05 / 4, 0.05 / 4]  # output projections are divided by sqrt(2 depth)
    np.testing.assert_allclose([leaf["kernel"].std() for leaf in stds], want, rtol=0.03)
    np.testing.assert_allclose(p["ada"]["dense"]["kernel"].std(axis=(0, 1, 3)), [5e-5] * 2 + [0.025] * 4, rtol=0.05)
    # Each layer is drawn on its own.
    assert np.abs(np.diff(p["mlp"]["fc1"]["kernel"], axis=0)).min(axis=(1, 2)).max() > 0
    assert np.std(np.diff(p["mlp"]["fc1"]["kernel"], axis=0)) > 0.05


@pytest.mark.parametrize("scan", [False, True])
def test_drop_path_drops_rows_of_branches(randomize, scan):
    """With a zero MLP gate the last block adds one branch: a row keeps it, enlarged by 1 / (1 - rate), or loses it."""
    rows, rate = 4000, 0.4
    module = AdaLNTransformer(8, 1, 2, drop_path_rate=rate, scan_layers=scan)
    x = np.broadcast_to(RNG.normal(size=(1, 2, 8)), (rows, 2, 8)).astype(np.float32)
    cond = np.broadcast_to(RNG.normal(size=(1, 8)), (rows, 8)).astype(np.float32)
    params = randomize(jax.eval_shape(module.init, jax.random.key(0), x, cond))

    blocks = params["params"]
    dense = blocks["blocks"]["ada"]["dense"] if scan else blocks["blocks_1"]["ada"]["dense"]
    last = (1,) if scan else ()
    for name in ("kernel", "bias"):  # part 1 is the gate of the MLP
        dense[name][(*last, ..., 1, slice(None))] = 0
    apply = jax.jit(module.apply, static_argnames="train")
    plain, _ = apply(params, x, cond)
    first = {"params": {"blocks_0": jax.tree.map(lambda p: p[0], blocks["blocks"]) if scan else blocks["blocks_0"]}}
    before, _ = jax.jit(AdaLNTransformer(8, 1, 1).apply)(first, x[:1], cond[:1])
    branch = plain[:1] - before

    dropped, _ = apply(params, x, cond, train=True, rngs={"dropout": jax.random.key(5)})
    kept = np.abs(dropped - before).max(axis=(1, 2)) > 1e-6
    np.testing.assert_allclose(dropped[~kept], np.broadcast_to(before, dropped[~kept].shape), atol=1e-6)
    want = np.broadcast_to(before + branch / (1 - rate), dropped[kept].shape)
    np.testing.assert_allclose(dropped[kept], want, atol=2e-5)
    z = (kept.sum() - rows * (1 - rate)) / np.sqrt(rows * rate * (1 - rate))
    assert abs(z) < 4, z

    # The first block's rate is 0, sampling never drops, and rate 0 needs no random numbers.
    rate0 = jax.jit(module.clone(drop_path_rate=0.0).apply, static_argnames="train")(params, x, cond, train=True)[0]
    np.testing.assert_array_equal(rate0, plain)


def test_some_of_the_blocks(randomize):
    """Block 1 alone is a transformer of one block with its parameters; positions of the prefix pass block 0, too."""
    module = build()
    params = unrolled_params(module, randomize)
    run = jax.jit(module.apply, static_argnames=("layers", "prefix"))
    alone = {"params": {"blocks_0": params["params"]["blocks_1"]}}
    want, _ = jax.jit(module.clone(depth=1).apply)(alone, X, COND)
    np.testing.assert_allclose(run(params, X, COND, layers=(1,))[0], want, atol=1e-6)
    cache = KVCache.zeros(layers=1, batch=2, capacity=5, heads=HEADS, head_size=WIDTH // HEADS)
    first, cache = run(params, X[:, :1], COND, cache, layers=(1,))
    rest, _ = run(params, X[:, 1:], COND, cache.commit(1), layers=(1,))
    np.testing.assert_allclose(np.concatenate([first, rest], axis=1), want, atol=3e-6)
    whole, some = run(params, X, COND)[0], run(params, X, COND, layers=(1,), prefix=1)[0]
    np.testing.assert_allclose(some[:, :1], whole[:, :1], atol=1e-6)
    assert np.abs(some - whole)[:, 1:].max() > 0.01 and np.abs(some - want)[:, 1:].max() > 0.01


@pytest.mark.parametrize(
    ("layers", "scan", "message"),
    [
        ((1, 0), False, r"layers=\(1, 0\): expected increasing numbers of blocks, within 0..1"),
        ((0, 2), False, r"layers=\(0, 2\)"),
        ((0,), True, r"layers=\(0,\): scanned blocks run all together"),
    ],
)
def test_blocks_that_are_not_there(layers, scan, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: build(scan_layers=scan).init(jax.random.key(0), X, COND, layers=layers))


def test_a_mixer_is_a_third_branch_of_each_block():
    """With its own parameters, and nine vectors from the condition; its equations are tested with the generator that has one."""
    mixer = Mamba2(state_size=4, head_size=8)
    for shared in (False, True):
        module = build(mixer=mixer, shared_adaln=shared)
        shapes = jax.eval_shape(module.init, jax.random.key(0), X, COND)["params"]
        assert "mixer" not in shapes and shapes["blocks_1"]["mixer"]["A_log"].shape == (4,)
        ada = shapes["shared_ada"] if shared else shapes["blocks_0"]["ada"]["dense"]
        assert ada["kernel"].shape == (WIDTH, 9, WIDTH)
        assert module == build(mixer=mixer.clone(), shared_adaln=shared) and hash(module) == hash(module.clone())
    assert shapes["blocks_0"]["ada"]["offset"].shape == (9, WIDTH)


def test_learned_norms_norms_of_heads_and_another_gelu(randomize):
    """Norms that have learned nothing are those without parameters; what they learn matters, and so do the other two."""
    plain, learned = build(), build(learned_norms=True)
    params = unrolled_params(learned, randomize)
    norms = {name for name in params["params"]["blocks_0"] if name.startswith("norm")}
    assert norms == {"norm_0", "norm_1"}
    for i in range(DEPTH):
        for name in norms:
            params["params"][f"blocks_{i}"][name] = {"scale": np.ones(WIDTH), "bias": np.zeros(WIDTH)}
    bare = {"params": {b: {n: x for n, x in p.items() if n not in norms} for b, p in params["params"].items()}}
    want, _ = plain.apply(bare, X, COND)
    np.testing.assert_allclose(learned.apply(params, X, COND)[0], want, atol=1e-5)
    for name in norms:
        for leaf in ("scale", "bias"):
            changed = jax.tree.map(np.copy, params)
            changed["params"]["blocks_1"][name][leaf] += np.linspace(0, 1, WIDTH)
            assert np.abs(learned.apply(changed, X, COND)[0] - want).max() > 1e-3
    assert np.abs(build(exact_gelu=True).apply(bare, X, COND)[0] - want).max() > 1e-6

    heads = build(head_norm=True)
    params = unrolled_params(heads, randomize)
    attention = params["params"]["blocks_0"]["attention"]
    assert attention["q_norm"]["scale"].shape == (WIDTH // HEADS,) and attention["k_bias"].shape == (HEADS, WIDTH // HEADS)
    before = heads.apply(params, X, COND)[0]
    # Without learned shifts and biases, queries and keys of any length are the same.
    for bias in ("q_bias", "k_bias"):
        attention[bias][:] = 0
    base = heads.apply(params, X, COND)[0]
    assert np.abs(base - before).max() > 1e-4
    attention["qkv"]["kernel"][:, :2] *= 3
    np.testing.assert_allclose(heads.apply(params, X, COND)[0], base, atol=1e-4)
    with pytest.raises(ValueError, match="head_norm=True: .*l2_norm=True"):
        build(head_norm=True, l2_norm=True).init(jax.random.key(0), X, COND)
