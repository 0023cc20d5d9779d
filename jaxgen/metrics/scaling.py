"""Power laws of loss against size or compute."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

__all__ = ["PowerLaw", "fit_power_law"]


class PowerLaw(NamedTuple):
    """L(x) = c + (b x)^a.

    Attributes:
      a: the exponent; negative where the loss falls.
      log_b: natural logarithm of the scale b, which itself overflows where the exponent is near 0.
      c: the loss that no size removes; 0 if none was fitted.
      r: Pearson correlation of log x and log(L - c); -1 is a perfect falling law.
    """

    a: float
    log_b: float
    c: float
    r: float

    @property
    def b(self) -> float:
        """The scale; infinite where it does not fit in a float."""
        with np.errstate(over="ignore"):
            return float(np.exp(self.log_b))

    @property
    def r2(self) -> float:
        """The share of the variance of log(L - c) that the line explains."""
        return self.r**2

    def predict(self, x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """L(x)."""
        return self.c + np.exp(self.a * (self.log_b + np.log(np.asarray(x, np.float64))))


def fit_power_law(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"], *, irreducible: bool = False) -> PowerLaw:
    """The power law nearest to the points, in squared error of log y.

    Args:
      x: sizes (parameters, FLOPs, ...), > 0.
      y: losses or error rates, > 0.
      irreducible: also fit c in [0, min y), by Levenberg-Marquardt from several starts; otherwise c = 0 and the fit is a
        straight line in logarithms, as VAR's (Tian et al. 2024, eq. 4-5).

    Raises:
      ValueError: fewer than 3 points (4 with `irreducible`), lengths that differ, values that are not positive and
        finite, or x or y all equal.

    Example:
      >>> fit_power_law([1, 4, 16], [2, 1, 0.5])  # L = (x / 4)^-0.5
      PowerLaw(a=-0.5, log_b=-1.386..., c=0.0, r=-1.0)
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    need = 4 if irreducible else 3
    if x.ndim != 1 or x.shape != y.shape or len(x) < need:
        raise ValueError(f"x of shape {x.shape} and y of shape {y.shape}: need two equal lengths of at least {need}")
    for name, value in (("x", x), ("y", y)):
        if not (np.isfinite(value).all() and (value > 0).all()):
            raise ValueError(f"{name}={value}: must be positive and finite")
        if np.ptp(value) == 0:
            raise ValueError(f"{name}={value}: all equal, no law can be fitted")
    log_x = np.log(x)
    slope, intercept, c = *_line(log_x, np.log(y)), 0.0
    if irreducible:
        slope, intercept, c = _with_floor(log_x, y)
    r = np.corrcoef(log_x, np.log(y - c))[0, 1]
    return PowerLaw(a=float(slope), log_b=float(intercept / slope), c=float(c), r=float(r))


def _line(u: np.ndarray, v: np.ndarray) -> tuple[float, float]:
    """(slope, intercept) of the least-squares line."""
    du = u - u.mean()
    slope = (du * (v - v.mean())).sum() / (du * du).sum()
    return slope, v.mean() - slope * u.mean()


def _with_floor(log_x: np.ndarray, y: np.ndarray, starts: int = 15, iterations: int = 200) -> tuple[float, float, float]:
    """(slope, intercept, c) that minimise the squared error of log(c + exp(intercept + slope log x)).

    c = min(y) sigmoid(t) keeps it inside its bounds without constraints.
    """

    def residual(theta):
        slope, intercept, t = theta
        floor = y.min() / (1 + np.exp(-t))
        power = np.exp(intercept + slope * log_x)
        value = floor + power
        by_t = floor * (1 - floor / y.min())
        jacobian = np.stack([power * log_x, power, np.full_like(y, by_t)], axis=1) / value[:, None]
        return np.log(value / y), jacobian

    best, best_error = None, np.inf
    for t in np.linspace(-7, 7, starts):
        theta = np.array([*_line(log_x, np.log(y - y.min() / (1 + np.exp(-t)))), t])
        r, jac = residual(theta)
        error, damping = r @ r, 1e-3
        for _ in range(iterations):
            hessian = jac.T @ jac
            scale = np.diag(hessian) + 1e-12
            trial = theta - np.linalg.solve(hessian + damping * np.diag(scale), jac.T @ r)
            # Beyond |t| = 30 the floor no longer changes in float64, and the exponential would overflow.
            trial[2] = np.clip(trial[2], -30, 30)
            with np.errstate(over="ignore", invalid="ignore"):
                trial_r, trial_jac = residual(trial)
            if trial_r @ trial_r < error:
                theta, r, jac, error, damping = trial, trial_r, trial_jac, trial_r @ trial_r, damping / 5
            else:
                damping *= 5
                if damping > 1e12:
                    break
        if error < best_error:
            best, best_error = theta, error
    slope, intercept, t = best
    # A floor that reaches the lowest point leaves nothing to take the logarithm of.
    return slope, intercept, min(y.min() / (1 + np.exp(-t)), y.min() * (1 - 1e-9))
