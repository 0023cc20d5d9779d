"""Test-time search over next-scale samples (S086 TTS-VAR, Chen et al. 2025, arXiv 2507.18537).

Many candidates an image start, as the first scales cost little, and fewer go on. At early scales, whose pictures no reward can
judge yet, those go on that differ most: one for each cluster of semantic features. At late ones, candidates are resampled by a
reward of the picture so far; after the last scale the best one is returned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen.decoding.next_scale import Kept, sample_scales
from jaxgen.decoding.noise import SELECT
from jaxgen.decoding.search_clusters import representatives
from jaxgen.decoding.step import StepFn
from jaxgen.orders import Order

__all__ = ["Found", "Reward", "SearchPlan", "check_reward", "potential", "search_scales"]

Reward = Callable[[Float[Array, "b H W C"], Int[Array, "b"]], Float[Array, "b"]]

POTENTIALS = ("value", "diff", "max", "sum")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """How many candidates go on from each scale, and how they are chosen.

    Attributes:
      widths: candidates of an image that go on from each scale; scale k is sampled by those that went on from the scale before,
        and the first by widths[0]. The published one for 13 scales is N times 8, 8, 6, 6, 6, 4, 2, 2, 2, 1, 1, 1, 1.
      cluster: scales after which one candidate a cluster goes on; published: 2, 5 (counted from 0).
      resample: scales after which candidates are drawn with replacement by their potential; published: 6, 9. Their number need
        not fall there.
      potential: what of the rewards so far counts, see `potential`.
      strength: lambda; candidates are drawn in proportion to exp(lambda potential).
      steps: iterations of k-means.

    Raises:
      ValueError: widths that grow, that fall at a scale where nothing chooses, or of another kind than said.

    Example:
      >>> plan = SearchPlan(widths=(4, 2, 1, 1), cluster=(1,), resample=(2,)).times(2)
      >>> plan.widths, [plan.sampled(scale) for scale in range(4)]
      ((8, 4, 2, 2), [8, 8, 4, 2])
    """

    widths: tuple[int, ...]
    cluster: tuple[int, ...] = ()
    resample: tuple[int, ...] = ()
    potential: str = "value"
    strength: float = 10.0
    steps: int = 20

    def __post_init__(self):
        widths, chosen = self.widths, (*self.cluster, *self.resample)
        if not widths or min(widths) < 1:
            raise ValueError(f"widths={widths}: expected at least one candidate at each scale")
        if any(b > a for a, b in zip(widths, widths[1:])):
            raise ValueError(f"widths={widths} must not grow")
        # After the last scale the best one is chosen, not one by chance.
        if len(set(chosen)) != len(chosen) or any(not 1 <= scale < len(widths) - 1 for scale in chosen):
            raise ValueError(
                f"cluster={self.cluster} and resample={self.resample}: expected different scales, each in 1..{len(widths) - 2}"
            )
        falls = [scale for scale in range(1, len(widths)) if widths[scale] < widths[scale - 1]]
        if any(scale not in chosen for scale in falls):
            raise ValueError(f"widths={widths} fall at scales {falls}: each has to be in cluster or resample")
        if any(scale not in falls for scale in self.cluster):
            raise ValueError(f"cluster={self.cluster}: widths={widths} have to fall there")
        if self.potential not in POTENTIALS:
            raise ValueError(f"potential={self.potential!r}: expected one of {', '.join(POTENTIALS)}")
        if not 0 <= self.strength < float("inf") or self.steps < 1:
            raise ValueError(f"strength={self.strength} must be finite and at least 0, and steps={self.steps} at least 1")

    @classmethod
    def best_of(cls, n: int, scales: int) -> SearchPlan:
        """The plan that samples `n` candidates to the end."""
        return cls(widths=(n,) * scales)

    def times(self, n: int) -> SearchPlan:
        """The plan with `n` times as many candidates at each scale."""
        return dataclasses.replace(self, widths=tuple(n * width for width in self.widths))

    def sampled(self, scale: int) -> int:
        """Candidates of an image that the model predicts a scale of."""
        return self.widths[max(scale - 1, 0)]

    def tokens(self, order: Order) -> int:
        """Tokens that the model predicts for an image."""
        return sum(self.sampled(scale) * size for scale, size in enumerate(order.sizes))


class Found(NamedTuple):
    """What a search returns, for m images.

    Attributes:
      tokens: of the best candidates.
      images: of the best candidates.
      score: their rewards.
      scores: of all candidates at each scale of `resample`, and of the last ones in the end: what they were chosen by.
    """

    tokens: Int[Array, "m l"]
    images: Float[Array, "m H W C"]
    score: Float[Array, "m"]
    scores: tuple[Float[Array, "m n"], ...]


class _Paths(NamedTuple):
    """The pictures so far, and the rewards that their ancestors had."""

    picture: Any
    past: Float[Array, "b j"]


def potential(scores: Float[Array, "... j"], kind: str) -> Float[Array, "..."]:
    """A candidate's potential from its rewards so far, the last axis, of which there is one at least.

    "value" is the last one, "diff" what it gained on the one before, "max" the largest and "sum" the sum.
    """
    if kind == "diff" and scores.shape[-1] > 1:
        return scores[..., -1] - scores[..., -2]
    if kind in ("value", "diff"):
        return scores[..., -1]
    return scores.max(axis=-1) if kind == "max" else scores.sum(axis=-1)


def search_scales(
    step: StepFn,
    feed: Callable[..., tuple[Any, Float[Array, "b q c"] | None]],
    order: Order,
    *,
    plan: SearchPlan,
    labels: Int[Array, "m"],
    decode: Callable[[Any, Any], Float[Array, "b H W C"]],
    reward: Reward,
    features: Callable[[Float[Array, "b H W C"]], Float[Array, "b d"]] | None = None,
    params: Any,
    carry: Any,
    key: Any,
    **options: Any,
) -> Found:
    """`sample_scales` with a plan of candidates.

    Args:
      step, feed, order, params, carry, key: see `sample_scales`. Rows are an image's candidates, one image after another: the
        first scale has m * plan.widths[0] of them, and cache and condition twice as many. What is found for image i depends on
        the key, i and the plan, not on the other images.
      plan: how many go on.
      labels: what the reward is told of each image.
      decode: `(params, carry) -> images` of the pictures so far.
      reward: `(images, labels) -> [b]`, larger is better; traceable.
      features: `images -> [b, d]`, in which candidates are clustered.
      **options: further ones of `sample_scales`: cache, cond, inputs, settings, ...

    Raises:
      ValueError: a plan of another number of scales, clusters without `features`, or a reward of another shape than [b].
    """
    if len(plan.widths) != order.steps:
        raise ValueError(f"widths={plan.widths}: expected one for each of {order.steps} scales")
    if plan.cluster and features is None:
        raise ValueError(f"cluster={plan.cluster}: there are no features to cluster by")
    m, first = len(labels), plan.widths[0]
    check_reward(reward, jax.eval_shape(decode, params, carry).shape[1:])
    scored = []

    def judge(images, width):
        scored.append(reward(images, jnp.repeat(labels, width)).astype(jnp.float32).reshape(m, width))
        return scored[-1].reshape(-1, 1)

    def select(params, paths: _Paths, scale: int) -> Kept | None:
        if scale not in (*plan.cluster, *plan.resample):
            return None
        before, after = plan.sampled(scale), plan.widths[scale]
        images, keys = decode(params, paths.picture), _keys(key, m, scale)
        if scale in plan.cluster:
            seen = features(images).reshape(m, before, -1)
            chosen = jax.vmap(lambda key, x: representatives(key, x, after, steps=plan.steps))(keys, seen)
        else:
            paths = paths._replace(past=jnp.concatenate([paths.past, judge(images, before)], axis=1))
            weight = plan.strength * potential(paths.past.reshape(m, before, -1), plan.potential)
            chosen = jax.vmap(lambda key, w: jax.random.categorical(key, w, shape=(after,)))(keys, weight)
        image = jnp.arange(m)[:, None]
        # Copies of a candidate go different ways, as they get numbers, and so noise, of their own.
        return Kept(paths, (image * before + chosen).reshape(-1), (image * first + jnp.arange(after)).reshape(-1))

    def feed_paths(params, paths, scale, tokens):
        picture, inputs = feed(params, paths.picture, scale, tokens)
        return paths._replace(picture=picture), inputs

    paths = _Paths(carry, jnp.zeros((m * first, 0)))
    tokens, paths = sample_scales(step, feed_paths, order, params=params, carry=paths, key=key, select=select, **options)
    images, last = decode(params, paths.picture), plan.widths[-1]
    judge(images, last)
    best = scored[-1].argmax(axis=1)
    at = jnp.arange(m) * last + best
    return Found(tokens[at], images[at], scored[-1].max(axis=1), tuple(scored))


def _keys(key, count: int, scale: int):
    """One for each image, for what is drawn after a scale."""
    of_scale = jax.random.fold_in(jax.random.fold_in(key, SELECT), scale)
    return jax.vmap(jax.random.fold_in, (None, 0))(of_scale, jnp.arange(count))


def check_reward(reward: Reward, image_shape: tuple[int, int, int]) -> None:
    """That a reward is traceable and gives a number for each image. Only shapes are computed.

    Args:
      reward: see `search_scales`.
      image_shape: (H, W, C).

    Raises:
      ValueError: another shape than [b], or another type than float.
    """
    images = jax.ShapeDtypeStruct((3, *image_shape), jnp.float32)
    score = jax.eval_shape(reward, images, jax.ShapeDtypeStruct((3,), jnp.int32))
    if not hasattr(score, "shape") or score.shape != (3,) or not jnp.issubdtype(score.dtype, jnp.floating):
        raise ValueError(f"reward: {score} for 3 images, expected floats of shape (3,)")
