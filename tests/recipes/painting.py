"""What the tests of image quality share: a recipe that is quick to sample, and a network that reads its images."""

import types

import jax
import jax.numpy as jnp
import numpy as np


class Reader:
    """Some means of an image's pixels in place of InceptionV3's features."""

    def apply(self, variables, images, method):
        assert method == "observe" and images.dtype == jnp.uint8
        x = images.astype(jnp.float32).reshape(len(images), -1) / 255
        return {"pool": x[:, :5] * variables, "spatial": x[:, 5:8], "logits": 8 * x[:, 8:12]}


class Painter:
    """Images [b, 2, 2, 3] that show their label and the call's noise; `left` counts calls down to an interruption."""

    shows = "images"

    def __init__(self, left=10**9):
        self.left, self.calls = left, []
        self.config = types.SimpleNamespace(num_classes=4)

    def sample(self, params, key, labels, cfg=1.0):
        if self.left == len(self.calls):
            raise KeyboardInterrupt
        self.calls.append(int(labels.shape[0]))
        return {"images": _paint(params, key, jnp.asarray(labels), cfg)}


@jax.jit
def _paint(params, key, labels, cfg):
    noise = jax.random.uniform(key, (len(labels), 12), minval=-1, maxval=1)
    return jnp.tanh(cfg * noise + params * labels[:, None] * jnp.linspace(-1, 1, 12)).reshape(-1, 2, 2, 3)


def close(a, b, rtol=1e-5):
    """Whether two statistics are the same but for rounding."""
    pairs = [(getattr(a, name), getattr(b, name)) for name in ("pool", "spatial")]
    same = all(np.allclose(x.mean, y.mean, rtol) and np.allclose(x.cov, y.cov, rtol, 1e-7) for x, y in pairs)
    same = same and len(a) == len(b) and np.allclose(a.kept(), b.kept())
    return bool(same and np.allclose(a.score.score(), b.score.score(), rtol))
