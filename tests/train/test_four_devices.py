"""Meshes of several devices, on one CPU that pretends to be four; everything runs in one process started here."""

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def results(run_with_four_devices):
    return run_with_four_devices("four_devices.py")


def test_sharded_training_equals_one_device(results):
    assert results["init"] < 1e-6
    assert results["moved"] > 0.01
    for run in ("four", "micro"):
        assert results[run]["state"] < 1e-5
        assert results[run]["losses"] < 1e-5


def test_moments_and_average_lie_where_their_parameters_do(results):
    for mesh, cut in {"one": 1, "two": 2, "four": 2, "four/real": 2, "micro/real": 2, "fsdp": 4, "tensor": 2}.items():
        found = results["pieces"][mesh]
        kernels = {name: n for name, n in found.items() if name.endswith("in/kernel")}
        assert len(kernels) == 4  # parameter, average, two moments
        assert set(kernels.values()) == {cut}
        assert all(n == 1 for name, n in found.items() if not name.endswith("kernel"))


def test_a_checkpoint_of_four_devices_goes_on_on_one_and_two(results):
    for name, devices in (("one", 1), ("two", 2)):
        restored = results[f"restore/{name}"]
        assert restored["state"] == 0
        assert restored["pieces"]["params/params/in/kernel"] == devices
        assert restored["losses"] < 1e-5


def test_load_params_places_them(results):
    assert results["load_params"]["devices"] == 1
    assert results["load_params/four"]["pieces"]["params/in/kernel"] == 2
    assert results["load_params/four"]["pieces"]["params/in/bias"] == 1


def test_the_loop_on_a_mesh(results):
    assert results["train"]["same"]
    assert results["train"]["pieces"]["params/out/kernel"] == 4
    assert results["train"]["eval"] == pytest.approx(results["train"]["mean"], abs=1e-6)
    assert results["train"]["eval"] == pytest.approx(results["evaluate/one"], abs=1e-6)


def test_errors_name_the_numbers(results):
    errors = results["errors"]
    assert errors["product"] == "mesh 'data=3' needs 3 devices, there are 4"
    assert errors["batch"] == "a batch of 6 examples cannot be split over data*fsdp=4 devices"
    assert "batch of 16 examples cannot be split into accumulate=8 micro-batches over data*fsdp=4" in errors["micro"]
    assert errors["dimension"] == "params/out/kernel: shape (8, 2) has a dimension 2 that fsdp=4 does not divide"


def test_collectives_of_an_update(results):
    """Replicas average gradients, loss and one metric in one go, once for each micro-batch; nothing else travels."""
    floats = 4 * 8 + 8 + 8 * 2 + 2
    assert results["traffic"]["data"] == {"all-reduce": [1, 4 * floats]}
    assert results["traffic"]["data/micro"] == {"all-reduce": [2, 2 * 4 * floats]}
    # Split parameters are gathered; they and what is replicated are reduced.
    assert {name: count for name, (count, _) in results["traffic"]["fsdp"].items()} == {"all-gather": 2, "all-reduce": 3}
    gathered = 4 * (4 * 8 + 8 * 2)
    assert results["traffic"]["fsdp"]["all-gather"][1] == gathered


def test_gradients_are_summed_once_an_update_in_the_type_asked_for(results):
    found = results["reduced"]
    floats = 4 * 8 + 8 + 8 * 2 + 1  # with the loss
    assert found["None"]["traffic"]["all-reduce"][0] == 2 and found["None"]["types"] == ["bf16"]
    assert found["float32"]["types"] == ["f32"] and found["bfloat16"]["types"] == ["bf16"]
    for dtype in ("float32", "bfloat16"):
        assert {kind: count for kind, (count, _) in found[dtype]["traffic"].items()} == {"all-reduce": 1}
    assert found["float32"]["traffic"]["all-reduce"][1] == 4 * floats
    assert found["plan/float32"] == 1 < found["plan/None"]
    one, exact, rounded = (found[name] for name in ("one/None", "data/float32", "data/bfloat16"))

    def difference(a, b):
        return max(np.abs(np.subtract(x, y)).max() for x, y in zip(a["params"], b["params"]))

    assert difference(one, exact) < 1e-6 and np.abs(np.subtract(one["losses"], exact["losses"])).max() < 1e-5
    assert 1e-5 < difference(one, rounded) < 1e-2
    assert found["said"] == ["first: reduce_dtype=float32 is left out, as the stage's state has to see whole batches"]
    assert found["draws"] == [4 * 2, 4 * 2]  # each device's own, in each micro-batch
    errors = results["errors"]
    assert "splits parameters" in errors["reduce/train"] and not Path("never").exists()
    mesh = "{'data': 2, 'fsdp': 2, 'tensor': 1, 'sequence': 1}"
    assert errors["reduce/mesh"].startswith(f"reduce_dtype='float32': mesh {mesh} splits parameters")
    assert errors["reduce/state"] == "reduce_dtype='float32': stage 'first' has a state that has to see whole batches"
    assert errors["reduce/type"] == "reduce_dtype='int8': expected one of float32, bfloat16"
    assert errors["reduce/rules"] == "reduce_dtype='float32': stage 'first' splits parameters over data"


def test_plans(results):
    data, fsdp, tiny = (results["plan"][name] for name in ("data=4", "fsdp=4", "tiny"))
    assert data["mesh"] == "data=4" and fsdp["mesh"] == "fsdp=4"
    assert data["batch"] == fsdp["batch"] == 16
    assert data["collectives"] == 1 and fsdp["collectives"] > 1
    assert results["plan"]["reduced"] == data
    assert data["fits"] and fsdp["fits"] and not tiny["fits"]
