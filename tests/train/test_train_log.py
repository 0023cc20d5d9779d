import json

import pytest

from jaxgen.train import MetricsLog, Progress


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_appended(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write("first", 1, {"loss": 0.5, "finite": True})
        assert rows(log.path) == [{"stage": "first", "step": 1, "loss": 0.5, "finite": 1.0}]  # on disk at once
    with MetricsLog(tmp_path) as log:
        log.write("first", 2, {"loss": float("nan"), "norm": float("inf")})
    assert rows(tmp_path / "metrics.jsonl")[1:] == [{"stage": "first", "step": 2, "loss": None, "norm": None}]


def test_rewinding_drops_what_will_come_again(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.rewind("first", 0)  # nothing there yet
        for step in (1, 2, 3):
            log.write("first", step, {"loss": step})
            log.write("second", step, {"loss": step})
        with log.path.open("a") as file:
            file.write('{"stage": "first", "st')  # killed while writing
        log.rewind("first", 1)
        log.write("first", 2, {"loss": 9})
    assert [(r["stage"], r["step"], r["loss"]) for r in rows(tmp_path / "metrics.jsonl")] == [
        ("first", 1, 1), ("second", 1, 1), ("second", 2, 2), ("second", 3, 3), ("first", 2, 9)
    ]  # fmt: skip


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with MetricsLog(tmp_path) as log, pytest.raises(ValueError, match="cannot write .*/metrics.jsonl: Is a directory"):
        log.write("first", 1, {})


@pytest.mark.parametrize("flag, module", [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_dashboards_that_are_not_installed(tmp_path, monkeypatch, flag, module):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ValueError, match=rf"{flag}=True needs the package {module}: pip install 'jaxgen\[logging\]'"):
        MetricsLog(tmp_path, **{flag: True})


def test_dashboards_get_every_number(tmp_path, monkeypatch):
    calls = []

    class Writer:
        def __init__(self, logdir):
            calls.append(logdir)

        def add_scalar(self, *args):
            calls.append(args)

        def close(self):
            calls.append("closed")

    class Wandb:
        @staticmethod
        def init(**kwargs):
            calls.append(kwargs["name"])
            return Wandb

        @staticmethod
        def log(values):
            calls.append(values)

        @staticmethod
        def finish():
            calls.append("finished")

    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", type("tensorboardX", (), {"SummaryWriter": Writer}))
    monkeypatch.setitem(__import__("sys").modules, "wandb", Wandb)
    with MetricsLog(tmp_path, tensorboard=True, wandb=True) as log:
        log.write("first", 3, {"loss": 0.5})
    assert calls == [
        f"{tmp_path}/tensorboard",
        tmp_path.name,
        ("first/loss", 0.5, 3),
        {"first/loss": 0.5, "first/step": 3},
        "closed",
        "finished",
    ]


def test_progress_lines():
    now, lines = [100.0], []
    progress = Progress("first", 10, 2000, 5.0, lines.append, clock=lambda: now[0])
    for step, time in ((20, 102.0), (60, 105.0), (70, 106.0), (160, 115.0), (2000, 116.0)):
        now[0] = time
        progress.update(step, {"loss": 0.12345})
    assert lines == [
        "first 60/2000  loss 0.1235  10 steps/s  3m14s left",  # 50 steps in 5 s, 1940 to go
        "first 160/2000  loss 0.1235  10 steps/s  3m04s left",
        "first 2000/2000  loss 0.1235  1840 steps/s  0s left",
    ]
    lines.clear()
    progress = Progress("slow", 0, 10_000, 5.0, lines.append, clock=lambda: now[0])
    now[0] += 10
    progress.update(10, {})
    assert lines[0].endswith("1 steps/s  2h46m left")
