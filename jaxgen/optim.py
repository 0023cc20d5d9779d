"""AdamW with the learning-rate and weight-decay schedules of the published next-scale models.

Tian et al., *Visual Autoregressive Modeling* (arXiv:2404.02905); the equations follow the authors' `utils/lr_control.py`.
With n updates, w of them warm-up, update t = 0 .. n-1, and u = (t - w) / (n - 1 - w) the way from warm-up to the end:

    lr(t) / lr = s + (1 - s) t / w                      t < w               (s = lr_start)
    lr(t) / lr = 1                                      u < T               ("lin0": T = 0.05, "lin": T = 0.15)
    lr(t) / lr = e + (1 - e) (1 - u) / (1 - T)          u >= T              (e = lr_end)
    lr(t) / lr = e + (1 - e) (1 + cos(pi u)) / 2        "cosine"
    wd(t) = wd_end + (wd - wd_end) (1 + cos(pi t / (n - 1))) / 2
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

__all__ = ["OptimConfig", "adamw", "decay_mask", "lr_schedule", "weight_decay_schedule"]

_PLATEAU = {"lin0": 0.05, "lin": 0.15}
_SCHEDULES = (*_PLATEAU, "cosine", "constant")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Settings of `adamw`.

    Attributes:
      lr: peak learning rate.
      warmup_steps: updates of linear warm-up from `lr_start * lr` to `lr`.
      schedule: `"lin0"`, `"lin"`, `"cosine"` or `"constant"` after warm-up (see the module's equations).
      lr_start: learning rate of the first update, as a fraction of `lr`.
      lr_end: learning rate of the last update, as a fraction of `lr`; `"constant"` does not use it.
      weight_decay: decoupled weight decay of the first update (times the learning rate, as in torch's AdamW).
      weight_decay_end: weight decay of the last update; `None` keeps `weight_decay` throughout.
      b1, b2, eps: Adam's moment decays and the constant beside the root of the second moment.
      clip: global norm to which gradients are clipped; 0 clips nothing.
      no_decay: parameters whose path contains one of these are not decayed (see `decay_mask`).
    """

    lr: float = 1e-4
    warmup_steps: int = 0
    schedule: str = "lin0"
    lr_start: float = 0.005
    lr_end: float = 0.01
    weight_decay: float = 0.05
    weight_decay_end: float | None = None
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip: float = 2.0
    no_decay: tuple[str, ...] = ()

    def __post_init__(self):
        if self.schedule not in _SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r}: expected one of {', '.join(_SCHEDULES)}")
        for name in ("lr", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected a positive number")
        for name in ("warmup_steps", "weight_decay", "weight_decay_end", "clip"):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected a number that is not negative")
        for name in ("lr_start", "lr_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a fraction of lr in [0, 1]")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a decay in [0, 1)")


def lr_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate of update `t` (0-based) of `steps`; later updates keep the last one's.

    Raises:
      ValueError: the warm-up does not end before the training does.

    Example:
      >>> float(lr_schedule(OptimConfig(lr=1.0, schedule="constant", warmup_steps=2), 10)(5))
      1.0
    """
    warmup = config.warmup_steps
    if steps > 0 and warmup >= steps:
        raise ValueError(f"warmup_steps={warmup} must be fewer than the {steps} steps of training")
    rest = max(steps - 1 - warmup, 1)

    def schedule(t):
        t = jnp.asarray(t, jnp.float32)
        u = jnp.clip((t - warmup) / rest, 0.0, 1.0)
        if config.schedule == "constant":
            factor = jnp.ones_like(u)
        elif config.schedule == "cosine":
            factor = config.lr_end + (1 - config.lr_end) * 0.5 * (1 + jnp.cos(math.pi * u))
        else:
            plateau = _PLATEAU[config.schedule]
            decayed = config.lr_end + (1 - config.lr_end) * (1 - u) / (1 - plateau)
            factor = jnp.where(u < plateau, 1.0, decayed)
        if warmup:
            factor = jnp.where(t < warmup, config.lr_start + (1 - config.lr_start) * t / warmup, factor)
        return config.lr * factor

    return schedule


def weight_decay_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """The weight decay of update `t` (0-based) of `steps`: half a cosine from `weight_decay` to `weight_decay_end`."""
    start = config.weight_decay
    end = start if config.weight_decay_end is None else config.weight_decay_end

    def schedule(t):
        u = jnp.clip(jnp.asarray(t, jnp.float32) / max(steps - 1, 1), 0.0, 1.0)
        return end + (start - end) * 0.5 * (1 + jnp.cos(math.pi * u))

    return schedule


def decay_mask(params: Any, no_decay: tuple[str, ...] = ()) -> Any:
    """Which parameters are decayed, as a tree of bools.

    Not decayed are vectors and scalars, parameters whose name ends in `bias` or is `scale`, and those whose path (such as
    `params/blocks/attn/scale_mul`) contains an entry of `no_decay`. The published rule is "one dimension, or a bias, or
    named"; here names carry more weight, since a scanned stack of layers gives every bias and scale a leading layer
    axis. A vector of scanned layers with another name has to be listed in `no_decay`.
    """

    def decays(path, x):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        name = path.rpartition("/")[2]
        vector = x.ndim <= 1 or name.endswith("bias") or name == "scale"
        return not vector and not any(part in path for part in no_decay)

    return jax.tree_util.tree_map_with_path(decays, params)


def adamw(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clipping, Adam, decoupled weight decay and the schedules, for a training of `steps` updates.

        g <- g min(1, clip / |g|);   m, v <- Adam moments;   p <- p - lr(t) (m^ / (sqrt(v^) + eps) + wd(t) p)

    Loshchilov and Hutter (arXiv:1711.05101), algorithm 2, with the schedule multiplying both terms, as torch has it.

    Raises:
      ValueError: see `lr_schedule`.
    """
    parts = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    parts.append(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps))
    if config.weight_decay or config.weight_decay_end:
        mask = functools.partial(decay_mask, no_decay=config.no_decay)
        parts.append(optax.add_decayed_weights(weight_decay_schedule(config, steps), mask))
    parts.append(optax.scale_by_learning_rate(lr_schedule(config, steps)))
    return optax.chain(*parts)
