"""The inception score: are classes sure of each sample, and are there all of them?"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from jaxgen.metrics.frechet import finite_matrix

__all__ = ["ScoreStats", "inception_score", "softmax"]


def inception_score(probs: Float[np.ndarray, "n v"]) -> float:
    """exp(mean_x KL(p(y|x) || p(y))), from 1 (all alike or undecided) to v (sure of each, all classes equally often).

    Args:
      probs: class probabilities of any classifier; scores of different classifiers cannot be compared.

    Raises:
      ValueError: rows that are not probabilities, or no rows.

    Salimans et al. 2016, section 4. `ScoreStats` has it for probabilities that arrive in batches, and as a mean over splits.
    """
    probs = finite_matrix("probs", probs)
    if not len(probs):
        raise ValueError(f"probs of shape {probs.shape}: there must be some")
    return ScoreStats.empty(probs.shape[1], split=len(probs)).update(probs, np.arange(len(probs))).score()[0]


def softmax(logits: Float[np.ndarray, "n v"]) -> Float[np.ndarray, "n v"]:
    """Probabilities in float64."""
    logits = np.asarray(logits, np.float64)
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exp / exp.sum(axis=1, keepdims=True)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ScoreStats:
    """What the inception score needs of probabilities that arrive in batches, in any order and on any host.

    The score of s samples grows with s, so evaluators cut the samples into splits (of 5000 in guided-diffusion, ten in
    the paper) and report the mean of the splits' scores. A sample's split is its number // `split`.

    Attributes:
      split: samples in a split.
      count: [s], how many of each split were seen.
      total: [s, v], the sums of their probabilities p.
      negentropy: [s], the sums of p log p.
    """

    split: int
    count: Int[np.ndarray, "s"]
    total: Float[np.ndarray, "s v"]
    negentropy: Float[np.ndarray, "s"]

    @classmethod
    def empty(cls, classes: int, split: int = 5000) -> ScoreStats:
        """Of no samples.

        Raises:
          ValueError: no classes or empty splits.
        """
        if classes < 1 or split < 1:
            raise ValueError(f"classes={classes}, split={split}: must be >= 1")
        return cls(split=split, count=np.zeros(0, int), total=np.zeros((0, classes)), negentropy=np.zeros(0))

    def update(self, probs: Float[np.ndarray, "n v"], index: Int[np.ndarray, "n"]) -> ScoreStats:
        """With the probabilities of some more samples.

        Args:
          probs: rows that sum to 1.
          index: the samples' numbers.

        Raises:
          ValueError: rows that are not probabilities or have another width, or numbers that do not fit them.
        """
        probs, index = finite_matrix("probs", probs), np.asarray(index)
        if (probs.size and probs.min() < 0) or np.abs(probs.sum(axis=1) - 1).max(initial=0) > 1e-3:
            raise ValueError(f"probs of shape {probs.shape}: every row must be non-negative and sum to 1")
        if index.shape != probs.shape[:1] or index.min(initial=0) < 0:
            raise ValueError(f"index of shape {index.shape} from {index.min(initial=0)}: expected {len(probs)} numbers >= 0")
        splits = 1 + int(index.max(initial=-1)) // self.split
        which = index // self.split
        terms = (probs * np.log(np.where(probs > 0, probs, 1))).sum(axis=1)  # p log p is 0 at p = 0
        count, total, negentropy = np.zeros(splits, int), np.zeros((splits, probs.shape[1])), np.zeros(splits)
        np.add.at(count, which, 1)
        np.add.at(total, which, probs)
        np.add.at(negentropy, which, terms)
        return self.merge(ScoreStats(split=self.split, count=count, total=total, negentropy=negentropy))

    def merge(self, other: ScoreStats) -> ScoreStats:
        """Of both sets together.

        Raises:
          ValueError: other splits or another number of classes.
        """
        if (self.split, self.total.shape[1]) != (other.split, other.total.shape[1]):
            raise ValueError(
                f"scores over {self.total.shape[1]} classes in splits of {self.split} and over {other.total.shape[1]} in "
                f"splits of {other.split} cannot be joined"
            )
        splits = max(len(self.count), len(other.count))

        def add(a, b):
            out = np.zeros((splits, *a.shape[1:]), a.dtype)
            out[: len(a)] += a
            out[: len(b)] += b
            return out

        names = ("count", "total", "negentropy")
        return dataclasses.replace(self, **{name: add(getattr(self, name), getattr(other, name)) for name in names})

    def score(self) -> tuple[float, float]:
        """(mean, standard deviation) of the splits' scores; a last split that is not full counts like the others.

        log IS = E[sum p log p] - sum q log q, with q the mean of p.

        Raises:
          ValueError: no samples.
        """
        seen = self.count > 0
        if not seen.any():
            raise ValueError("no samples: they have no inception score")
        count = self.count[seen]
        q = self.total[seen] / count[:, None]
        marginal = (q * np.log(np.where(q > 0, q, 1))).sum(axis=1)
        scores = np.exp(self.negentropy[seen] / count - marginal)
        return float(scores.mean()), float(scores.std())
