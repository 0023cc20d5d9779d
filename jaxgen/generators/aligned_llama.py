"""An `ImageLlama` whose hidden states learn what the whole image looks like to an encoder (S029 ARRA).

Xie et al. 2025, *Unleashing the Potential of Large Language Models for Text-to-Image Generation through Autoregressive
Representation Alignment* (arXiv:2503.07334; xiexing0916/ARRA, whose released loss is the one here). The architecture and the
sampling are those of the model that is trained.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen.generators.image_llama import ImageLlama

__all__ = ["AlignedLlama"]


class AlignedLlama(ImageLlama):
    """Condition and the tokens so far -> logits of the next token and, while training, what the image will be like.

    Each position that predicts a token is hybrid ("<HYBNEXT>"): behind the first blocks its hidden state, through two layers
    that sampling never uses, is compared with the features of the whole image.

    Attributes:
      align_width: c, numbers of the features.
      align_after: blocks before the hidden states that are compared.
      vocab, grid, ...: see `ImageLlama`.

    Raises:
      ValueError: blocks that are not there, or are scanned, so that none can be looked behind.
    """

    align_width: int = 768
    align_after: int = 1

    def __post_init__(self):
        if not 1 <= self.align_after <= self.depth:
            raise ValueError(f"align_after={self.align_after}: expected 1..{self.depth} blocks")
        if self.scan_layers:
            raise ValueError("scan_layers=True: hidden states between blocks need unrolled ones")
        super().__post_init__()

    def setup(self):
        super().setup()
        self.align_fc1 = nn.Dense(self.align_width, dtype=self.dtype)
        self.align_fc2 = nn.Dense(self.align_width, dtype=self.dtype)

    def __call__(self, cond, tokens: Int[Array, "b l"], *, train: bool = False) -> Float[Array, "b l v"]:
        """See `ImageLlama`."""
        return self.aligned(cond, tokens, train=train)[0]

    def aligned(
        self, cond, tokens: Int[Array, "b l"], *, train: bool = False
    ) -> tuple[Float[Array, "b l v"], Float[Array, "b l c"]]:
        """(Teacher-forced logits, what each position takes the whole image to be like); arguments as of the call."""
        x, coords, mask = self._inputs(cond, tokens, train)
        x, _ = self.transformer(x, coords, None, mask, layers=(0, self.align_after), train=train)
        told = self.align_fc2(nn.gelu(self.align_fc1(x[:, self.told - 1 :]), approximate=False))
        x, _ = self.transformer(x, coords, None, mask, layers=(self.align_after, self.depth), train=train)
        return self.logits(x[:, self.told - 1 :]), told.astype(jnp.float32)
