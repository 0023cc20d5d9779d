import numpy as np
import pytest

from jaxgen.orders import Neighbours, Order, blocks, raster, scales


def test_scales_number_the_maps_coarse_to_fine():
    order = scales((1, 2, 3))
    assert order.shapes == ((1, 1), (2, 2), (3, 3))
    assert order.sizes == (1, 4, 9) and order.ends == (1, 5, 14)
    assert order.steps == 3 and order.length == 14
    assert [order.span(k) for k in range(3)] == [(0, 1), (1, 5), (5, 14)]
    assert order.step_of.dtype == np.int32
    np.testing.assert_array_equal(order.step_of, [0] + [1] * 4 + [2] * 9)


def test_published_scales_have_the_published_length():
    assert scales((1, 2, 3, 4, 5, 6, 8, 10, 13, 16)).length == 680
    assert scales((1, 2, 3, 4, 6, 9, 13, 18, 24, 32)).length == 2240


def test_oblong_scales():
    order = scales(((1, 2), (2, 2), (2, 5)))
    assert order.sizes == (2, 4, 10) and order.shapes[-1] == (2, 5)


def test_raster_is_a_position_a_step():
    order = raster(4)
    assert order.steps == order.length == 4
    np.testing.assert_array_equal(order.step_of, range(4))


def test_blocks_are_runs_and_the_last_may_be_short():
    assert blocks(7, 3).sizes == (3, 3, 1) and blocks(6, 3).sizes == (3, 3)
    assert blocks(4, 1) == raster(4) and blocks(4, 9).sizes == (4,)


def test_coords_lie_in_each_grid():
    order = scales(((1, 2), (2, 3)))
    assert order.coords.dtype == np.int32
    np.testing.assert_array_equal(order.coords, [[0, 0, 0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 2, 0, 1, 2]])
    np.testing.assert_array_equal(blocks(5, 3).coords, [[0, 1, 2, 0, 1]])
    with pytest.raises(ValueError, match="read-only"):
        order.coords[0] = 1
    with pytest.raises(ValueError, match="grids of one rank"):
        _ = Order(((2,), (2, 2))).coords


def test_split_cuts_where_steps_end():
    order = scales((1, 2))
    x = np.arange(2 * 5 * 3).reshape(2, 5, 3)
    first, second = order.split(x)
    np.testing.assert_array_equal(first, x[:, :1])
    np.testing.assert_array_equal(second, x[:, 1:])
    parts = order.split(x.transpose(1, 0, 2), axis=0)
    assert [p.shape for p in parts] == [(1, 2, 3), (4, 2, 3)]
    with pytest.raises(ValueError, match="has 3 positions; the order has 5"):
        order.split(x, axis=2)


def test_orders_are_values():
    assert scales([1, 2]) == scales((np.int64(1), (2, 2))) and hash(scales((1, 2))) == hash(scales((1, 2)))
    assert scales((1, 2)) != scales((1, 3))
    with pytest.raises(ValueError, match="read-only"):
        scales((1, 2)).step_of[0] = 1


@pytest.mark.parametrize(
    ("patch_nums", "message"),
    [
        ((), "at least one step"),
        ((0, 2), "positive"),
        ((1, 3, 2), "must not decrease"),
        (((1, 3), (2, 2)), "must not decrease"),
        ((1, 2.5), "whole numbers"),
        (((1, 2, 3),), "whole numbers"),
    ],
)
def test_bad_scales(patch_nums, message):
    with pytest.raises(ValueError, match=message):
        scales(patch_nums)


def test_bad_shapes():
    with pytest.raises(ValueError, match="positive sizes"):
        Order(((2, 0),))
    with pytest.raises(ValueError, match="at least one step"):
        raster(0)
    for length, size in ((0, 1), (4, 0)):
        with pytest.raises(ValueError, match=f"length={length} and size={size}"):
            blocks(length, size)


def test_neighbours_come_by_their_distance():
    neighbours = Neighbours((3, 2))
    assert neighbours.order.sizes == (1, 2, 2, 1)
    #  0 1      0 1
    #  2 3  ->  2 3
    #  4 5      4 5
    np.testing.assert_array_equal(neighbours.index, [0, 1, 2, 3, 4, 5])
    wide = Neighbours((2, 3))
    np.testing.assert_array_equal(wide.index, [0, 1, 3, 2, 4, 5])  # 0 1 2 above 3 4 5
    np.testing.assert_array_equal(wide.coords, [[0, 0], [0, 1], [1, 0], [0, 2], [1, 1], [1, 2]])
    np.testing.assert_array_equal(wide.before, [[-1, -1], [-1, 0], [0, -1], [-1, 1], [1, 2], [3, 4]])
    x = np.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(wide.split(x)[0], wide.index)
    np.testing.assert_array_equal(wide.join(wide.split(x)), x)


def test_neighbours_take_as_many_steps_as_published():
    """2n - 1 for images (n = 16) and t + h + w - 2 for clips."""
    assert Neighbours((16, 16)).order.steps == 31 and Neighbours((4, 16, 16)).order.steps == 34
    for shape in ((3, 4), (2, 3, 4)):
        neighbours = Neighbours(shape)
        np.testing.assert_array_equal(neighbours.coords.sum(1), neighbours.order.step_of)
        for i, row in enumerate(neighbours.before):
            for axis, j in enumerate(row):
                step = np.eye(len(shape), dtype=int)[axis]
                if neighbours.coords[i, axis]:
                    np.testing.assert_array_equal(neighbours.coords[j] + step, neighbours.coords[i])
                else:
                    assert j == -1
    for shape in ((), (3, 0)):
        with pytest.raises(ValueError, match="at least one axis and positive sizes"):
            _ = Neighbours(shape).order
