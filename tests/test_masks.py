import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl

from jaxgen import masks
from jaxgen.orders import Order, blocks, raster, scales

VAR = {
    680: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    2240: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    9451: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}


def drawn(mask):
    return masks.draw(mask).splitlines()


def pairs(order, sees):
    """Dense mask of `sees((step, place), (step, place))`, a pair at a time."""
    where = [(k, place) for k, shape in enumerate(order.shapes) for place in np.ndindex(shape)]
    return np.array([[sees(a, b) for b in where] for a in where])


def test_scales_see_themselves_and_all_before():
    assert drawn(masks.block_causal(scales((1, 2, (2, 3))))) == ["#.........."] + ["#####......"] * 4 + ["###########"] * 6


def test_a_raster_is_causal():
    assert drawn(masks.block_causal(raster(3))) == ["#..", "##.", "###"]


def test_published_mask():
    mask = masks.block_causal(scales(VAR[680]))
    ends = np.cumsum(np.square(VAR[680]))
    seen = np.repeat(ends, np.square(VAR[680]))  # a position sees everything up to the end of its scale
    np.testing.assert_array_equal(mask.dense().sum(1), seen)
    np.testing.assert_array_equal(mask.dense(), np.arange(680)[None] < seen[:, None])


def test_blocks_are_planned_and_may_be_chosen():
    mask = masks.block_causal(scales((1, 2, 4)), block=(5, 4))
    # Rows 0-4 are scales 0 and 1: row 0 sees one key, rows 1-4 see keys 0-4; the last scale sees everything.
    np.testing.assert_array_equal(mask.plan, [[1, 1, 0, 0, 0, 0]] + [[2] * 6] * 4)


def test_block_diagonal():
    order = scales((1, 2, (2, 3)))
    mask = masks.block_diagonal(order)
    assert drawn(mask) == ["#.........."] + [".####......"] * 4 + [".....######"] * 6
    np.testing.assert_array_equal(mask.dense(), pairs(order, lambda a, b: a[0] == b[0]))


def test_neighbourhoods_shift_or_are_cut_at_the_edges():
    assert drawn(masks.neighbourhood(blocks(5, 5), 3)) == ["###..", "###..", ".###.", "..###", "..###"]
    assert drawn(masks.neighbourhood(blocks(5, 5), 3, edges="cut")) == ["##...", "###..", ".###.", "..###", "...##"]


