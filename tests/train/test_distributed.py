"""Who takes part in a run, as clusters say it; and two processes that train, save, evaluate and sample as one does."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import two_processes

from jaxgen import cli
from jaxgen.train import make_mesh
from jaxgen.train.distributed import World, find_world
from jaxgen.train.reading import steps

HERE = Path(__file__).parent

SLURM = {"SLURM_JOB_ID": "70001", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "9"}
POD = {"JOB_COMPLETION_INDEX": "2", "HOSTNAME": "train-2.jobs.default.svc"}


def test_alone():
    assert find_world({"HOME": "/root"}) is None
    assert find_world({}, num_processes=1) is None


def test_flags():
    world = find_world({}, coordinator="10.0.0.1:1234", num_processes=4, process_id=2)
    assert world == World("10.0.0.1:1234", 4, 2, "flags")


@pytest.mark.parametrize(
    "nodes,host",
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-015],host2", "node001"),
        ("node[003,007-015]", "node003"),
        ("gpu-a[9]", "gpu-a9"),
    ],
)
def test_slurm(nodes, host):
    world = find_world(SLURM | {"SLURM_STEP_NODELIST": nodes})
    assert world == World(f"{host}:{61440 + 70001 % 4096}", 8, 3, "SLURM")


def test_a_shell_on_a_slurm_node_is_no_step_of_it():
    assert find_world(SLURM) is None


def test_one_task_is_alone():
    assert find_world(SLURM | {"SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_TASKS": "1"}) is None


def test_kubernetes():
    world = find_world(POD, num_processes=3)
    assert world == World("train-0.jobs.default.svc:8476", 3, 2, "Kubernetes")


def test_flags_go_before_the_cluster():
    world = find_world(POD, coordinator="a:1", num_processes=9, process_id=5)
    assert (world.coordinator, world.num_processes, world.process_id) == ("a:1", 9, 5)


@pytest.mark.parametrize(
    "environ,given,words",
    [
        ({}, dict(coordinator="a:1"), r"\(flags: coordinator a:1\) needs --num_processes, --process_id"),
        ({}, dict(num_processes=2), "needs --coordinator, --process_id"),
        (POD, {}, r"\(Kubernetes: .*\) needs --num_processes$"),
        ({}, dict(coordinator="a", num_processes=2, process_id=0), "coordinator 'a': expected HOST:PORT"),
        ({}, dict(coordinator="a:99999", num_processes=2, process_id=0), "coordinator 'a:99999'"),
        ({}, dict(coordinator="a:1", num_processes=2, process_id=2), "process_id 2: expected 0 to 1"),
        ({}, dict(coordinator="a:1", num_processes=-2, process_id=0), "num_processes -2"),
    ],
)
def test_what_is_missing_or_wrong_is_named(environ, given, words):
    with pytest.raises(ValueError, match=words):
        find_world(environ, **given)


@pytest.mark.parametrize(
    "text,lost",
    [
        ("UNKNOWN: Gloo AllGather failed: [pair.cc:547] Connection closed by peer [127.0.0.1]:58756", True),
        ("NCCL operation ncclGroupEnd() failed: remote process exited or there was a network error", True),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.", False),
        ("UNAVAILABLE: bucket: recv: Connection reset by peer", False),
    ],
)
def test_a_process_that_is_gone_is_told_from_other_failures(text, lost, monkeypatch, capsys):
    monkeypatch.delenv("JAXGEN_TRACEBACK", raising=False)

    def main():
        raise jax.errors.JaxRuntimeError(text)

    with pytest.raises(SystemExit if lost else jax.errors.JaxRuntimeError):
        cli.run(main)
    said = capsys.readouterr().err
    assert said == (f"error: another process of this run has ended: {text}\n" if lost else "")


def start(workdir, processes, devices, **env):
    """The processes of a run, started; each has `devices` CPU devices."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"127.0.0.1:{server.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(HERE.parents[1])} | env
    worlds = [(place, str(processes), str(i)) for i in range(processes)] if processes > 1 else [()]
    command = [sys.executable, str(HERE / "two_processes.py"), str(workdir)]
    return [
        subprocess.Popen([*command, *world], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for world in worlds
    ]


def finish(started, timeout=90):
    """Exit codes and outputs."""
    outputs = []
    for process in started:
        try:
            outputs.append(process.communicate(timeout=timeout)[0])
        except subprocess.TimeoutExpired:
            for other in started:
                other.kill()
            raise
    return [process.returncode for process in started], outputs


def found(outputs):
    return [json.loads(line[6:]) for text in outputs for line in text.splitlines() if line.startswith("found ")]


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """The undisturbed run on one device of this process."""
    return two_processes.run(tmp_path_factory.mktemp("one"), make_mesh(None, jax.devices()[:1]), lambda line: None)


def close(a, b):
    assert a["params"].keys() == b["params"].keys()
    for name in a["params"]:
        np.testing.assert_allclose(a["params"][name], b["params"][name], rtol=1e-5, atol=1e-6)
    assert a["eval"] == pytest.approx(b["eval"], rel=1e-5)
    assert a["tokens"] == b["tokens"] and len(a["tokens"]) == 14 and len(set(map(tuple, a["tokens"]))) == 14


# One run of two processes is enough for every commit; the others are slow, as each starts Python and JAX two to four times.
slow = pytest.mark.slow


@pytest.mark.parametrize(
    "processes,mesh",
    [(2, "data=2,fsdp=2"), pytest.param(1, "data=2,fsdp=2", marks=slow), pytest.param(2, "fsdp=4", marks=slow)],
)
def test_two_processes_train_and_evaluate_as_one(tmp_path, one_device, processes, mesh):
    cache = tmp_path / "cache"
    kept = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    codes, outputs = finish(start(tmp_path, processes, 4 // processes, MESH=mesh, **kept))
    assert codes == [0] * processes, outputs
    # Programs of several CPU processes are not kept: read back, they hang.
    assert (not cache.exists() or not any(cache.iterdir())) == (processes > 1)
    for index, each in enumerate(found(outputs)):
        assert each["share"] == [index, processes]
        close(each, one_device)
        assert each["batch"]["twice"] == list(range(0, 32, 2))
        assert len(each["batch"]["whole"]) == 3 * processes
    assert len(found(outputs)) == processes
    assert "first 12/12" in outputs[0]
    assert not any("first" in text and "/12" in text for text in outputs[1:])  # only process 0 speaks
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [*range(1, 13), *range(1, 5)]


@slow
def test_hosts_that_hold_the_same_rows_feed_the_same_part(tmp_path, one_device):
    codes, outputs = finish(start(tmp_path, 2, 2, MESH="tensor=4"))
    assert codes == [0, 0], outputs
    for each in found(outputs):
        assert each["share"] == [0, 1]
        close(each, one_device)


@slow
def test_sigterm_on_one_host_saves_the_same_step_on_all_and_one_process_goes_on(tmp_path, one_device):
    started = start(tmp_path, 2, 2, SLOW="0.6")
    while not steps(tmp_path / "checkpoints/first"):
        assert started[0].poll() is None
        time.sleep(0.05)
    started[1].send_signal(signal.SIGTERM)
    codes, outputs = finish(started)
    assert codes == [143, 143], outputs
    said = [text.split("SIGTERM: ")[1].split(";")[0] for text in outputs]
    assert said[0] == said[1] == f"saved stage 'first' at step {steps(tmp_path / 'checkpoints/first')[-1]}"
    codes, outputs = finish(start(tmp_path, 1, 4))
    assert codes == [0]
    assert "first goes on at step" in outputs[0]
    close(found(outputs)[0], one_device)


@slow
def test_a_killed_host_ends_the_others_and_a_restart_goes_on(tmp_path, one_device):
    started = start(tmp_path, 2, 2, SLOW="0.2")
    while not steps(tmp_path / "checkpoints/first"):
        assert started[0].poll() is None
        time.sleep(0.05)
    started[1].kill()
    begin = time.monotonic()
    (code, _), (text, _) = finish(started)
    assert time.monotonic() - begin < 60
    assert code not in (0, None)
    # Whoever sees it first: JAX's runtime, or a collective or save that waits for the other.
    assert "another task died" in text or "another process of this run has ended" in text
    codes, outputs = finish(start(tmp_path, 2, 2))
    assert codes == [0, 0], outputs
    close(found(outputs)[0], one_device)


@slow
def test_a_loss_that_is_not_finite_on_one_host_stops_all_at_the_same_step(tmp_path):
    codes, outputs = finish(start(tmp_path, 2, 2, BAD="33"))
    assert codes == [2, 2], outputs
    said = [text.split("error: ")[1].split(":")[0] for text in outputs]
    assert said[0] == said[1]
    assert said[0].startswith("stage 'first' step ")
