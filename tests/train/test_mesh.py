import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxgen.train import batch_sharding, make_mesh, parse_mesh, shard_batch, shardings


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(None, jax.devices()[:1])


def tree(**shapes):
    return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}


def test_parse_mesh():
    assert parse_mesh("data=2,fsdp=4") == {"data": 2, "fsdp": 4}
    assert parse_mesh(" tensor = 3 ") == {"tensor": 3}


@pytest.mark.parametrize(
    "spec, message",
    [
        ("data", "'data' is not axis=size"),
        ("data=two", "'data=two' is not axis=size"),
        ("data=0", "'data=0' is not axis=size"),
        ("data=-1", "'data=-1' is not axis=size"),
        ("data=2,", "'' is not axis=size"),
        ("model=2", "unknown axis 'model'; known: data, fsdp, tensor"),
        ("data=2,data=2", "axis 'data' is given twice"),
    ],
)
def test_parse_mesh_names_what_is_wrong(spec, message):
    with pytest.raises(ValueError) as error:
        parse_mesh(spec)
    assert message in str(error.value) and repr(spec) in str(error.value)


def test_make_mesh(mesh):
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)
    assert dict(make_mesh().shape) == {"data": jax.device_count(), "fsdp": 1, "tensor": 1, "sequence": 1}
    with pytest.raises(ValueError, match="'data=2,fsdp=3' needs 6 devices, there are 1"):
        make_mesh("data=2,fsdp=3", jax.devices()[:1])


def test_axes_that_split_nothing_are_dropped(mesh):
    placed = shardings(mesh, tree(w=(3, 5)), [("w", P("data", ("fsdp", "tensor")))])
    assert placed["w"].spec == P(None, None)


def test_bad_rules_are_named(mesh):
    with pytest.raises(ValueError, match=r"w: .* more entries than shape \(4,\)"):
        shardings(mesh, tree(w=(4,)), [("w", P(None, "fsdp"))])
    with pytest.raises(ValueError, match="w: .* unknown axis 'fdsp'"):
        shardings(mesh, tree(w=(4,)), [("w", P("fdsp"))])


def test_shard_batch(mesh):
    batch = {"image": np.arange(12, dtype=np.uint8).reshape(4, 3), "label": np.arange(4, dtype=np.int32)}
    placed = shard_batch(mesh, batch)
    assert placed["image"].sharding == batch_sharding(mesh)
    for name in batch:
        assert placed[name].dtype == batch[name].dtype
        np.testing.assert_array_equal(placed[name], batch[name])
    with pytest.raises(ValueError, match=r"'image': \(4,\), 'label': \(3,\)"):
        shard_batch(mesh, {**batch, "label": np.arange(3)})
    with pytest.raises(ValueError, match="leading axis"):
        shard_batch(mesh, {"count": np.int32(3)})
