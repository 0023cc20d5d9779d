"""Where activations lie; what comes of it on real devices is looked at in train/test_four_devices_models.py."""

import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from jaxgen.nn.placement import join_heads, place_rows, place_stream, split_heads
from jaxgen.train.mesh import AXES
from kernels_pallas import partitioned, target

X = jnp.zeros((2, 4, 3, 8))


def mesh(*sizes):
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def test_without_a_partition_nothing_is_done():
    assert place_rows(X) is X and place_stream(X) is X and join_heads(X) is X and split_heads(X, X) == (X, X)


def test_heads_that_cannot_be_traded_for_positions_are_named():
    text = r"3 heads cannot be split over tensor\*sequence=4 devices"
    with target("cpu"), partitioned(mesh(1, 1, 2, 2)), pytest.raises(ValueError, match=text):
        split_heads(X)