@pytest.mark.parametrize("edges", ["shift", "cut"])
@pytest.mark.parametrize("back", [0, 1, 2])
@pytest.mark.parametrize(
    ("order", "window"),
    [
        (scales((1, 2, 3, 5)), 3),
        (scales(((2, 3), (3, 7))), (1, 5)),
        (Order(((6,), (4,))), 5),
        (Order(((2, 3, 4), (3, 4, 2))), (1, 3, 3)),
    ],
)
def test_neighbourhood_is_a_window_around_the_corresponding_place(order, window, back, edges):
    def sees(a, b):
        (step, place), (other, there) = a, b
        if other != (step - back if step >= back else step):
            return False
        windows = (window,) * len(place) if isinstance(window, int) else window
        for w, x, y, size, size_there in zip(windows, place, there, order.shapes[step], order.shapes[other]):
            centre = int((x + 0.5) / size * size_there + 1e-9)
            keys = list(range(centre - w // 2, centre + w // 2 + 1))
            if edges == "shift":
                while keys[-1] >= size_there:
                    keys = [key - 1 for key in keys]
                while keys[0] < 0:
                    keys = [key + 1 for key in keys]
            if y not in keys:
                return False
        return True

    got = masks.neighbourhood(order, window, back=back, edges=edges).dense()
    np.testing.assert_array_equal(got, pairs(order, sees))


def test_a_shifted_window_always_has_its_size():
    order = scales((1, 2, 4, 9))
    seen = masks.neighbourhood(order, 3).dense().sum(1)
    np.testing.assert_array_equal(seen, [1] + [4] * 4 + [9] * (16 + 81))


def test_windows_since_a_step():
    order = scales((2, 4, 5))
    windows, whole = masks.neighbourhood(order, 3).dense(), masks.block_diagonal(order).dense()
    for since in range(4):
        want = np.where(order.step_of[:, None] < since, whole, windows)
        np.testing.assert_array_equal(masks.neighbourhood(order, 3, since=since).dense(), want)
    before = masks.neighbourhood(order, 3, back=1, since=3).dense()
    assert before[4:20, :4].all() and before[20:, 4:20].all() and not before[20:, 20:].any()


def test_a_causal_neighbourhood_by_intersection():
    mask = masks.neighbourhood(scales((3,)), 3, edges="cut") & masks.block_causal(raster(9))
    assert drawn(mask)[4] == "#####...."  # the centre of 3x3: the row above, left of it, itself
    assert drawn(mask)[8] == "....##.##"


def test_block_diffusion_is_noisy_then_clean_and_skip_causal_the_other_way():
    order = blocks(5, 2)
    noisy = ["##...|.....", "##...|.....", "..##.|##...", "..##.|##...", "....#|####."]
    clean = [".....|##...", ".....|##...", ".....|####.", ".....|####.", ".....|#####"]
    want = [row.replace("|", "") for row in noisy + clean]
    assert drawn(masks.block_diffusion(order)) == want
    swapped = [row[5:] + row[:5] for row in want[5:] + want[:5]]
    assert drawn(masks.skip_causal(order)) == swapped


def test_block_diffusion_between_its_two_ends():
    # One step is diffusion of the whole, which reads nothing clean; a position a step is causal but for the position itself.
    np.testing.assert_array_equal(masks.block_diffusion(blocks(4, 4)).dense()[:4], np.eye(2).repeat(4, 1)[[0] * 4] > 0)
    one = masks.block_diffusion(raster(4)).dense()[:4]
    np.testing.assert_array_equal(one[:, :4], np.eye(4))
    np.testing.assert_array_equal(one[:, 4:], np.tri(4, k=-1))


def test_sliding():
    assert drawn(masks.sliding(raster(5), 2)) == ["#....", "##...", ".##..", "..##.", "...##"]
    assert drawn(masks.sliding(raster(5), 2, causal=False)) == ["##...", "###..", ".###.", "..###", "...##"]
    order = Order(((1, 2), (1, 1), (2, 1), (1, 1)))  # windows count steps, whatever their size
    np.testing.assert_array_equal(masks.sliding(order, 2).dense(), pairs(order, lambda a, b: 0 <= a[0] - b[0] < 2))
    np.testing.assert_array_equal(masks.sliding(order, 2, causal=False).dense(), pairs(order, lambda a, b: abs(a[0] - b[0]) < 2))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("order", [raster(14), blocks(14, 2), Order(((2, 1), (1, 3), (1, 1), (2, 2), (1, 2)))])
def test_dilated_is_every_other_step_of_a_window_regrouped(order, causal):
    mask, permutation, inverse = masks.dilated(order, 2, 3, causal=causal)

    def sees(a, b):
        return a[0] - b[0] in ((0, 3) if causal else (-3, 0, 3))

    np.testing.assert_array_equal(mask.dense()[inverse][:, inverse], pairs(order, sees))
    np.testing.assert_array_equal(permutation[inverse], np.arange(order.length))
    np.testing.assert_array_equal(inverse[permutation], np.arange(order.length))
    assert permutation.dtype == inverse.dtype == np.int32


def test_regrouping_makes_blocks_of_the_live_ones():
    mask, permutation, _ = masks.dilated(raster(12), 2, 3)
    assert permutation.tolist() == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    assert drawn(mask)[:5] == ["#...........", "##..........", ".##.........", "..##........", "....#......."]


def test_prefix():
    assert drawn(masks.prefix(raster(5), 3)) == ["###..", "###..", "###..", "####.", "#####"]
    order = scales((1, 2, 2, 2))
    assert masks.prefix(order, 0) == masks.prefix(order, 1) == masks.block_causal(order)
    assert masks.prefix(order, 4).dense().all()
    want = pairs(order, lambda a, b: b[0] <= a[0] or max(a[0], b[0]) < 2)
    np.testing.assert_array_equal(masks.prefix(order, 2).dense(), want)


def test_documents_and_padding():
    assert drawn(masks.documents([2, 2, 1, 1, 0])) == ["##...", "##...", "..##.", "..##.", "....."]
    mask = masks.documents([2, 2, 1, 1, 0]) & masks.block_causal(raster(5))
    assert drawn(mask) == ["#....", "##...", "..#..", "..##.", "....."]


def test_tree():
    #   0        5
    #  1 2       6
    #    3 4
    mask = masks.tree([-1, 0, 0, 2, 2, -1, 5])
    want = ["#......", "##.....", "#.#....", "#.##...", "#.#.#..", ".....#.", ".....##"]
    assert drawn(mask) == want
    assert drawn(masks.tree([1, 2, -1])) == ["###", ".##", "..#"]  # children may come first


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=24), st.randoms())
def test_tree_is_what_following_parents_finds(numbers, random):
    parents = [n % (i + 1) - 1 for i, n in enumerate(numbers)]  # each earlier, or a root
    names = list(range(len(parents)))
    random.shuffle(names)
    shuffled = [-1] * len(parents)
    for node, parent in enumerate(parents):
        shuffled[names[node]] = -1 if parent < 0 else names[parent]
    want = np.zeros((len(parents),) * 2, bool)
    for node in range(len(parents)):
        at = node
        while at >= 0:
            want[node, at] = True
            at = shuffled[at]
    np.testing.assert_array_equal(masks.tree(shuffled).dense(), want)


