"""Next-frequency systems (S007 NFIG): the next-scale recipe on a tokenizer whose scales are frequency bands."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxgen.data import pixels
from jaxgen.quantizers.frequency import DIVISIONS, TRANSFORMS
from jaxgen.recipe import Recipe, modules
from jaxgen.recipes.evaluation import held_out
from jaxgen.recipes.next_scale import NextScaleConfig, TokenizerConfig
from jaxgen.scale_lists import check_increasing
from jaxgen.tokenizers import FrequencyTokenizer

__all__ = ["FrequencyConfig", "FrequencyTokenizerConfig", "kept_power", "tokenizer_columns"]


@dataclasses.dataclass(frozen=True)
class FrequencyTokenizerConfig(TokenizerConfig):
    """Sizes of `FrequencyTokenizer`.

    Attributes:
      division: "tokens", as published, or "grid": where one band ends and the next begins, see
        `jaxgen.quantizers.frequency.band_masks`.
      transform: "fft", as published, or "dct".

    Raises:
      ValueError: bands whose grids do not increase, an unknown division or transform.
    """

    division: str = "tokens"
    transform: str = "fft"

    def __post_init__(self):
        super().__post_init__()
        check_increasing(self.patch_nums)
        for name, known in (("division", DIVISIONS), ("transform", TRANSFORMS)):
            if getattr(self, name) not in known:
                raise ValueError(f"tokenizer.{name}={getattr(self, name)!r}: expected one of {', '.join(known)}")


@dataclasses.dataclass(frozen=True)
class FrequencyConfig(NextScaleConfig):
    """`NextScaleConfig` over frequency bands; the generator is VAR's (Huang et al. 2025, section 3.2)."""

    tokenizer: FrequencyTokenizerConfig = FrequencyTokenizerConfig()

    def build_tokenizer(self) -> FrequencyTokenizer:
        """The tokenizer module."""
        return FrequencyTokenizer(**self._tokenizer_fields())


def kept_power(images: Float[Array, "b H W C"], output: Float[Array, "b H W C"], parts: int = 3) -> Float[Array, " parts"]:
    """How much of the images' power each part of the spectrum keeps in a reconstruction: 1 - |F(x) - F(y)|^2 / |F(x)|^2.

    Args:
      images: x.
      output: y.
      parts: rings of equal width around the mean's frequency, low to high; the mean itself is left out.
    """
    h, w = images.shape[1:3]
    radius = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.fftfreq(w))
    ring = np.minimum((radius / radius.max() * parts).astype(int), parts - 1)
    rings = np.stack([(ring == part) & (radius > 0) for part in range(parts)])

    def power(x):
        return jnp.einsum("phw,bhwc->p", rings.astype(np.float32), jnp.square(jnp.abs(jnp.fft.fft2(x, axes=(1, 2)))))

    return 1 - power(images - output) / power(images)


def tokenizer_columns(recipe: Recipe, params: Mapping[str, dict], *, limit: int = 256) -> dict:
    """What a system's tokenizer keeps of held-out images in each third of the spectrum, for a claim's table."""
    tokenizer, variables, data = recipe.config.build_tokenizer(), modules(params)["tokenizer"], recipe.config.data
    images = np.concatenate([pixels(batch["image"]) for batch in held_out(data, batch_size=64, limit=limit)])

    @jax.jit
    def kept(variables, images):
        output = tokenizer.apply(variables, tokenizer.apply(variables, images, method="encode"), method="decode")
        return kept_power(images, output)

    names = ("low", "middle", "high")
    return {f"{name} frequencies kept": round(float(share), 3) for name, share in zip(names, kept(variables, images))}
