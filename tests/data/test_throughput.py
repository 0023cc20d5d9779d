import time

import pytest

from jaxgen.data.throughput import Throughput


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def run(data, device, python, steps=4):
    clock = Clock()
    meter = Throughput(clock)
    for _ in range(steps):
        with meter.input():
            clock.now += data
        with meter.device():
            clock.now += device
        clock.now += python
        meter.step(examples=8)
    return meter


@pytest.mark.parametrize(
    "times, bottleneck, words",
    [
        ((0.6, 0.1, 0.3), "input", "the data is"),
        ((0.01, 0.9, 0.09), "device", "the devices are"),
        ((0.02, 0.03, 0.95), "host", "the loop is"),
    ],
)
def test_where_the_time_goes(times, bottleneck, words):
    meter = run(*times)
    found = meter.report()
    assert found["bottleneck"] == bottleneck and f"{words} the bottleneck" in meter.line()
    assert (found["input_share"], found["device_share"]) == pytest.approx(times[:2])
    assert (found["steps_per_s"], found["examples_per_s"]) == pytest.approx((1, 8))
    assert meter.line().startswith("8 examples/s")


def test_a_reset_forgets():
    meter = run(0.9, 0.0, 0.1)
    meter.reset()
    meter._clock.now += 2
    assert meter.report()["input_share"] == 0 and meter.report()["steps_per_s"] == 0


def test_waiting_that_fails_counts():
    clock = Clock()
    meter = Throughput(clock)
    with pytest.raises(StopIteration), meter.input():
        clock.now += 1
        raise StopIteration
    assert meter.report()["input_share"] == 1


def test_real_waiting():
    meter = Throughput()
    with meter.input():
        time.sleep(0.05)
    assert meter.report()["bottleneck"] == "input"
