"""Joining the processes of a run on many hosts, before JAX starts its devices.

JAX's own runtime (`jax.distributed`) connects the processes; here is found who takes part, and a meeting is held first, since
JAX's runtime ends a process that waits in vain with a dump of its stack.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
import os
import re
import socket
from collections.abc import Callable, Mapping

import jax

from jaxgen.train.meeting import meet
from jaxgen.train.waiting import saying

__all__ = ["PORT", "World", "find_world", "lost_process", "start_world"]

PORT = 8476  # where process 0 is met when a cluster names only hosts

# A process that sends no sign of life for so long is taken for dead, and the others end.
_HEARTBEAT_S = 30

# What collectives say that wait for a process which is gone: Gloo's, NCCL's, and JAX's runtime. A bucket's connection that is
# reset by its peer is none of them.
_LOST = re.compile("gloo.*(closed|reset) by peer|nccl.*remote process exited|task died|heartbeat timeout", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class World:
    """Who takes part in a run.

    Attributes:
      coordinator: "host:port" of process 0.
      num_processes: how many there are.
      process_id: which of them this is, from 0.
      source: where this is known from, for messages.

    Raises:
      ValueError: an address without a port, or a process that is none of the `num_processes`.
    """

    coordinator: str
    num_processes: int
    process_id: int
    source: str = "flags"

    def __post_init__(self):
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError(f"coordinator {self.coordinator!r}: expected HOST:PORT")
        if self.num_processes < 1:
            raise ValueError(f"num_processes {self.num_processes}: expected at least 1")
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(f"process_id {self.process_id}: expected 0 to {self.num_processes - 1}")


def find_world(
    environ: Mapping[str, str],
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> World | None:
    """Who takes part, from flags and from what a cluster says in the environment; None for a process of its own.

    What is given decides, the environment fills in the rest:

    - SLURM (`srun`): everything, from the step's node list, its number of tasks and the task's rank.
    - Kubernetes (indexed jobs): the process from `JOB_COMPLETION_INDEX`, process 0 from the pod's host name; the number of
      processes has to be given, as a pod does not know it.

    Args:
      environ: the environment, such as `os.environ`.
      coordinator: "host:port" of process 0.
      num_processes: how many take part.
      process_id: which of them this is.

    Raises:
      ValueError: some of it is known and the rest is not; or see `World`.
    """
    found, source = _slurm(environ) or _kubernetes(environ) or ({}, "flags")
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    known = found | {name: value for name, value in given.items() if value is not None}
    if not known or known.get("num_processes") == 1:
        return None
    missing = [name for name in given if name not in known]
    if missing:
        at_hand = ", ".join(f"{name} {value}" for name, value in known.items())
        raise ValueError(f"a run of several processes ({source}: {at_hand}) needs {', '.join('--' + name for name in missing)}")
    return World(**known, source=source)


def _slurm(environ: Mapping[str, str]) -> tuple[dict, str] | None:
    """The tasks of one `srun`."""
    if not {"SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_JOB_ID"} <= environ.keys():
        return None
    tasks = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS")
    if not tasks:
        return None
    # node001 is the first of node001,host2 and of node[001-015],host2 and of node[001,007]
    name, bracket, rest = re.match(r"([^,\[]*)(\[?)([^,\]-]*)", environ["SLURM_STEP_NODELIST"]).groups()
    host = name + rest if bracket else name
    # Jobs that share a node meet at different ports.
    port = 61440 + int(environ["SLURM_JOB_ID"]) % 4096
    known = {"coordinator": f"{host}:{port}", "num_processes": int(tasks), "process_id": int(environ["SLURM_PROCID"])}
    return known, "SLURM"


def _kubernetes(environ: Mapping[str, str]) -> tuple[dict, str] | None:
    """The pods of one indexed job, which are called <job>-<index> and share a headless service."""
    index = environ.get("JOB_COMPLETION_INDEX")
    if index is None:
        return None
    known = {"process_id": int(index)}
    pod, dot, domain = (environ.get("HOSTNAME") or socket.gethostname()).partition(".")
    if pod.endswith(f"-{index}"):
        if not dot:
            domain = socket.getfqdn(pod).partition(".")[2]
        first = pod.removesuffix(index) + "0"
        known["coordinator"] = f"{first}.{domain}:{PORT}" if domain else f"{first}:{PORT}"
    return known, "Kubernetes"


def start_world(
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    wait_s: float = 300.0,
    log: Callable[[str], None] = print,
) -> World | None:
    """Connects this process with its peers; to be called before anything asks JAX for its devices.

    Who takes part is found by `find_world`; on Cloud TPU hosts JAX asks the metadata server. A process alone connects to
    nobody. When a peer dies later, JAX's runtime ends the others within a minute and names it. CPU processes keep no compiled
    programs, whatever cache is asked for.

    Args:
      coordinator, num_processes, process_id: as in `find_world`.
      wait_s: seconds to wait for the peers; how long it has been is said every 10 s.
      log: takes lines.

    Returns:
      The world, or None for a process of its own.

    Raises:
      ValueError: peers that did not come in time, and which; or that are of another world, see `jaxgen.train.meeting.meet`.
    """
    given = dict(coordinator=coordinator, num_processes=num_processes, process_id=process_id)
    world = find_world(os.environ, **given)
    if world is None:
        # A number of 1 is a wish to be alone.
        if num_processes is None and _cloud_tpu():
            with saying("waiting for the other hosts of this TPU", every_s=10.0, log=log):
                try:
                    jax.distributed.initialize(initialization_timeout=int(wait_s), heartbeat_timeout_seconds=_HEARTBEAT_S)
                except ValueError:
                    pass  # chips without a cluster: a host of its own
        return None
    meet(world.coordinator, world.num_processes, world.process_id, wait_s=wait_s, log=log)
    # Only what CPU devices talk through; other devices have networks of their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    with saying(f"connecting {world.num_processes} processes at {world.coordinator}", every_s=10.0, log=log):
        jax.distributed.initialize(
            world.coordinator,
            world.num_processes,
            world.process_id,
            initialization_timeout=int(wait_s),
            heartbeat_timeout_seconds=_HEARTBEAT_S,
        )
    if jax.default_backend() == "cpu":
        # Read back from the cache, programs of several CPU processes wait for each other for ever (seen with jax 0.10).
        jax.config.update("jax_enable_compilation_cache", False)
    return world


def _cloud_tpu() -> bool:
    """Whether this host has TPU chips and the library that drives them."""
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def lost_process(error: BaseException) -> str | None:
    """What there is to say where a computation or a save failed since another process of the run is gone; else None."""
    return f"another process of this run has ended: {error}" if _LOST.search(str(error)) else None
