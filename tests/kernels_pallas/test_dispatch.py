import sys
import types

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import current_device, dispatch, explain, target
from kernels_pallas.device import Device


class Even:
    """A backend for even sizes."""

    @staticmethod
    def refuses(problem, device):
        return f"size {problem} is odd" if problem % 2 else None


class Anything:
    @staticmethod
    def refuses(problem, device):
        return None


class Unloadable:
    """A backend whose module must not be looked at where its platform is not there."""

    def __getattr__(self, name):
        raise AssertionError("looked at")


@pytest.fixture(autouse=True)
def backends(monkeypatch):
    module = types.ModuleType("toy_backends")
    module.even, module.anything = Even, Anything
    monkeypatch.setitem(sys.modules, "toy_backends", module)
    return module


FAST = dispatch.Implementation("fast", "toy_backends:fast", platforms=("tpu",))
NEAT = dispatch.Implementation("neat", "toy_backends:even")
ALWAYS = dispatch.Implementation("xla", "toy_backends:anything")
ALL = (FAST, NEAT, ALWAYS)


def op(x, implementation=None):
    chosen, _ = dispatch.choose("op", ALL, x.shape[0], implementation)
    return x * (ALL.index(chosen) + 1)


def test_the_first_that_can_is_picked(backends):
    backends.fast = Unloadable()
    assert op(jnp.ones(2))[0] == 2 and op(jnp.ones(3))[0] == 3
    backends.fast = Anything
    with target("v5p"):
        assert op(jnp.ones(3))[0] == 1


def test_a_named_one_runs_or_fails():
    assert op(jnp.ones(2), "xla")[0] == 3
    with pytest.raises(ValueError, match="implementation='fast' cannot run on cpu cpu: it is for tpu"):
        op(jnp.ones(2), "fast")
    with pytest.raises(ValueError, match="'fats' is not one of fast, neat, xla"):
        op(jnp.ones(2), "fats")
    with pytest.raises(ValueError, match="nothing can run on cpu cpu: fast: it is for tpu; neat: size 3 is odd"):
        dispatch.choose("op", (FAST, NEAT), 3)


def test_explain_lists_every_call_with_its_reasons(backends):
    backends.fast = Anything

    def model(x, y):
        return op(x).sum() + op(y, implementation="xla").sum()

    first, second = explain(model, jax.ShapeDtypeStruct((3,), jnp.float32), jnp.ones(2))
    assert first.implementation == "xla" and not first.forced
    assert [name for name, _ in first.refused] == ["fast", "neat"]
    assert "not neat: size 3 is odd" in str(first)
    assert second.forced and second.problem == 2 and second.refused == ()
    with target("v5e"):
        assert explain(op, jnp.ones(3))[0].implementation == "fast"


def test_targets():
    assert current_device() == Device("cpu", "cpu")
    with target("h200", interpret=True) as device:
        assert device.hopper and device.interpret and current_device() == device
        with target("a100"):
            assert not current_device().hopper
        assert current_device() == device
    with pytest.raises(ValueError, match="kind='v5' is not one of cpu, v4"):
        with target("v5"):
            pass
