"""Oracle: points made from a known law must give the law back."""

import numpy as np
import pytest

from jaxgen.metrics import fit_power_law

X = np.array([1.2e5, 7e5, 3e6, 1.1e7, 9e7])


@pytest.mark.parametrize("a,b", [(-0.2, 3.1e-3), (-0.76, 2e-9), (0.5, 1e-4)])
def test_exact_points_give_the_law_back(a, b):
    law = fit_power_law(X, (b * X) ** a)
    assert (law.a, law.b, law.c) == (pytest.approx(a), pytest.approx(b), 0)
    assert law.r == pytest.approx(np.sign(a)) and law.r2 == pytest.approx(1)
    np.testing.assert_allclose(law.predict(5e8), (b * 5e8) ** a)


@pytest.mark.parametrize("a,b,c", [(-0.34, 2e-3, 1.7), (-0.5, 1e-5, 0.03), (-0.1, 1e-2, 0.2)])
def test_exact_points_give_the_floor_back(a, b, c):
    law = fit_power_law(X, c + (b * X) ** a, irreducible=True)
    assert (law.a, law.b, law.c) == (pytest.approx(a, rel=1e-3), pytest.approx(b, rel=1e-2), pytest.approx(c, rel=1e-2))
    np.testing.assert_allclose(law.predict(X), c + (b * X) ** a, rtol=1e-6)
    assert law.r == pytest.approx(-1, abs=1e-6)
    # Without its floor the law is bent, and a straight line must not fit it as well.
    line = fit_power_law(X, c + (b * X) ** a)
    assert np.abs(np.log(line.predict(X) / (c + (b * X) ** a))).max() > 1e-4


def test_a_law_without_a_floor_gets_none():
    law = fit_power_law(X, (1e-3 * X) ** -0.3, irreducible=True)
    assert law.a == pytest.approx(-0.3, rel=1e-2) and law.c < 0.01 * ((1e-3 * X) ** -0.3).min()


@pytest.mark.parametrize("irreducible", [False, True])
def test_noisy_points_are_at_an_optimum(irreducible):
    rng = np.random.default_rng(0)
    x = np.geomspace(1e4, 1e8, 9)
    y = (1.5 * irreducible + (1e-3 * x) ** -0.25) * np.exp(0.02 * rng.normal(size=9))
    law = fit_power_law(x, y, irreducible=irreducible)

    def error(law):
        return np.square(np.log(law.predict(x) / y)).sum()

    assert 0.9 < -law.r < 1
    for change in ({"a": law.a + 3e-4}, {"a": law.a - 3e-4}, {"log_b": law.log_b * 1.01}, {"log_b": law.log_b * 0.99}):
        assert error(law._replace(**change)) > error(law)
    if irreducible:
        for c in (law.c * 1.01, law.c * 0.99):
            assert error(law._replace(c=c)) > error(law)
    else:
        np.testing.assert_allclose(law.r, np.corrcoef(np.log(x), np.log(y))[0, 1])


def test_a_nearly_flat_curve_overflows_nowhere():
    y = 5 - 1e-4 * np.arange(5)
    law = fit_power_law(X, y)
    assert law.b in (0, np.inf)
    np.testing.assert_allclose(law.predict(X), y, rtol=1e-3)


def test_what_cannot_be_fitted():
    with pytest.raises(ValueError, match="at least 3"):
        fit_power_law([1, 2], [2, 1])
    with pytest.raises(ValueError, match="at least 4"):
        fit_power_law([1, 2, 3], [3, 2, 1], irreducible=True)
    with pytest.raises(ValueError, match=r"\(3,\) and y of shape \(4,\)"):
        fit_power_law([1, 2, 3], [4, 3, 2, 1])
    with pytest.raises(ValueError, match="y=.*positive and finite"):
        fit_power_law([1, 2, 3], [3, 0, 1])
    with pytest.raises(ValueError, match="x=.*positive and finite"):
        fit_power_law([1, np.nan, 3], [3, 2, 1])
    with pytest.raises(ValueError, match="y=.*all equal"):
        fit_power_law([1, 2, 3], [2, 2, 2])
