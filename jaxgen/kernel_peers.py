"""Other implementations of the problems that kernels are timed on: XLA, cuDNN, tokamax, PyTorch, flash-linear-attention."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.kernel_cases import Case
from kernels_pallas import BlockMask, current_device, int4

__all__ = ["Call", "Peer", "peers"]


class Call(NamedTuple):
    """Something to time: `fn(*args)`, of which `wait(results)` returns when all of them are there."""

    fn: Callable
    args: Sequence
    wait: Callable[[list], Any] = jax.block_until_ready


@dataclasses.dataclass(frozen=True)
class Peer:
    """One other implementation.

    Attributes:
      name: in the table.
      call: (case, its arguments) to a `Call`; raises a ValueError that says why it cannot run here.
    """

    name: str
    call: Callable[[Case, tuple], Call]


def peers(case: Case) -> tuple[Peer, ...]:
    """What else computes the problem of `case`, whether or not it is installed here and has a device to run on."""
    if case.op in ("linear", "delta"):
        where, names = FLA[case.kind]
        return tuple(Peer(f"fla, {name}", _Fla(where, name)) for name in names)
    return {"attention": _ATTENTION, "int4": (Peer("dense product, x's type", _dense_product),)}.get(case.op, ())


def flex_attention(mask: BlockMask, device: str, *, compiled: bool) -> Callable:
    """torch's flex_attention [b, s, h, d] -> [b, s, h, d] with `mask`, of which it skips empty blocks of 128 x 128.

    Args:
      mask: its predicate becomes the `mask_mod`; predicates compare and combine, which tensors do as arrays.
      device: of torch.
      compiled: to one fused kernel. Without, all pairs are computed.
    """
    torch, flex = importlib.import_module("torch"), importlib.import_module("torch.nn.attention.flex_attention")
    # A list a row: inside a fused kernel only single elements can be loaded.
    q_rows, k_rows = ([torch.tensor(row, device=device) for row in meta] for meta in (mask.q_meta, mask.k_meta))

    def allowed(b, h, q, k):
        return mask.pred([row[q] for row in q_rows], [row[k] for row in k_rows])

    blocks = flex.create_block_mask(allowed, None, None, *mask.shape, device=device)
    attend = torch.compile(flex.flex_attention, dynamic=False) if compiled else flex.flex_attention

    def fn(q, k, v):
        return attend(*(x.swapaxes(1, 2) for x in (q, k, v)), block_mask=blocks).swapaxes(1, 2)

    return fn


def torch_call(case: Case, args: tuple, fn: Callable) -> Call:
    """A call of `fn`, from tensors to the tensor of outputs; of a backward case with the gradients that `Case` speaks of."""
    torch = importlib.import_module("torch")
    device = _torch_device(torch)

    def convert(x):
        # By float32: NumPy has no bfloat16 that torch knows.
        x, dtype = np.array(x.astype(jnp.float32)), getattr(torch, str(x.dtype))
        return torch.from_numpy(x).to(device, dtype).requires_grad_(case.backward)

    def call(*tensors):
        o = fn(*tensors)
        return torch.autograd.grad(o.float().square().sum(), tensors) if case.backward else o

    def wait(_):
        if device == "cuda":
            torch.cuda.synchronize()

    return Call(call, tuple(convert(x) for x in args), wait)


def _dense_attention(implementation: str, *, masked: bool) -> Callable:
    def call(case, args):
        if implementation == "cudnn" and current_device().platform != "gpu":
            raise ValueError("needs CUDA")
        mask = case.mask.traced if masked else lambda: None

        def fn(q, k, v):
            return jax.nn.dot_product_attention(q, k, v, mask=mask(), implementation=implementation)

        return Call(jax.jit(case.differentiated(fn)), args)

    return call


def _tokamax(case: Case, args: tuple) -> Call:
    """Its own choice of a kernel, with a dense mask: it takes no other."""
    _require("tokamax")
    attend = importlib.import_module("tokamax").dot_product_attention
    # Or it parses this process's command line, and stops at what it does not know.
    importlib.import_module("absl.flags").FLAGS.mark_as_parsed()

    def fn(q, k, v):
        return attend(q, k, v, mask=case.mask.traced()[None, None])

    return Call(jax.jit(case.differentiated(fn)), args)


def _torch_sdpa(case: Case, args: tuple) -> Call:
    _require("torch")
    torch = importlib.import_module("torch")
    mask = torch.from_numpy(case.mask.dense()).to(_torch_device(torch))

    def fn(q, k, v):
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).swapaxes(1, 2)

    return torch_call(case, args, fn)


def _torch_flex(case: Case, args: tuple) -> Call:
    _require("torch", cuda=True)
    # After eight masks the compiler would give up on the function and run it uncompiled.
    importlib.import_module("torch").compiler.reset()
    return torch_call(case, args, flex_attention(case.mask, "cuda", compiled=True))


_ATTENTION = (
    Peer("XLA, dense mask", _dense_attention("xla", masked=True)),
    Peer("cuDNN, dense mask", _dense_attention("cudnn", masked=True)),
    Peer("cuDNN, no mask (more work)", _dense_attention("cudnn", masked=False)),
    Peer("tokamax, dense mask", _tokamax),
    Peer("torch SDPA, dense mask", _torch_sdpa),
    Peer("torch flex_attention", _torch_flex),
)
# By `Case.kind`, the module of flash-linear-attention (github.com/fla-org) and its functions; decays are logarithms in all of
# them, per head in the first and last, per channel in the second, and the delta rule is ours.
FLA = {
    "retention": ("fla.ops.simple_gla", ("chunk_simple_gla", "fused_chunk_simple_gla")),
    "gla": ("fla.ops.gla", ("chunk_gla",)),
    "delta": ("fla.ops.gated_delta_rule", ("chunk_gated_delta_rule",)),
}


@dataclasses.dataclass(frozen=True)
class _Fla:
    where: str
    name: str

    def __call__(self, case: Case, args: tuple) -> Call:
        _require("fla", "torch", cuda=True)
        return torch_call(case, args, self.function())

    def function(self) -> Callable:
        """q, k, v [b, t, h, d], g [b, t, h] or [b, t, h, d], and for the delta rule beta [b, t, h], to o [b, t, h, d]."""
        op = getattr(importlib.import_module(self.where), self.name)

        def fn(q, k, v, g, *beta):
            # Ours does not scale queries; theirs does by default. By keyword: the order of arguments has changed over versions.
            return op(q=q, k=k, v=v, g=g, **dict(zip(["beta"], beta)), scale=1.0, output_final_state=False)[0]

        return fn


def _dense_product(case: Case, args: tuple) -> Call:
    x, packed = args
    return Call(jax.jit(jnp.dot), (x, int4.unpack_int4(packed).astype(x.dtype)))


def _require(*names: str, cuda: bool = False) -> None:
    """Raises a ValueError where a package, or a CUDA device for PyTorch, is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"{name} is not installed")
    if cuda and _torch_device(importlib.import_module("torch")) == "cpu":
        raise ValueError("needs CUDA")


def _torch_device(torch) -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
