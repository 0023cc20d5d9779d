"""How near a generated set is to a real one in a classifier's features, and how well its classes come out.

Everything here runs on the host in float64: covariances of thousands of features lose too much in float32.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

__all__ = ["FeatureStats", "class_accuracy", "finite_matrix", "frechet_distance", "precision_recall"]


def finite_matrix(name: str, x) -> np.ndarray:
    """`x` as a finite float64 [n, d].

    Raises:
      ValueError: another rank, or values that are not finite.
    """
    x = np.asarray(x, np.float64)
    if x.ndim != 2:
        raise ValueError(f"{name} of shape {x.shape}: expected [n, d]")
    if not np.isfinite(x).all():
        raise ValueError(f"{name}: {int((~np.isfinite(x)).sum())} of {x.size} values are not finite")
    return x


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FeatureStats:
    """Mean and covariance of features that arrive in batches.

    Attributes:
      count: how many were seen.
      mean: [d].
      scatter: [d, d], the sum of (x - mean)(x - mean)^T. Kept centred, so that a large mean costs no digits.

    Example:
      >>> stats = FeatureStats.empty(64)
      >>> for batch in batches: stats = stats.update(batch)
      >>> frechet_distance(stats, real)
    """

    count: int
    mean: Float[np.ndarray, "d"]
    scatter: Float[np.ndarray, "d d"]

    @classmethod
    def empty(cls, width: int) -> FeatureStats:
        """Of no features of this width."""
        return cls(count=0, mean=np.zeros(width), scatter=np.zeros((width, width)))

    @classmethod
    def of(cls, features: Float[np.ndarray, "n d"]) -> FeatureStats:
        """Of one batch.

        Raises:
          ValueError: not [n, d], or values that are not finite.
        """
        features = finite_matrix("features", features)
        if not len(features):
            return cls.empty(features.shape[1])
        mean = features.mean(axis=0)
        centred = features - mean
        return cls(count=len(features), mean=mean, scatter=centred.T @ centred)

    @classmethod
    def from_moments(cls, mean: Float[np.ndarray, "d"], cov: Float[np.ndarray, "d d"], count: int = 2) -> FeatureStats:
        """Of features whose mean and unbiased covariance are known.

        Args:
          mean: theirs.
          cov: theirs.
          count: how many there were. Published statistics do not say; a distance does not ask, a `merge` does.

        Raises:
          ValueError: shapes that do not fit, values that are not finite, or fewer than two features.
        """
        mean, cov = np.asarray(mean, np.float64), finite_matrix("cov", cov)
        if mean.ndim != 1 or cov.shape != mean.shape * 2 or not np.isfinite(mean).all():
            raise ValueError(f"a mean of shape {mean.shape} and a covariance of {cov.shape}: expected finite [d] and [d, d]")
        if count < 2:
            raise ValueError(f"count={count}: a covariance needs at least 2 features")
        return cls(count=count, mean=mean, scatter=cov * (count - 1))

    def update(self, features: Float[np.ndarray, "n d"]) -> FeatureStats:
        """With one more batch."""
        return self.merge(FeatureStats.of(features))

    def merge(self, other: FeatureStats) -> FeatureStats:
        """Of both sets together, as if seen in one pass (Chan et al. 1979); for partial results of several hosts.

        Raises:
          ValueError: widths that differ.
        """
        _same_width(self, other)
        count = self.count + other.count
        if not count:
            return self
        step = other.mean - self.mean
        mean = self.mean + step * (other.count / count)
        between = np.outer(step, step) * (self.count * other.count / count)
        return FeatureStats(count=count, mean=mean, scatter=self.scatter + other.scatter + between)

    @property
    def cov(self) -> Float[np.ndarray, "d d"]:
        """The unbiased covariance, scatter / (count - 1).

        Raises:
          ValueError: fewer than two features.
        """
        if self.count < 2:
            raise ValueError(f"count={self.count}: a covariance needs at least 2 features")
        return self.scatter / (self.count - 1)


def _same_width(a: FeatureStats, b: FeatureStats) -> None:
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of widths {a.mean.size} and {b.mean.size} cannot be compared")


def _root(cov: np.ndarray) -> np.ndarray:
    """F with F F^T = `cov`; the eigenvalues that rounding made negative are taken as 0."""
    values, vectors = np.linalg.eigh(cov)
    return vectors * np.sqrt(np.maximum(values, 0))


def frechet_distance(a: FeatureStats, b: FeatureStats) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)): squared 2-Wasserstein distance of two Gaussians.

    With S = F F^T the trace of the root is the sum of the singular values of F_a^T F_b. Unlike a matrix square root of the
    product this is real, symmetric in a and b, and keeps its digits where a covariance is singular (fewer samples than
    features). The distance shrinks with the number of samples: compare values of equal counts only.

    Args:
      a: statistics of one set.
      b: statistics of the other.

    Returns:
      The distance, >= 0.

    Raises:
      ValueError: widths that differ, or a set of fewer than two features.

    Heusel et al. 2017, eq. 6; Dowson and Landau 1982.
    """
    _same_width(a, b)
    cov_a, cov_b = a.cov, b.cov
    cross = np.linalg.svd(_root(cov_a).T @ _root(cov_b), compute_uv=False).sum()
    distance = np.square(a.mean - b.mean).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return float(max(distance, 0.0))


