import numpy as np

from jaxgen import masks
from jaxgen.orders import raster, scales


def test_scales_see_themselves_and_all_before():
    drawn = masks.draw(masks.block_causal(scales((1, 2, (2, 3)))))
    assert drawn.splitlines() == ["#.........."] + ["#####......"] * 4 + ["###########"] * 6


def test_a_raster_is_causal():
    assert masks.draw(masks.block_causal(raster(3))).splitlines() == ["#..", "##.", "###"]


def test_published_mask():
    patch_nums = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    mask = masks.block_causal(scales(patch_nums))
    ends = np.cumsum(np.square(patch_nums))
    seen = np.repeat(ends, np.square(patch_nums))  # a position sees everything up to the end of its scale
    np.testing.assert_array_equal(mask.dense().sum(1), seen)
    np.testing.assert_array_equal(mask.dense(), np.arange(680)[None] < seen[:, None])


def test_blocks_are_planned_and_may_be_chosen():
    mask = masks.block_causal(scales((1, 2, 4)), block=(5, 4))
    # Rows 0-4 are scales 0 and 1: row 0 sees one key, rows 1-4 see keys 0-4; the last scale sees everything.
    np.testing.assert_array_equal(mask.plan, [[1, 1, 0, 0, 0, 0]] + [[2] * 6] * 4)
