"""Processes meet before JAX connects them: here they are threads."""

import json
import socket
import threading

import jax
import pytest

from jaxgen.train.meeting import meet


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def together(port, worlds, wait_s=5.0, **fields):
    """What `meet` raised, or None, and the lines it logged, for processes `(number, world size)`."""
    found, lines = {}, {}

    def run(place, number, total):
        said = lines.setdefault(place, [])
        try:
            meet(f"127.0.0.1:{port}", total, number, wait_s=wait_s, log=said.append, **fields)
            found[place] = None
        except ValueError as error:
            found[place] = str(error)

    threads = [threading.Thread(target=run, args=(i, *world)) for i, world in enumerate(worlds)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return found, lines


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_all_go_once_all_have_come(port, order):
    found, lines = together(port, [(number, 3) for number in order])
    assert found == {0: None, 1: None, 2: None}
    assert not any(lines.values())


def test_the_port_is_free_afterwards(port):
    for _ in range(2):
        found, _ = together(port, [(0, 2), (1, 2)])
        assert found == {0: None, 1: None}
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_those_who_wait_say_for_whom_and_give_up(port):
    found, lines = together(port, [(0, 4), (2, 4)], wait_s=1.0, every_s=0.4)
    assert found[0] == found[1] == f"gave up after 1 s: processes 1, 3 of 4 never came to port {port} of process 0"
    assert lines[0][0] == f"still waiting for processes 1, 3 of 4 at port {port} (0 s)"
    assert lines[1][0] == f"still waiting for process 0 at 127.0.0.1:{port} (0 s)"


def test_nobody_at_the_coordinator(port):
    found, lines = together(port, [(1, 2)], wait_s=0.7, every_s=0.3)
    assert found[0].startswith(f"process 1 gave up after 0.7 s: process 0 does not answer at 127.0.0.1:{port} (")
    assert lines[0]


@pytest.mark.parametrize("first,second", [(2, 3), (3, 2)])
def test_world_sizes_that_differ_are_an_error_everywhere(port, first, second):
    found, _ = together(port, [(0, first), (1, second)])
    assert found[0] == found[1]
    assert f"has a world of {second} processes, process 0 has {first}" in found[0]


def test_one_number_twice(port):
    found, _ = together(port, [(0, 3), (1, 3), (1, 3)])
    assert "two processes have the number 1" in found[0]
    assert found[0] in (found[1], found[2])


def test_a_process_that_was_started_anew_takes_its_own_place(port):
    done = {}
    host = threading.Thread(target=lambda: done.update(together(port, [(0, 3)])[0]))
    host.start()
    with visitor(port) as peer:
        peer.sendall(json.dumps({"process_id": 1, "num_processes": 3, "jax": jax.__version__}).encode() + b"\n")
    found, _ = together(port, [(1, 3), (2, 3)])
    host.join()
    assert found == {0: None, 1: None}
    assert done == {0: None}


def test_another_version_of_jax(port):
    done = {}
    host = threading.Thread(target=lambda: done.update(together(port, [(0, 2)])[0]))
    host.start()
    with visitor(port) as peer:
        peer.sendall(json.dumps({"process_id": 1, "num_processes": 2, "jax": "0.0.1"}).encode() + b"\n")
        answer = json.loads(peer.makefile().readline())
    host.join()
    assert answer["problem"] == done[0]
    assert f"has jax 0.0.1, process 0 has {jax.__version__}" in done[0]


@pytest.mark.parametrize("words", [b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"process_id": 1}\n', b""])
def test_strangers_are_not_taken_for_processes(port, words):
    done = {}
    host = threading.Thread(target=lambda: done.update(together(port, [(0, 2)])[0]))
    host.start()
    with visitor(port) as peer:
        peer.sendall(words)
    meet(f"127.0.0.1:{port}", 2, 1, wait_s=5.0)
    host.join()
    assert done == {0: None}


def visitor(port):
    for _ in range(100):
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=5)
        except OSError:
            threading.Event().wait(0.05)
    raise AssertionError("nobody listens")


def test_a_port_that_is_taken(port):
    with socket.create_server(("", port)):
        with pytest.raises(ValueError, match=f"process 0 cannot listen at port {port}"):
            meet(f"127.0.0.1:{port}", 2, 0, wait_s=1.0)