def class_accuracy(logits: Float[np.ndarray, "n v"], labels: Int[np.ndarray, "n"]) -> float:
    """The fraction of rows whose largest logit is the label's.

    Raises:
      ValueError: shapes that do not match, labels outside 0..v-1, no rows, or logits that are not finite.
    """
    logits, labels = finite_matrix("logits", logits), np.asarray(labels)
    if labels.shape != logits.shape[:1] or not labels.size:
        raise ValueError(f"logits of shape {logits.shape} and labels of shape {labels.shape}: expected [n, v], [n], n > 0")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels {labels.min()}..{labels.max()}: must be in 0..{logits.shape[1] - 1}")
    return float((logits.argmax(axis=1) == labels).mean())


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n, m] squared distances."""
    square = np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1) - 2 * a @ b.T
    return np.maximum(square, 0)


def _radii(x: np.ndarray, k: int, chunk: int) -> np.ndarray:
    """[n] squared distance of each row to its k-th nearest other row."""
    out = np.empty(len(x))
    for start in range(0, len(x), chunk):
        square = _distances(x[start : start + chunk], x)
        row = np.arange(len(square))
        square[row, start + row] = np.inf
        out[start : start + chunk] = np.partition(square, k - 1, axis=1)[:, k - 1]
    return out


def _covered(x: np.ndarray, centres: np.ndarray, radii: np.ndarray, chunk: int) -> float:
    """The fraction of rows of `x` within at least one ball."""
    hits = [(_distances(x[i : i + chunk], centres) <= radii).any(axis=1).sum() for i in range(0, len(x), chunk)]
    return float(sum(hits) / len(x))


def precision_recall(
    real: Float[np.ndarray, "n d"], generated: Float[np.ndarray, "m d"], *, k: int = 3, chunk: int = 1024
) -> tuple[float, float]:
    """Fidelity and coverage separately: (generated features inside the real manifold, real ones inside the generated).

    A set's manifold is the union of the balls around its points that reach their k-th nearest neighbour.

    Args:
      real: features of real examples.
      generated: features of generated ones.
      k: which neighbour sets the radius; 3 in the paper.
      chunk: rows compared at a time; changes memory only.

    Returns:
      (precision, recall), each in [0, 1].

    Raises:
      ValueError: widths that differ, k < 1, or a set with no k-th neighbour.

    Kynkaanniemi et al. 2019, eq. 1-3.
    """
    real, generated = finite_matrix("real", real), finite_matrix("generated", generated)
    if real.shape[1] != generated.shape[1]:
        raise ValueError(f"features of widths {real.shape[1]} and {generated.shape[1]} cannot be compared")
    if k < 1 or chunk < 1:
        raise ValueError(f"k={k}, chunk={chunk}: must be >= 1")
    if min(len(real), len(generated)) <= k:
        raise ValueError(f"{len(real)} real and {len(generated)} generated features: k={k} needs more than {k} of each")
    # Distances do not change with the origin, and near it their expanded squares cancel least.
    centre = real.mean(axis=0)
    real, generated = real - centre, generated - centre
    precision = _covered(generated, real, _radii(real, k, chunk), chunk)
    recall = _covered(real, generated, _radii(generated, k, chunk), chunk)
    return precision, recall
