"""Real generators on meshes of four: the same updates as on one device, and no device with all logits of its batch."""

import pytest

pytestmark = pytest.mark.numeric

TRAINED = ("data=2,tensor=2", "data=2,sequence=2", "tensor=2,sequence=2")


@pytest.fixture(scope="module")
def results(run_with_four_devices):
    return run_with_four_devices("four_devices_models.py")


@pytest.mark.parametrize("system", ("var", "llamagen"))
@pytest.mark.parametrize("mesh", TRAINED)
def test_updates_equal_those_of_one_device(results, system, mesh):
    """Loss and norm of the gradient, before and after an update."""
    assert results[system][mesh]["told"] == pytest.approx(results[system]["data=1"]["told"], rel=2e-6)


@pytest.mark.parametrize("system", ("var", "llamagen"))
def test_no_device_has_all_logits(results, system):
    """Split over rows and the vocabulary, or rows and positions: a quarter of them, no whole vocabulary by `tensor`."""
    found = results[system]
    assert found["data=1"]["logits"] == found["all"]
    assert found["data=2,sequence=2"]["logits"] <= found["all"] / 4
    for mesh in ("data=2,tensor=2", "tensor=2,sequence=2"):
        assert found[mesh]["logits"] == 0


@pytest.mark.parametrize("system", ("var", "llamagen"))
def test_only_sequences_are_traded(results, system):
    """Positions are traded for heads and back where the mesh has the axis; replicas and tensors only sum and gather."""
    assert set(results[system]["data=2,tensor=2"]["collectives"]) <= {"all-reduce", "all-gather"}
    for mesh in ("data=2,sequence=2", "tensor=2,sequence=2"):
        assert "all-to-all" in results[system][mesh]["collectives"]


@pytest.mark.parametrize("system", ("var", "llamagen", "cspd"))
def test_traffic_of_a_device_does_not_grow_with_their_number(results, system):
    """Parameters are gathered and gradients reduced, whatever the number of devices; activations stay where they are.

    Left to itself the compiler gathers activations in scanned blocks, and the traffic is 1.8 times as much.
    """
    two, four = results["traffic"][system]
    assert 0 < two and four <= 1.01 * two


def test_a_recurrence_meets_the_devices_once(results):
    """Weights are gathered and gradients summed once a sequence, not once a step."""
    short, long = results["recurrence"]
    assert 0 < short["fsdp=4"]["count"] == long["fsdp=4"]["count"]
    for found in (short, long):
        assert found["fsdp=1"]["count"] == 0 and found["fsdp=4"]["norm"] == pytest.approx(found["fsdp=1"]["norm"], rel=1e-5)
