"""How much a linear classifier reads from frozen features."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

__all__ = ["linear_probe"]


def linear_probe(
    train: tuple[Float[np.ndarray, "n d"], Int[np.ndarray, "n"]],
    test: tuple[Float[np.ndarray, "m d"], Int[np.ndarray, "m"]],
    *,
    steps: int = 300,
    lr: float = 0.05,
    decay: float = 1e-4,
) -> float:
    """The share of test examples that a softmax classifier names, which was fitted to features of the training examples.

    Features are standardised by the training examples' mean and deviation, as by a batch norm that learns nothing (Chen et al.
    2021, *MoCo v3*). All examples are in each update of Adam, whose rate falls to 0 by a cosine.

    Args:
      train: features and classes.
      test: the same of examples that are only named.
      steps: updates.
      lr: the first rate.
      decay: weight of the weights' squared norm.

    Raises:
      ValueError: no examples, or features and classes that do not fit each other.
    """
    for name, (x, y) in (("train", train), ("test", test)):
        if np.ndim(x) != 2 or not len(x) or len(x) != len(y) or np.shape(x)[1] != np.shape(train[0])[1]:
            raise ValueError(f"{name}: features {np.shape(x)} and classes {np.shape(y)} do not fit")
    classes = int(max(np.max(train[1]), np.max(test[1]))) + 1
    named = _fit(*map(jnp.asarray, (*train, test[0])), steps=steps, lr=lr, decay=decay, classes=classes)
    return float(np.mean(np.asarray(named) == test[1]))


@functools.partial(jax.jit, static_argnames=("steps", "lr", "decay", "classes"))
def _fit(x, y, others, *, steps, lr, decay, classes):
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, others = (x - mean) / std, (others - mean) / std
    params = {"kernel": jnp.zeros((x.shape[1], classes)), "bias": jnp.zeros(classes)}
    adam = optax.adam(optax.cosine_decay_schedule(lr, steps))

    def loss(params):
        logits = x @ params["kernel"] + params["bias"]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return nll + decay * jnp.square(params["kernel"]).sum()

    def update(carry, _):
        params, state = carry
        updates, state = adam.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(update, (params, adam.init(params)), length=steps)
    return jnp.argmax(others @ params["kernel"] + params["bias"], axis=-1)
