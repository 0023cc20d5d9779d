"""From key and labels to images in one compiled function: a masked model of continuous tokens, with or without a draft."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxgen.decoding.density import DensityRule, PathDensity
from jaxgen.decoding.speculate_latents import LatentModel, LatentResult, speculate_latents
from jaxgen.decoding.step import Out, View
from jaxgen.decoding.transforms import check_settings
from jaxgen.generators.masked_latent import MaskedLatentTransformer, cosine_steps
from jaxgen.generators.next_scale_sampler import check_labels
from jaxgen.orders import Order
from jaxgen.paths_vp import VPPath
from jaxgen.tokenizers.latents import LatentTokenizer

__all__ = ["MaskedLatentSampler", "latent_model"]


def latent_model(module: MaskedLatentTransformer, path: VPPath, order: Order, *, temperature=1.0, cfg=None) -> LatentModel:
    """A module as `speculate_latents` takes it; its condition is labels [b].

    With `cfg` the network is asked twice, and predicts (1 + t) conditional - t unconditional, where t grows linearly with the
    share of tokens that are known after the step, where the last one counts as unknown to the end (Li et al. 2024, appendix B and
    their code; their factor is 1 + t). The variance is the conditional one.

    Args:
      module: the generator.
      path: steps of the module's path to sample with.
      order: of generation, for the growth of t.
      temperature: factor on the noise of every step of the chain.
      cfg: guidance; None asks once.
    """

    def step(params, cache, view: View, labels):
        if cfg is None:
            return module.apply(params, cache, view, labels, method="step")
        unconditional = jnp.full_like(labels, module.num_classes)
        both = View(*(jnp.concatenate([x, x]) for x in view))._replace(pos=view.pos)
        out, cache = module.apply(params, cache, both, jnp.concatenate([labels, unconditional]), method="step")
        t = cfg * jnp.asarray(np.minimum(order.ends, order.length - 1) / order.length, jnp.float32)[view.time]
        return Out((*jnp.split(out.params, 2), jnp.broadcast_to(t[:, None, None], view.tokens.shape[:2] + (1,)))), cache

    def kernel(params, z, x, i):
        def predict(z):
            return module.apply(params, z, x, jnp.asarray(path.times)[i - 1], method="predict")

        if cfg is None:
            prediction, share = predict(z)
        else:
            z, z_null, t = z
            prediction, share = predict(z)
            prediction = (1 + t) * prediction - t * predict(z_null)[0]
        mean, log_std = path.moments(module.prediction, prediction, share, x, i)
        return mean, log_std + jnp.log(temperature)

    return LatentModel(step, kernel, path.length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLatentSampler:
    """Samples images in `steps` steps of the generator, or fewer calls of it with the help of a draft.

    Attributes:
      generator: the target.
      tokenizer: between tokens and pictures.
      draft: a smaller generator over the same tokens; None without speculation.
      steps: of generation, see `cosine_steps`.
      chain_steps: steps of the head's chain.
      drafts: steps that the draft goes ahead; 0 is plain sampling.
      prefill: share of the steps that the target takes alone first.
      rule: which drafts stay.
      at_once: see `sample_residual`.

    Example:
      >>> sampler = MaskedLatentSampler(generator=generator, tokenizer=tokenizer, steps=16, chain_steps=25)
      >>> images, result = sampler({"generator": variables, "tokenizer": {}}, jax.random.key(0), jnp.array([0, 1, 2]))
    """

    generator: MaskedLatentTransformer
    tokenizer: LatentTokenizer
    draft: MaskedLatentTransformer | None = None
    steps: int = 64
    chain_steps: int = 100
    drafts: int = 0
    prefill: float = 0.15
    rule: DensityRule = PathDensity()
    at_once: int = 4

    def __post_init__(self):
        length, channels = self.tokenizer.length, self.tokenizer.token_channels
        for name, module in (("generator", self.generator), ("draft", self.draft)):
            if module is not None and (module.length, module.channels) != (length, channels):
                raise ValueError(
                    f"{name} (length={module.length}, channels={module.channels}) does not fit the tokenizer "
                    f"(length={length}, channels={channels})"
                )
        if not 0 <= self.prefill <= 1:
            raise ValueError(f"prefill={self.prefill}: expected a share in [0, 1]")
        if self.drafts and self.draft is None:
            raise ValueError(f"drafts={self.drafts}: there is no draft model")

    @property
    def order(self) -> Order:
        """Tokens of each step."""
        return cosine_steps(self.tokenizer.length, self.steps)

    @property
    def prefill_steps(self) -> int:
        """Steps of the target alone: as published, 0, 1, ... up to the share itself."""
        return int(self.prefill * self.steps) + 1 if self.prefill else 0

    def __call__(
        self, params: dict[str, Any], key: Key[Array, ""], labels: Int[Array, "b"], *, cfg=0.0, temperature=1.0
    ) -> tuple[Float[Array, "b H W C"], LatentResult]:
        """(images in [-1, 1], what was sampled), one image a label.

        Args:
          params: variables by module: "generator", "tokenizer" and "draft".
          key: of the call.
          labels: classes; `num_classes` is unconditional.
          cfg: guidance, see `latent_model`; 0 asks the model once, and is another compile.
          temperature: see `latent_model`.

        Raises:
          ValueError: labels or settings out of range.
        """
        labels = check_labels(labels, self.generator.num_classes)
        check_settings(cfg=cfg, temperature=temperature)
        return self._sample(bool(cfg), params, key, labels, jnp.float32(cfg), jnp.float32(temperature))

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def _sample(self, guided: bool, params, key, labels, cfg, temperature):
        order = self.order

        def model(module):
            path = module.path.respaced(self.chain_steps)
            return latent_model(module, path, order, temperature=temperature, cfg=cfg if guided else None)

        result = speculate_latents(
            model(self.generator),
            model(self.draft) if self.drafts else None,
            self.rule,
            params=params["generator"],
            draft_params=params.get("draft"),
            cond=labels,
            batch=labels.shape[0],
            channels=self.tokenizer.token_channels,
            order=order,
            drafts=self.drafts,
            prefill=self.prefill_steps,
            key=key,
            at_once=self.at_once,
        )
        return self.tokenizer.apply(params.get("tokenizer", {}), result.tokens, method="decode"), result