@pytest.mark.parametrize(
    ("make", "elements", "small", "large"),
    [
        (lambda: masks.block_causal(scales(VAR[680])), 0.62, 0.76, 1.0),
        (lambda: masks.block_causal(scales(VAR[2240])), 0.65, 0.68, 0.80),
        (lambda: masks.block_causal(scales(VAR[9451])), 0.64, 0.65, 0.68),
        (lambda: masks.block_diagonal(scales(VAR[680])), 0.24, 0.47, 1.0),
        (lambda: masks.block_diagonal(scales(VAR[2240])), 0.30, 0.34, 0.60),
        (lambda: masks.block_diagonal(scales(VAR[9451])), 0.28, 0.29, 0.37),
        (lambda: masks.block_diffusion(blocks(4096, 32)), 0.25, 0.27, 0.31),
        (lambda: masks.skip_causal(blocks(4096, 256)), 0.27, 0.27, 0.31),
        (lambda: masks.neighbourhood(scales((64,)), 7, edges="cut"), 0.011, 0.12, 0.34),
        (lambda: masks.sliding(raster(8192), 512), 0.061, 0.08, 0.12),
        (lambda: masks.dilated(raster(8192), 128, 8).mask, 0.015, 0.03, 0.09),
    ],
)
def test_shares_of_live_blocks(make, elements, small, large):
    mask = make()
    assert abs(mask.element_density - elements) <= (0.0005 if elements < 0.1 else 0.005)
    for block, want in (((128, 64), small), ((512, 512), large)):
        assert abs(np.mean(mask.planned(block) != 0) - want) <= 0.005, block


