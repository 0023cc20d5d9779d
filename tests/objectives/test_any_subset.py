"""Random subsets and their orders; which place is asked for."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.objectives.any_subset import lattice_orders, places_ahead


def test_orders_read_a_subset_and_then_the_rest_from_left_to_right():
    order, known = (np.asarray(x) for x in lattice_orders(jax.random.key(0), 4000, 6, (0.2, 0.9)))
    np.testing.assert_array_equal(np.sort(order, axis=1), np.broadcast_to(np.arange(6), order.shape))
    for row, count in zip(order, known):
        assert (np.diff(row[:count]) > 0).all() and (np.diff(row[count:]) > 0).all()
    assert set(known.tolist()) == {1, 2, 3, 4, 5}
    # Round(6 (1 - u)), u uniform in 0.2 .. 0.9: 1 below 1.5, and so on.
    np.testing.assert_allclose(np.bincount(known)[1:] / 4000, np.array([0.9, 1, 1, 1, 0.3]) / 4.2, atol=0.04)
    for count in (2, 3):  # subsets of one size are equally likely
        rows = order[known == count][:, :count]
        places = np.bincount(rows.ravel(), minlength=6) / len(rows)
        np.testing.assert_allclose(places, count / 6, atol=0.06)


def test_all_but_one_may_be_hidden_and_all_but_one_visible():
    assert np.asarray(lattice_orders(jax.random.key(0), 3, 4, (1.0, 1.0))[1]).tolist() == [1, 1, 1]
    assert np.asarray(lattice_orders(jax.random.key(0), 3, 4, (0.0, 0.0))[1]).tolist() == [3, 3, 3]


def test_what_is_asked_for():
    known = jnp.array([1, 4] * 500)
    target, counts = (np.asarray(x) for x in places_ahead(jax.random.key(0), known, 8, furthest=3, share=0.5))
    ahead = target - np.arange(1, 8)
    assert target.max() == 7 and set(ahead.ravel().tolist()) == {0, 1, 2}
    np.testing.assert_allclose([(ahead[:, :5] == i).mean() for i in range(3)], [0.5, 0.25, 0.25], atol=0.03)
    np.testing.assert_array_equal(counts, np.arange(1, 8) >= np.asarray(known)[:, None])
    for options in (dict(furthest=3, share=0.0), dict(furthest=1, share=0.5)):
        target, _ = places_ahead(jax.random.key(0), known, 8, **options)
        np.testing.assert_array_equal(target, np.broadcast_to(np.arange(1, 8), target.shape))
