"""Plans; compiled ones are looked at in train/test_four_devices.py."""

import dataclasses

import pytest

from jaxgen.plan import CHIPS, Devices, parse_devices, proposals
from jaxgen.recipe import Recipe


@pytest.mark.parametrize(
    "name,kind,count,topology", [("v5e-64", "v5e", 64, "8x8"), ("v5p-128", "v5p", 64, "4x4x4"), ("v4-8", "v4", 4, "2x2x1")]
)
def test_slices_as_cloud_tpu_names_them(name, kind, count, topology):
    devices = parse_devices(name)
    assert devices.chip is CHIPS[kind] and devices.count == count
    assert devices.chip.topologies[count] == topology
    sides = [int(n) for n in topology.split("x")]
    assert count == sides[0] * sides[1] * (sides[2] if len(sides) == 3 else 1)


def test_every_topology_has_its_number_of_chips():
    for chip in CHIPS.values():
        for count, name in (chip.topologies or {}).items():
            size = 1
            for side in name.split("x"):
                size *= int(side)
            assert size == count


def test_gpus_come_in_any_number():
    assert parse_devices("h100-24") == Devices("h100-24", CHIPS["h100"], 24)


@pytest.mark.parametrize("name", ["v5e", "v5e-", "x9-4", "h100-0", "h100-two", "v5e-5", "v5p-7"])
def test_unknown_devices_are_named(name):
    with pytest.raises(ValueError, match=f"--device '{name}'"):
        parse_devices(name)


def test_too_few_devices_to_plan_with():
    with pytest.raises(ValueError, match="--device h100-64: this process has"):
        parse_devices("h100-64").devices()


@dataclasses.dataclass(frozen=True)
class Model:
    remat: bool = False


@dataclasses.dataclass(frozen=True)
class Train:
    accumulate: int = 1
    batch_size: int = 16


@dataclasses.dataclass(frozen=True)
class Config:
    model: Model = Model()
    model_train: Train = Train()

    def recipe(self):
        return Recipe(config=self, stages=(), sample=None)


def test_proposals_end_with_the_first_that_fits():
    tried = []

    def plan(recipe, devices, mesh, only):
        tried.append(recipe.config)
        return iter([{"fits": recipe.config.model.remat and recipe.config.model_train.accumulate >= 4}])

    found = list(proposals(Config().recipe(), parse_devices("h100-4"), plan=plan))
    assert [edits for _, edits, _ in found] == [
        [],
        ["model.remat=true"],
        ["model.remat=true", "model_train.accumulate=2"],
        ["model.remat=true", "model_train.accumulate=4"],
    ]
    assert {mesh for mesh, _, _ in found} == {"fsdp=4"}
    assert tried[-1] == Config(Model(True), Train(4))


def test_proposals_halve_the_batch_at_last_and_then_give_up():
    found = list(proposals(Config().recipe(), parse_devices("h100-4"), plan=lambda *_, **__: iter([{"fits": False}])))
    assert [edits[1:] for _, edits, _ in found[-2:]] == [
        ["model_train.batch_size=8", "model_train.accumulate=2"],
        ["model_train.batch_size=4", "model_train.accumulate=1"],
    ]
