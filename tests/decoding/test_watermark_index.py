"""Pairs of codes, replacement, and the places of a crop."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding.watermark_index import green_of_pairs, pair_codes, place_crop, replace_red

pytestmark = pytest.mark.usefixtures("quick_compiles")

RNG = np.random.default_rng(0)


def best(cost):
    """The cheapest perfect matching of an even number of codes, by trying all."""

    def rest(left):
        if not left:
            return 0.0
        first, others = left[0], left[1:]
        return min(cost[first, j] + rest(tuple(k for k in others if k != j)) for j in others)

    return rest(tuple(range(len(cost))))


@pytest.mark.parametrize("cosine", [False, True])
def test_pairs_are_nearly_the_best_there_are(cosine):
    ratios = []
    for _ in range(10):
        x = RNG.normal(size=(10, 3))
        if cosine:
            unit = x / np.linalg.norm(x, axis=1, keepdims=True)
            cost = 1 - unit @ unit.T
        else:
            cost = np.square(x[:, None] - x).sum(-1)
        partner = pair_codes(x, cosine=cosine)
        assert (partner[partner] == np.arange(10)).all() and (partner != np.arange(10)).all()
        found, greedy = (cost[np.arange(10), p].sum() / 2 for p in (partner, pair_codes(x, cosine=cosine, sweeps=0)))
        assert found <= greedy + 1e-6
        ratios.append(found / best(cost))
    assert min(ratios) > 1 - 1e-5 and np.mean(ratios) < 1.1


def test_greedy_pairs_are_taken_most_similar_first():
    """By a loop over all pairs in order; distinct distances, so that there is one answer."""
    x = RNG.normal(size=(31, 2))
    order = sorted(itertools.combinations(range(31), 2), key=lambda ij: np.square(x[ij[0]] - x[ij[1]]).sum())
    want = np.arange(31)
    free = set(range(31))
    for i, j in order:
        if i in free and j in free:
            want[[i, j]] = j, i
            free -= {i, j}
    np.testing.assert_array_equal(pair_codes(x, sweeps=0), want)
    assert (pair_codes(np.zeros((5, 2))) == np.arange(5)).sum() == 1  # equal codes, an odd number of them


def test_one_of_each_pair_is_green_by_a_fair_coin():
    partner = jnp.asarray(pair_codes(RNG.normal(size=(9, 2))))
    alone = int(np.flatnonzero(partner == np.arange(9))[0])
    draws = np.asarray(jax.vmap(lambda key: green_of_pairs(key, partner))(jax.random.split(jax.random.key(0), 2000)))
    paired = np.arange(9) != alone
    assert (draws[:, paired] ^ draws[:, np.asarray(partner)[paired]]).all() and not draws[:, alone].any()
    assert np.abs(draws[:, paired].mean(0) - 0.5).max() < 4 * 0.5 / np.sqrt(2000)
    first = np.flatnonzero(paired & (np.arange(9) < np.asarray(partner)))
    assert np.abs(np.corrcoef(draws[:, first].T) - np.eye(4)).max() < 0.1  # the coins are independent


def test_replacement_against_a_loop():
    b, l, v = 4, 12, 8
    partner = np.array([1, 0, 3, 2, 5, 4, 7, 6])
    green = np.array([1, 0, 0, 1, 1, 0, 0, 1], bool)
    tokens = RNG.integers(0, v, (b, l))
    log_p = np.log(RNG.dirichlet(np.ones(v), (b, l))).astype(np.float32)
    log_p[0, 3, partner[tokens[0, 3]]] = -np.inf  # truncation left the partner out: the last to go
    traces = []

    @jax.jit
    def replaced(share):
        traces.append(1)
        return replace_red(jnp.asarray(tokens), jnp.asarray(log_p), jnp.asarray(partner), jnp.asarray(green), share)

    for share in (0.0, 0.25, 0.5, 0.7, 11 / 12, 1.0):
        want = tokens.copy()
        for row in range(b):
            ratio = [log_p[row, i, t] - log_p[row, i, partner[t]] for i, t in enumerate(tokens[row])]
            for i in np.argsort(ratio)[: int(share * l + 1e-9)]:
                if not green[tokens[row, i]]:
                    want[row, i] = partner[tokens[row, i]]
        np.testing.assert_array_equal(replaced(share), want)
    np.testing.assert_array_equal(replaced(0.0), tokens)
    assert green[np.asarray(replaced(1.0))].all() and len(traces) == 1


def test_a_crop_is_tried_at_every_place_and_one_is_right():
    """A picture whose cells carry their token in every pixel: at the right place all cells inside agree with the whole."""
    factor, grid = 3, 6
    cells = RNG.integers(0, 50, (grid, grid))
    image = np.kron(cells, np.ones((factor, factor)))[None, ..., None]
    top, left = 4, 2
    crops = place_crop(jnp.asarray(image[:, top : top + 13, left : left + 14]), size=(18, 18), factor=factor)
    assert crops.images.shape == (1, 9, 18, 18, 1) and crops.inside.shape == (9, 36)
    values = np.asarray(crops.images).reshape(9, grid, factor, grid, factor)
    whole = (values == values[:, :, :1, :, :1]).all((2, 4)).reshape(9, 36)
    inside = np.asarray(crops.inside)
    right = (top % factor) * factor + left % factor
    assert whole[right][inside[right]].all()
    assert all(not whole[i][inside[i]].all() for i in range(9) if i != right)
    # Pixels 1 .. 13 of the canvas hold rows 1, 2, 3 whole and pixels 2 .. 15 columns 1 to 4; the outer ones are the margin.
    rows, columns = np.where(inside[right].reshape(grid, grid))
    assert sorted(zip(rows, columns)) == [(2, 2), (2, 3)]
    moved = values[right, :, 0, :, 0][rows, columns]
    np.testing.assert_array_equal(moved, cells[rows + top // factor, columns + left // factor])


def test_a_whole_picture_has_one_place_and_all_its_cells():
    crops = place_crop(jnp.ones((2, 8, 8, 1)), size=(8, 8), factor=2)
    assert crops.images.shape == (2, 1, 8, 8, 1) and bool(crops.inside.all())


def test_bad_input():
    with pytest.raises(ValueError, match="codebook of 1 codes"):
        pair_codes(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="a piece of 9x8 on a canvas of 8x8"):
        place_crop(jnp.zeros((1, 9, 8, 1)), size=(8, 8), factor=2)
    with pytest.raises(ValueError, match="a piece of 4x4 leaves no cell"):
        place_crop(jnp.zeros((1, 4, 4, 1)), size=(8, 8), factor=2)
    with pytest.raises(ValueError, match="share=1.5"):
        replace_red(jnp.zeros((1, 2), int), jnp.zeros((1, 2, 2)), jnp.array([1, 0]), jnp.array([True, False]), 1.5)
