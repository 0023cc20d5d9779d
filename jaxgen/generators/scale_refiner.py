"""The masked half of S080 HMAR (Kumbong et al. 2025): blocks on a generator's trunk that predict the masked tokens of a scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxgen.generators.bases import AdaLNModel
from jaxgen.generators.markov_scale import MarkovScaleTransformer
from jaxgen.generators.next_scale import attention_scale
from kernels_pallas import BlockMask

__all__ = ["ScaleRefiner", "masked_logits", "refiner_from"]


class ScaleRefiner(AdaLNModel):
    """The last n blocks and the head of a generator once more, and the embedding of masked tokens.

    The generator's first blocks are shared and stay as they are; its last n blocks and head predict the next scale, these here
    the masked tokens of a scale (the published `base_blocks`, `ns_blocks` and `mask_blocks`).

    Attributes:
      depth: n.
      vocab, width, ..., implementation: as the generator's, see `NextScaleTransformer`.

    Example:
      >>> refiner = ScaleRefiner(vocab=64, width=64, heads=2, depth=1)
      >>> variables = refiner_from(generator, generator_variables, refiner, key)
      >>> params = {"generator": generator_variables, "refiner": variables}
      >>> logits = masked_logits(generator, refiner, params, labels, features, own, masked)
    """

    implementation: str | None = None

    def setup(self):
        init = nn.initializers.normal(self.init_std)
        self.mask_embed = self.param("mask_embed", init, (self.width,))
        self.transformer = self.build_transformer(attention_scale=attention_scale(self))
        self.head = self.build_head()

    def __call__(
        self, x: Float[Array, "b p d"], cond: Float[Array, "b d"], mask: BlockMask, *, train: bool = False
    ) -> Float[Array, "b p v"]:
        """Float32 logits from the trunk's output."""
        x, _ = self.transformer(x, cond, view_mask=mask, train=train)
        return self.head(x, cond)

    def param_shapes(self):
        """Shapes of the parameters, without making any."""
        x, cond = jnp.zeros((1, 1, self.width)), jnp.zeros((1, self.width))
        return jax.eval_shape(lambda key: self.init(key, x, cond, None), jax.random.key(0))


def masked_logits(
    generator: MarkovScaleTransformer,
    refiner: ScaleRefiner,
    params: Mapping[str, Any],
    labels: Int[Array, "b"],
    features: Float[Array, "b q c"],
    own: Float[Array, "b q c"],
    masked: Bool[Array, "b q"],
    *,
    scales: tuple[int, int] | None = None,
    **options: Any,
) -> Float[Array, "b p v"]:
    """Logits of some scales' tokens, given those of them that are not masked.

    The embedding of a position is that of the picture so far plus that of what the scale itself adds, or plus the mask's where
    the position is masked; the bias counts once.

    Args:
      generator: whose first blocks are the trunk.
      refiner: the rest.
      params: `{"generator": variables, "refiner": variables}`.
      labels: classes.
      features: what the scales read, see `MarkovScaleTransformer.hidden`.
      own: what their tokens add, see `MultiScaleTokenizer.own`.
      masked: which of them are masked.
      scales: which; None is all.
      options: of `refiner.apply`, such as `train`; the trunk runs as in sampling.
    """
    depth = generator.depth - refiner.depth
    trunk, order = generator.clone(depth=depth), generator.order
    first, end = scales or (0, order.steps)
    start, stop = order.span(first)[0], order.ends[end - 1]
    inner = params["generator"]["params"]
    variables = {"params": {**inner, "transformer": _blocks(inner["transformer"], 0, depth)}}
    masked = masked[..., None]
    added = masked * params["refiner"]["params"]["mask_embed"]
    if first == 0:
        added = jnp.pad(added, ((0, 0), (order.sizes[0], 0), (0, 0)))
    # A linear layer of a sum is the sum of two layers, with one bias.
    read = features + jnp.where(masked, 0.0, own)
    x, cond = trunk.apply(variables, labels, read, scales=scales, added=added, method="hidden")
    return refiner.apply(params["refiner"], x, cond, generator.mask[start:stop, start:stop], **options)


def refiner_from(generator: MarkovScaleTransformer, variables: Mapping[str, Any], refiner: ScaleRefiner, key) -> dict:
    """A refiner's parameters before training: the generator's last blocks and its head, and a random embedding of the mask."""
    inner = variables["params"]
    fresh = refiner.param_shapes()["params"]["mask_embed"]
    blocks = _blocks(inner["transformer"], generator.depth - refiner.depth, generator.depth)
    scale = (1 / (3 * refiner.width)) ** 0.5
    embed = scale * jax.random.normal(key, fresh.shape, fresh.dtype)
    return {"params": jax.tree.map(jnp.copy, {"transformer": blocks, "head": inner["head"]}) | {"mask_embed": embed}}


def _blocks(stack: Mapping[str, Any], start: int, stop: int) -> dict:
    """Parameters of some of a stack's blocks, as those of a shallower one."""
    if "blocks" in stack:
        return {"blocks": jax.tree.map(lambda x: x[start:stop], stack["blocks"])}
    return {f"blocks_{i - start}": stack[f"blocks_{i}"] for i in range(start, stop)}