def everything(order):
    """Masks of l positions of `order`, by name."""
    return {
        "block_causal": masks.block_causal(order),
        "block_diagonal": masks.block_diagonal(order),
        "neighbourhood": masks.neighbourhood(order, 3, back=1),
        "sliding": masks.sliding(order, 2),
        "dilated": masks.dilated(order, 2, 2).mask,
        "prefix": masks.prefix(order, (order.steps + 1) // 2),
        "documents": masks.documents(order.step_of // 2),
        "tree": masks.tree((np.arange(order.length) + 1) // 2 - 1),
        "block_diffusion": masks.block_diffusion(order)[: order.length, order.length :],
        "skip_causal": masks.skip_causal(order)[order.length :, order.length :],
    }


NAMES = tuple(everything(raster(2)))
orders = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=5).map(lambda s: Order(tuple(s)))


@settings(max_examples=60, deadline=None)
@given(
    order=orders,
    names=st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)),
    block=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_plans_drop_nothing_and_the_algebra_is_that_of_sets(order, names, block):
    a, b = (everything(order)[name] for name in names)
    x, y = a.dense(), b.dense()
    combined = ((a, x), (b, y), (a & b, x & y), (a | b, x | y), (~a, ~x), (~(a | b) & a, np.zeros_like(x)), (a | ~a, x | ~x))
    for mask, want in combined:
        np.testing.assert_array_equal(mask.dense(), want)
        for (i, j), kind in np.ndenumerate(mask.planned(block)):
            part = want[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            assert kind == (2 if part.all() else 1 if part.any() else 0)


def test_equal_arguments_make_equal_masks():
    order = scales((1, 2, 3))
    for (name, a), b, other in zip(everything(order).items(), everything(order).values(), everything(raster(14)).values()):
        assert a == b and hash(a) == hash(b), name
        assert a != other or name == "tree", name
    assert len(set(everything(order).values())) == len(NAMES)


def all_predicates():
    """A mask of each predicate."""
    order = Order(((8, 16), (16, 8)))
    return everything(order) | {
        "neighbourhood_1": masks.neighbourhood(raster(256), 1),
        "neighbourhood_3": masks.neighbourhood(Order(((8, 4, 8),)), 3),
    }


def test_predicates_read_every_row_of_metadata():
    class Rows:
        def __init__(self, meta):
            self.meta, self.read = meta, set()

        def __getitem__(self, i):
            self.read.add(i)
            return self.meta[i]

    for name, mask in all_predicates().items():
        # Mosaic GPU searches for a layout of each row that is loaded, and fails after minutes where nothing uses it.
        q, k = Rows(mask.q_meta[:, :, None]), Rows(mask.k_meta[:, None, :])
        mask.pred(q, k)
        assert q.read == k.read == set(range(mask.q_meta.shape[0])), name


def test_predicates_lower_inside_tpu_kernels():
    every = all_predicates()

    def kernel(pred, q, k, out):
        rows = [[meta[i, 0] for i in range(meta.shape[0])] for meta in (q, k)]
        out[...] = pred([row[:, None] for row in rows[0]], [row[None] for row in rows[1]]).astype(jnp.float32)

    def f():
        results = []
        for mask in every.values():
            q, k = (jnp.asarray(meta)[:, None, :] for meta in (mask.q_meta, mask.k_meta))
            out = jax.ShapeDtypeStruct(mask.shape, jnp.float32)
            results.append(pl.pallas_call(functools.partial(kernel, mask.pred), out_shape=out)(q, k))
        return results

    exported = jax.export.export(jax.jit(f), platforms=["tpu"])()
    assert exported.mlir_module().count("tpu_custom_call") == len(every)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: masks.neighbourhood(Order(((2,), (2, 2))), 3), "grids of one rank"),
        (lambda: masks.neighbourhood(Order(((1, 1, 2, 2),)), 3), "one to three axes, not 4"),
        (lambda: masks.neighbourhood(scales((4,)), 4), "window=4 must be odd"),
        (lambda: masks.neighbourhood(scales((4,)), -1), "window=-1 must be odd and positive"),
        (lambda: masks.neighbourhood(scales((4,)), (3, 3, 3)), "one for each of 2 axes"),
        (lambda: masks.neighbourhood(scales((4,)), 3, back=-1), "back=-1"),
        (lambda: masks.neighbourhood(scales((4,)), 3, edges="wrap"), "edges='wrap'"),
        (lambda: masks.neighbourhood(scales((4,)), 3, since=-1), "since=-1"),
        (lambda: masks.sliding(raster(4), 0), "window=0"),
        (lambda: masks.dilated(raster(4), 0, 2), "window=0"),
        (lambda: masks.dilated(raster(4), 2, 0), "dilation=0"),
        (lambda: masks.prefix(raster(4), 5), r"steps=5 must be within 0\.\.4"),
        (lambda: masks.documents([1, -1]), "not negative"),
        (lambda: masks.documents([[1, 2]]), r"segments \(1, 2\)"),
        (lambda: masks.documents([1.5]), "whole numbers"),
        (lambda: masks.tree([-1, 2]), "from -1 to 1"),
        (lambda: masks.tree([-1, 2, 1, 2, 0]), r"nodes \[1, 2, 3\] are on a cycle"),
        (lambda: masks.tree([[-1]]), "indices"),
        (lambda: masks.block_causal(raster(4), block=(0, 4)), "two positive sizes"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_mask_takes_a_block():
    order, block = scales((2, 2)), {"block": (3, 5)}
    made = itertools.chain(
        (f(order, **block) for f in (masks.block_causal, masks.block_diagonal, masks.block_diffusion, masks.skip_causal)),
        (f(order, 1, **block) for f in (masks.neighbourhood, masks.sliding, masks.prefix)),
        (masks.dilated(order, 1, 2, **block).mask, masks.documents([1, 2], **block), masks.tree([-1, 0], **block)),
    )
    assert [mask.block for mask in made] == [(3, 5)] * 10
