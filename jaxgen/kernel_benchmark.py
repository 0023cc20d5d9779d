"""Times kernels against other implementations of the same problem, on the device at hand."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from jaxgen.kernel_cases import LIMITS, Case
from jaxgen.kernel_peers import Call, Peer, peers
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
    """A row a case and implementation: ours for this platform, then all peers; what cannot run says why.

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
        for peer in (*map(_ours, here), *peers(case)):
            yield _row(case, peer, args, repeats)


def seconds(fn: Callable, args: Sequence, repeats: int, wait: Callable[[list], Any] = jax.block_until_ready) -> float:
    """Median seconds of a call. Calls are issued in groups that last some milliseconds, so that their dispatch is hidden.

    Args:
      fn: what to call.
      args: its arguments.
      repeats: groups.
      wait: returns when all results of a group are there.
    """
    wait([fn(*args)])
    start = time.perf_counter()
    wait([fn(*args)])
    group = max(1, min(50, int(5e-3 / max(time.perf_counter() - start, 1e-9))))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        out = [fn(*args) for _ in range(group)]
        wait(out)
        times.append((time.perf_counter() - start) / group)
    return statistics.median(times)


def _ours(name: str) -> Peer:
    return Peer(name, lambda case, args: Call(jax.jit(case.build(implementation=name)[0]), args))


def _row(case: Case, peer: Peer, args: tuple, repeats: int) -> dict:
    row = {"case": case.name, "by": peer.name}
    try:
        call = peer.call(case, args)
        took = seconds(call.fn, call.args, repeats, call.wait)
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
