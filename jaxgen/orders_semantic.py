"""Orders of an image's patches that its content decides: what it shows first, the rest later.

Song et al. 2024, *Semantic-Aware Autoregressive Image Modeling for Visual Representation Learning* (arXiv:2312.10457;
skyoux/SemAIM). Unlike the orders of `jaxgen.orders`, these are arrays, another one for each image.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

__all__ = ["KINDS", "patch_order", "similarities"]

KINDS = ("semantic", "similarity", "raster", "random")


def similarities(tokens: Float[Array, "b 1+n d"]) -> Float[Array, "b n"]:
    """The cosine of each patch's features with those of the whole image, which come first."""
    tokens = tokens / jnp.linalg.norm(tokens, axis=-1, keepdims=True).clip(1e-12)
    return jnp.einsum("bd,bnd->bn", tokens[:, 0], tokens[:, 1:])


def patch_order(kind: str, similarity: Float[Array, "b n"], key: Key[Array, ""]) -> Int[Array, "b n"]:
    """The patches of each image in the order in which they are predicted.

    Args:
      kind: "semantic" goes outwards from the patch that is most like the whole image, those at equal distances in random order;
        "similarity" takes the most similar next; "raster" goes row by row; "random" any way.
      similarity: of a square grid of patches, row by row; see `similarities`.
      key: for ties and chance.

    Raises:
      ValueError: an unknown kind, or patches that make no square.
    """
    side = round(similarity.shape[1] ** 0.5)
    if kind not in KINDS or side**2 != similarity.shape[1]:
        raise ValueError(f"kind {kind!r} of {similarity.shape[1]} patches: expected one of {', '.join(KINDS)}, of a square")
    chance = jax.random.uniform(key, similarity.shape)
    if kind == "semantic":
        cells = jnp.stack(jnp.divmod(jnp.arange(side**2), side), axis=-1)
        centre = cells[similarity.argmax(axis=1)]
        late = jnp.square(cells - centre[:, None]).sum(-1) + 0.5 * chance
    else:
        late = {"similarity": -similarity, "random": chance}.get(kind, jnp.broadcast_to(jnp.arange(side**2), chance.shape))
    return jnp.argsort(late, axis=1).astype(jnp.int32)
