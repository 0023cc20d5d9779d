import threading
import time

import pytest

from jaxgen.train.waiting import saying


def test_lines_come_until_the_block_ends():
    lines, second = [], threading.Event()

    def log(line):
        lines.append(line)
        if len(lines) == 2:
            second.set()

    with saying(lambda: f"at {len(lines)}", every_s=0.05, log=log):
        assert second.wait(10)
    count = len(lines)
    assert lines[:2] == ["still at 0 (0 s)", "still at 1 (0 s)"]
    time.sleep(0.15)
    assert len(lines) == count


def test_news_start_the_count_anew():
    lines, said = [], threading.Event()

    def log(line):
        lines.append(line)
        said.set()

    with saying("first", every_s=0.2, log=log) as now:
        for i in range(10):
            now(f"number {i}")
            time.sleep(0.05)
        assert not lines
        assert said.wait(10)
    assert lines[0] == "still number 9 (0 s)"


def test_a_short_block_says_nothing_and_errors_pass():
    lines = []
    with pytest.raises(KeyError):
        with saying("working", every_s=30.0, log=lines.append):
            raise KeyError
    assert not lines


def test_every_s_has_to_be_positive():
    with pytest.raises(ValueError, match="every_s=0"):
        with saying("working", every_s=0, log=print):
            pass
