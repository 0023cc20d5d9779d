"""From key and labels to images: clusters one after another, then all tokens at once, then pixels."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxgen.decoding import Settings, check_settings, gumbel, truncate
from jaxgen.generators.coarse_to_fine import CoarseToFineLlama
from jaxgen.generators.next_scale_sampler import check_labels
from jaxgen.generators.next_token_sampler import NextTokenSampler
from jaxgen.tokenizers.flexible import FlexibleTokenizer

__all__ = ["CoarseToFineSampler"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoarseToFineSampler:
    """Samples as `NextTokenSampler` does, with one call of the second model after those of the first.

    Attributes:
      generator: predicts clusters and tokens.
      tokenizer: of one scale; turns tokens into pictures. None where tokens are all that is wanted.

    Raises:
      ValueError: a tokenizer of another length or vocabulary.
    """

    generator: CoarseToFineLlama
    tokenizer: FlexibleTokenizer | None

    def __post_init__(self):
        g, t = self.generator, self.tokenizer
        if t is not None and (t.order.length, t.vocab) != (g.length, g.vocab):
            raise ValueError(
                f"generator (length={g.length}, vocab={g.vocab}) does not fit "
                f"tokenizer (length={t.order.length}, vocab={t.vocab})"
            )

    def __call__(
        self,
        params: dict,
        key: Key[Array, ""],
        labels: Int[Array, "b"],
        settings: Settings = Settings(),
        fine: Settings | None = None,
    ) -> tuple[Float[Array, "b H W C"] | None, Int[Array, "b l"]]:
        """(Images in [-1, 1], None without a tokenizer; tokens in raster order), one image a label.

        Args:
          params: `{"generator": ..., "tokenizer": ...}`.
          key: the i-th image depends on the key, i, its label and the settings, not on the rest of the batch.
          labels: classes.
          settings: of the clusters; traced. `top_k` counts clusters.
          fine: of the tokens within their clusters; traced. None is `settings`, without top-k and top-p.

        Raises:
          ValueError: labels or settings out of range.
        """
        labels = check_labels(labels, self.generator.num_classes)
        fine = settings._replace(top_k=0, top_p=0.0) if fine is None else fine
        check_settings(**fine._asdict(), vocab=self.generator.vocab)
        variables = params["generator"]["params"]
        first = NextTokenSampler(generator=self.generator.first, tokenizer=None)
        _, coarse = first({"generator": {"params": variables["coarse"]}}, key, labels, settings)
        return self._refine(params, key, labels, coarse, Settings(*map(jnp.float32, fine)))

    @functools.partial(jax.jit, static_argnums=0)
    def _refine(self, params, key, labels, coarse, settings):
        b, model = len(labels), self.generator
        null = model.drop(labels, jnp.ones(b, bool))
        twice = jnp.concatenate([labels, null]), jnp.concatenate([coarse, coarse])
        logits, inside = model.apply(params["generator"], *twice, method="refine")
        conditional, unconditional = jnp.split(logits, 2)
        weight = jnp.broadcast_to(settings.cfg, (model.length,))[:, None]
        mixed = jnp.where(inside[:b], (1 + weight) * conditional - weight * unconditional, -jnp.inf)
        mixed = truncate(mixed, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p)
        # Noise of its own, independent of that of the clusters.
        noise = gumbel(jax.random.fold_in(key, 1), jnp.arange(b), jnp.arange(model.length), model.vocab)
        tokens = jnp.argmax(mixed + noise, axis=-1).astype(jnp.int32)
        if self.tokenizer is None:
            return None, tokens
        return self.tokenizer.apply(params["tokenizer"], tokens, method="decode"), tokens
