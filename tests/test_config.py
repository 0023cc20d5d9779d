import dataclasses
import json

import flax.linen as nn
import pytest

from jaxgen.config import fields_of, from_json, override, to_json
from jaxgen.optim import OptimConfig


@dataclasses.dataclass(frozen=True)
class Model:
    depth: int = 2
    rate: float = 0.5
    name: str = "base"
    flash: bool = False
    patch_nums: tuple[int, ...] = (1, 2, 3)
    clip: float | None = None
    tags: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Config:
    model: Model = Model()
    steps: int = 10


@pytest.mark.parametrize(
    "edit, field, value",
    [
        ("model.depth=4", "depth", 4),
        ("model.rate=1e-3", "rate", 1e-3),
        ("model.rate=2", "rate", 2.0),
        ("model.name=a=b c", "name", "a=b c"),
        ("model.flash=True", "flash", True),
        ("model.flash=false", "flash", False),
        ("model.patch_nums=1,2,4", "patch_nums", (1, 2, 4)),
        ("model.patch_nums=(8,)", "patch_nums", (8,)),
        ("model.patch_nums=", "patch_nums", ()),
        ("model.clip=0.5", "clip", 0.5),
        ("model.clip=none", "clip", None),
        ("model.tags=a,b", "tags", ("a", "b")),
        (" model.depth = 7", "depth", 7),
    ],
)
def test_override(edit, field, value):
    config = override(Config(), [edit])
    assert getattr(config.model, field) == value
    assert type(getattr(config.model, field)) is type(value)
    assert dataclasses.replace(config.model, **{field: getattr(Model(), field)}) == Model()  # nothing else changed


def test_override_applies_in_order_and_leaves_the_original():
    config = Config()
    assert override(config, ["steps=3", "model.depth=5", "steps=4"]) == Config(Model(depth=5), 4)
    assert config == Config()


@pytest.mark.parametrize(
    "edit, message",
    [
        ("model.depth", "expected key=value"),
        ("model.deep=4", "model.deep: unknown key 'deep'; known: depth, rate"),
        ("modle.depth=4", "unknown key 'modle'; known: model, steps"),
        ("model=4", "'model' is a group; set one of its fields: depth"),
        ("steps.depth=4", "'steps' has no fields"),
        ("model.depth=4.5", "model.depth=4.5: expected int"),
        ("model.depth=four", "model.depth=four: expected int"),
        ("model.depth=True", "model.depth=True: expected int"),
        ("model.rate=fast", "model.rate=fast: expected float"),
        ("model.flash=1", "model.flash=1: expected bool"),
        ("model.patch_nums=1,x", "model.patch_nums=x: expected int"),
        ("model.clip=low", "model.clip=low: expected float"),
        ("model.depth=__import__('os')", "expected int"),
    ],
)
def test_override_names_what_is_wrong(edit, message):
    with pytest.raises(ValueError) as error:
        override(Config(), [edit])
    assert message in str(error.value)


def test_json_round_trip():
    config = OptimConfig(lr=0.1 + 0.2, no_decay=("a", "b"), weight_decay_end=None, schedule="cosine", clip=1.0)
    tree = json.loads(json.dumps(to_json(config)))
    assert tree["type"] == "jaxgen.optim:OptimConfig"
    assert from_json(tree) == config
    assert to_json(Config(Model(patch_nums=(1, 2))))["model"]["patch_nums"] == [1, 2]


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"lr": 1.0}, "config type None is not one of jaxgen's"),
        ({"type": "os:system"}, "'os:system' is not one of jaxgen's"),
        ({"type": "jaxgenx.optim:OptimConfig"}, "is not one of jaxgen's"),
        ({"type": "jaxgen.optim:Optim"}, "'jaxgen.optim:Optim' does not exist"),
        ({"type": "jaxgen.optim:OptimConfig", "speed": 3}, r"OptimConfig: unknown fields \['speed'\]"),
        ({"type": "jaxgen.recipes.next_scale:NextScaleConfig"}, r"NextScaleConfig: lacks the fields .*data \(now .*\)"),
    ],
)
def test_json_names_what_is_wrong(tree, message):
    with pytest.raises(ValueError, match=message):
        from_json(tree)


def test_a_field_that_an_older_file_lacks_takes_its_default_and_is_named():
    tree = to_json(OptimConfig(lr=0.5))
    del tree["clip"]
    with pytest.warns(UserWarning, match=r"OptimConfig: lacks the fields clip \(now .*\); what they are now is taken"):
        assert from_json(tree) == OptimConfig(lr=0.5)


def test_fields_that_two_classes_share():
    @dataclasses.dataclass(frozen=True)
    class Small:
        width: int = 1
        depth: int = 2

    @dataclasses.dataclass(frozen=True)
    class Large:
        depth: int = 3
        heads: int = 4

    assert fields_of(Small()) == {"width": 1, "depth": 2}
    assert fields_of(Large(depth=7), Small) == {"depth": 7}
    module = nn.Dense(5, use_bias=False, name="head")
    assert fields_of(module, nn.DenseGeneral)["features"] == 5
    assert not {"name", "parent"} & fields_of(module, nn.DenseGeneral).keys()
