"""Times kernels against other implementations of the same problem, on the device at hand."""

from __future__ import annotations

import functools
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from jaxgen.kernel_cases import LIMITS, Case
from kernels_pallas import current_device, decode, delta, int4, linear
from kernels_pallas.attention import api as attention

__all__ = ["bench", "seconds"]

_IMPLEMENTATIONS = {
    "attention": attention.IMPLEMENTATIONS,
    "linear": linear.api.IMPLEMENTATIONS,
    "delta": delta.api.IMPLEMENTATIONS,
    "decode": decode.api.IMPLEMENTATIONS,
    "int4": int4.api.IMPLEMENTATIONS,
}


def bench(cases: list[Case], *, repeats: int = 20) -> Iterator[dict]:
    """A row a case and implementation: ours, then peers; what cannot run says why.

    Args:
      cases: see `jaxgen.kernel_cases.measured`.
      repeats: calls, of which the median counts.

    Yields:
      {"case", "by", "ms", "TF/s" (useful), "executed TF/s", "GB/s", "of limit" (share of the nearer of the device's FLOP and byte
      limits, where they are known)}, or {"case", "by", "note"}.
    """
    for case in cases:
        args = case.inputs()
        here = [x.name for x in _IMPLEMENTATIONS[case.op] if current_device().platform in x.platforms]
        for name in here:
            yield _row(case, name, functools.partial(_ours, case, name), args, repeats)
        for name, fn in _peers(case):
            yield _row(case, name, fn, args, repeats)


def seconds(fn: Callable, args: tuple, repeats: int) -> float:
    """Median seconds of a call. Calls are issued in groups that last some milliseconds, so that their dispatch is hidden."""
    jax.block_until_ready(fn(*args))
    start = time.perf_counter()
    jax.block_until_ready(fn(*args))
    group = max(1, min(50, int(5e-3 / max(time.perf_counter() - start, 1e-9))))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        out = [fn(*args) for _ in range(group)]
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / group)
    return statistics.median(times)


def _ours(case: Case, name: str) -> Callable:
    return jax.jit(case.build(implementation=name)[0])


def _row(case: Case, name: str, make: Callable, args: tuple, repeats: int) -> dict:
    row = {"case": case.name, "by": name}
    try:
        took = seconds(make(), args, repeats)
    except Exception as error:  # a peer's or a compiler's; the row says what it was
        return row | {"note": " ".join(str(error).split())[:120]}
    limit = LIMITS.get(current_device().kind)
    share = max(case.flops / limit[0], case.bytes / limit[1]) / took if limit else None
    return row | {
        "ms": round(1e3 * took, 4),
        "TF/s": round(case.flops / took / 1e12, 3),
        "executed TF/s": round(case.executed / took / 1e12, 3),
        "GB/s": round(case.bytes / took / 1e9, 1),
        "of limit": "" if share is None else round(share, 3),
    }


def _peers(case: Case) -> Iterator[tuple[str, Callable]]:
    """(name, maker of a function of the case's arguments) of other implementations."""
    if case.op == "int4":
        yield "dense product, x's type", lambda: _dense_product(case)
    if case.op == "attention":
        gpu = current_device().platform == "gpu"
        yield "XLA, dense mask", lambda: _dense_attention(case, "xla", masked=True)
        if gpu:
            yield "cuDNN, dense mask", lambda: _dense_attention(case, "cudnn", masked=True)
            yield "cuDNN, no mask (more work)", lambda: _dense_attention(case, "cudnn", masked=False)
        if importlib.util.find_spec("torch"):
            yield "torch SDPA, dense mask", lambda: _torch_attention(case)


def _dense_attention(case: Case, implementation: str, *, masked: bool) -> Callable:
    mask = case.mask.traced if masked else lambda: None

    def fn(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, mask=mask(), implementation=implementation)

    return jax.jit(case.differentiated(fn))


def _dense_product(case: Case) -> Callable:
    dense = {}

    def fn(x, w):
        if "w" not in dense:
            dense["w"] = int4.unpack_int4(w).astype(x.dtype)
        return product(x, dense["w"])

    product = jax.jit(jnp.dot)
    return fn


def _torch_attention(case: Case) -> Callable:
    """PyTorch's attention on the same device: float32 on a CPU, where its bfloat16 has no fast path."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    mask = torch.from_numpy(case.mask.dense()).to(device)

    def convert(x):
        x = torch.from_numpy(jax.device_get(x.astype(jnp.float32))).to(device).swapaxes(1, 2)
        return (x.bfloat16() if device == "cuda" else x).requires_grad_(case.backward)

    kept = {}

    def fn(*args):
        if not kept:
            kept["args"] = [convert(x) for x in args]
        o = torch.nn.functional.scaled_dot_product_attention(*kept["args"], attn_mask=mask)
        if case.backward:
            o.float().square().sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return ()

    return fn
