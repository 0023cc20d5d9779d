"""A meeting of all processes of a run at process 0, over plain TCP: who is there, and do they mean the same run?"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable

import jax

from jaxgen.train.waiting import saying

__all__ = ["meet"]

_MESSAGE = 4096  # bytes; more than any message of these has
_PATIENCE_S = 5.0  # for a peer that is connected to say its line


def meet(
    coordinator: str,
    num_processes: int,
    process_id: int,
    *,
    wait_s: float,
    every_s: float = 10.0,
    log: Callable[[str], None] = print,
) -> None:
    """Returns in every process once all have come to process 0, which listens at `coordinator` meanwhile and no longer.

    Args:
      coordinator: "host:port" of process 0.
      num_processes: how many have to come.
      process_id: which of them this is.
      wait_s: seconds to wait.
      every_s: seconds between the lines that say who is missing.
      log: takes lines.

    Raises:
      ValueError: in every process that came, if some did not come in time, if two have the same number, or if they differ in
        `num_processes` or in the version of JAX; which ones is said.
    """
    host, _, port = coordinator.rpartition(":")
    me = {"process_id": process_id, "num_processes": num_processes, "jax": jax.__version__}
    if process_id == 0:
        _host(int(port), me, wait_s, every_s, log)
    else:
        _visit(host.strip("[]"), int(port), me, wait_s, every_s, log)


def _host(port: int, me: dict, wait_s: float, every_s: float, log: Callable[[str], None]) -> None:
    """Process 0: receives the others, then lets them all go at once."""
    end, total = time.monotonic() + wait_s, me["num_processes"]
    guests: dict[int, socket.socket] = {}

    def missing() -> str:
        left = [str(i) for i in range(1, total) if i not in guests]
        return f"process{'es' if len(left) > 1 else ''} {', '.join(left)} of {total}"

    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(_listen(port))
        except OSError as error:
            raise ValueError(f"process 0 cannot listen at port {port}: {error.strerror or error}") from error
        problem = None
        with saying(lambda: f"waiting for {missing()} at port {port}", every_s=every_s, log=log):
            while problem is None and len(guests) < total - 1:
                if time.monotonic() > end:
                    problem = f"gave up after {wait_s:g} s: {missing()} never came to port {port} of process 0"
                    break
                with contextlib.suppress(TimeoutError):
                    guest, (address, *_) = server.accept()
                    stack.enter_context(guest)
                    problem = _receive(guest, address, me, guests)
                # Those who came and died are started anew, perhaps.
                for number in [number for number, guest in guests.items() if _gone(guest)]:
                    del guests[number]
        for guest in guests.values():
            _tell(guest, problem)
        if problem:
            raise ValueError(problem)


def _listen(port: int) -> socket.socket:
    """A server on all addresses, of both kinds where the host has them."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    server = socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024)
    server.settimeout(0.2)
    return server


def _receive(guest: socket.socket, address: str, me: dict, guests: dict[int, socket.socket]) -> str | None:
    """Takes a guest in, or says why the meeting has failed. Whoever does not speak as a process does is no guest."""
    guest.settimeout(_PATIENCE_S)
    try:
        who = _hear(guest)
        number = who["process_id"]
        theirs = {name: who[name] for name in me}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if number in guests and not _gone(guests[number]):
        _tell(guest, problem := f"two processes have the number {number}; the second is at {address}")
        return problem
    guests[number] = guest
    for name in ("num_processes", "jax"):
        if theirs[name] != me[name]:
            word = "a world of" if name == "num_processes" else "jax"
            unit = " processes" if name == "num_processes" else ""
            return f"process {number} at {address} has {word} {theirs[name]}{unit}, process 0 has {me[name]}"
    return f"two processes have the number 0; the second is at {address}" if number == 0 else None


def _gone(guest: socket.socket) -> bool:
    """Whether a guest has left; it says nothing after its first line, so that all there can be to read is the end."""
    guest.setblocking(False)
    try:
        return guest.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        guest.settimeout(_PATIENCE_S)


def _visit(host: str, port: int, me: dict, wait_s: float, every_s: float, log: Callable[[str], None]) -> None:
    """Any other process: goes to process 0, which may not be up yet, and waits for its word."""
    end = time.monotonic() + wait_s
    number = me["process_id"]
    with saying(f"waiting for process 0 at {host}:{port}", every_s=every_s, log=log):
        while True:
            try:
                with socket.create_connection((host, port), timeout=max(end - time.monotonic(), 0.1)) as server:
                    _say(server, me)
                    # A little longer than process 0 waits, as it knows more about who is missing.
                    server.settimeout(max(end - time.monotonic(), 0.1) + _PATIENCE_S)
                    answer = _hear(server)
                break
            except (OSError, ValueError) as error:
                if time.monotonic() > end:
                    reason = getattr(error, "strerror", None) or error
                    raise ValueError(
                        f"process {number} gave up after {wait_s:g} s: process 0 does not answer at {host}:{port} ({reason})"
                    ) from error
                time.sleep(0.2)
    if answer.get("problem"):
        raise ValueError(answer["problem"])


def _tell(guest: socket.socket, problem: str | None) -> None:
    """The meeting's end; a guest that has left meanwhile will be missed by JAX's runtime."""
    with contextlib.suppress(OSError):
        _say(guest, {"problem": problem})


def _say(peer: socket.socket, message: dict) -> None:
    peer.sendall(json.dumps(message).encode() + b"\n")


def _hear(peer: socket.socket) -> dict:
    """One line of JSON.

    Raises:
      OSError: the peer is silent or has gone.
      ValueError: it says something else.
    """
    text = b""
    while not text.endswith(b"\n"):
        part = peer.recv(_MESSAGE)
        if not part or len(text) > _MESSAGE:
            raise ConnectionResetError("the connection ended")
        text += part
    message = json.loads(text)
    if not isinstance(message, dict):
        raise ValueError(f"{message!r} is no message")
    return message
