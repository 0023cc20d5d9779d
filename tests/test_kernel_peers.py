"""Other libraries' functions are called as they are defined: stand-ins with their signatures compute the definitions in NumPy."""

import importlib.util
import sys
import types
from importlib.machinery import ModuleSpec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from jaxgen import kernel_benchmark, kernel_cases, kernel_peers
from kernels_pallas import block_sparse_attention

LINEAR = ("retention", "gla", "delta")


def linear_case(kind, backward=False):
    return kernel_cases._in_float32(kernel_cases._linear(kind, 2, 70, 2, 16, backward))


def attention_case(kind, backward=False):
    return kernel_cases._in_float32(kernel_cases._attention(kind, 96 if kind == "diffusion" else 85, 2, 2, 16, backward))


@pytest.fixture
def install(monkeypatch):
    """Puts a module, and packages without a module of their own above it, where an import finds them."""

    def fn(name, **contents):
        parts = name.split(".")
        for above in (".".join(parts[:i]) for i in range(1, len(parts) + 1)):
            if above == name or above not in sys.modules:
                module = types.ModuleType(above)
                module.__spec__ = ModuleSpec(above, None)
                monkeypatch.setitem(sys.modules, above, module)
        vars(sys.modules[name]).update(contents)

    return fn


@pytest.fixture
def uninstalled(monkeypatch):
    found = importlib.util.find_spec

    def find_spec(name, package=None):
        return None if name in ("fla", "tokamax", "torch") else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def recurrence(q, k, v, g, beta, scale):
    """Of all three: [b, t, h, d] each, g [b, t, h] or [b, t, h, d]; beta None is no erasing."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    state, outputs = np.zeros((*q.shape[::2], q.shape[3], v.shape[3])), []
    for t in range(q.shape[1]):
        state = state * np.exp(g[:, t]).reshape(*state.shape[:2], -1, 1)
        write = v[:, t]
        if beta is not None:
            write = np.asarray(beta)[:, t, :, None] * (write - np.einsum("bhkv,bhk->bhv", state, k[:, t]))
        state = state + k[:, t, ..., None] * write[:, :, None]
        outputs.append(np.einsum("bhkv,bhk->bhv", state, q[:, t]) * scale)
    return np.stack(outputs, 1)


# The signatures are those of fla-core 0.6.0.


def simple_gla(q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None):
    assert g.shape == q.shape[:3] == v.shape[:3] and g_gamma is initial_state is cu_seqlens is None
    return recurrence(q, k, v, g, None, q.shape[-1] ** -0.5 if scale is None else scale), None


def gla(q, k, v, g, scale=None, initial_state=None, output_final_state=False, state_v_first=False, cu_seqlens=None):
    assert q.shape == k.shape == g.shape and v.shape[:3] == q.shape[:3]
    return recurrence(q, k, v, g, None, q.shape[-1] ** -0.5 if scale is None else scale), None


def delta(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False, **kwargs):
    assert g.shape == beta.shape == q.shape[:3] and not kwargs and not use_qk_l2norm_in_kernel
    return recurrence(q, k, v, g, beta, q.shape[-1] ** -0.5 if scale is None else scale), None


@pytest.mark.parametrize("kind", LINEAR)
def test_fla_is_given_our_problem(install, kind):
    where, names = kernel_peers.FLA[kind]
    install(where, **dict.fromkeys(names, {"retention": simple_gla, "gla": gla, "delta": delta}[kind]))
    case = linear_case(kind)
    args = case.inputs()
    want = jax.jit(case.build()[0])(*args)
    found = kernel_peers.peers(case)
    assert [peer.name for peer in found] == [f"fla, {name}" for name in names]
    for peer in found:
        # 70 tokens of keys of length 4 or 1 in float32; the chunked sums differ in order.
        got = peer.call.function()(*(np.asarray(x) for x in args))
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_random_arguments_are_such_as_the_ops_take():
    _, k, _, decay, beta = linear_case("delta").inputs()
    np.testing.assert_allclose(jnp.linalg.norm(k, axis=-1), 1, rtol=1e-5)
    assert (decay < 0).all() and ((0 < beta) & (beta < 1)).all()
    assert (linear_case("gla").inputs()[3] < 0).all()


def dense_attention(q, k, v, allowed):
    """[b, h, s, d]; in JAX, since it is differentiated."""
    s = jnp.where(allowed, q @ k.swapaxes(2, 3) * q.shape[-1] ** -0.5, -jnp.inf)
    return jax.nn.softmax(s, axis=-1) @ v


@pytest.mark.parametrize("backward", [False, True])
def test_tokamax_is_given_our_problem(install, backward):
    case = attention_case("var", backward)
    args = case.inputs()

    def dot_product_attention(query, key, value, bias=None, mask=None, *, scale=None, is_causal=False, implementation=None):
        # tokamax's options are flags of the command line, which it parses if nobody has, and which is not for it.
        assert flags.FLAGS.is_parsed()
        assert mask.shape == (1, 1, *case.mask.shape) and mask.dtype == bool and bias is None and not is_causal
        return dense_attention(*(x.swapaxes(1, 2) for x in (query, key, value)), mask).swapaxes(1, 2)

    install("tokamax", dot_product_attention=dot_product_attention)
    call = named(case, "tokamax, dense mask").call(case, args)
    want = jax.jit(case.build(implementation="xla")[0])(*args)
    for x, y in zip(jax.tree.leaves(call.fn(*call.args)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max())


@pytest.mark.parametrize("kind", ["var", "hmar", "diffusion"])
def test_flex_attention_is_given_our_mask(install, kind):
    """The stand-in evaluates the mask as torch does: by the numbers of a query and a key."""

    def create_block_mask(mask_mod, B, H, Q_LEN, KV_LEN, device="cuda", BLOCK_SIZE=128):
        assert B is H is None and device == "somewhere"
        return mask_mod(0, 0, np.arange(Q_LEN)[:, None], np.arange(KV_LEN)[None])

    def flex_attention(query, key, value, score_mod=None, block_mask=None, scale=None, enable_gqa=False):
        assert query.shape == (2, 2, case.mask.shape[0], 16) and score_mod is scale is None
        return dense_attention(query, key, value, block_mask)

    install("torch", tensor=lambda x, device: np.array(x))
    install("torch.nn.attention.flex_attention", create_block_mask=create_block_mask, flex_attention=flex_attention)
    case = attention_case(kind)
    args = case.inputs()
    got = kernel_peers.flex_attention(case.mask, "somewhere", compiled=False)(*args)
    want = jax.jit(lambda *x: block_sparse_attention(*x, case.mask, implementation="xla"))(*args)
    np.testing.assert_allclose(got, want, atol=1e-5)


def named(case, name):
    return next(peer for peer in kernel_peers.peers(case) if peer.name == name)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kind", ["var", "diffusion"])
def test_torch_agrees(kind, backward):
    pytest.importorskip("torch", reason="runs PyTorch's own attention")
    case = attention_case(kind, backward)
    args = case.inputs()
    want = jax.jit(case.build(implementation="xla")[0])(*args)
    calls = [named(case, "torch SDPA, dense mask").call(case, args)]
    if not backward:  # which flex_attention has on CUDA only
        calls.append(kernel_peers.torch_call(case, args, kernel_peers.flex_attention(case.mask, "cpu", compiled=False)))
    for call in calls:
        got = call.fn(*call.args)
        call.wait([got])
        for x, y in zip(got, want):
            np.testing.assert_allclose(x.detach().numpy(), y, atol=2e-5 * np.abs(y).max())


def notes(case):
    return {row["by"]: row["note"] for row in kernel_benchmark.bench([case], repeats=1) if "note" in row}


def test_what_is_missing_has_a_row_that_says_so(uninstalled):
    attention = {"tokamax, dense mask": "tokamax is not installed"}
    attention |= dict.fromkeys(["torch SDPA, dense mask", "torch flex_attention"], "torch is not installed")
    cudnn = dict.fromkeys(["cuDNN, dense mask", "cuDNN, no mask (more work)"], "needs CUDA")
    assert notes(attention_case("hmar")) == attention | cudnn
    for kind in LINEAR:
        assert set(notes(linear_case(kind)).values()) == {"fla is not installed"}


def test_what_needs_another_device_has_a_row_that_says_so(install):
    install("torch", cuda=types.SimpleNamespace(is_available=lambda: False))
    install("fla")
    for kind in LINEAR:
        assert set(notes(linear_case(kind)).values()) == {"needs CUDA"}
    assert named(attention_case("var"), "torch flex_attention")
    with pytest.raises(ValueError, match="needs CUDA"):
        named(attention_case("var"), "torch flex_attention").call(attention_case("var"), ())
