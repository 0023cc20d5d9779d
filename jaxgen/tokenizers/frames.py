"""Clips <-> the tokens of their frames."""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float, Int

from jaxgen.orders import Order, raster
from jaxgen.tokenizers.flexible import FlexibleTokenizer

__all__ = ["FrameTokenizer"]


class FrameTokenizer(nn.Module):
    """A tokenizer of images in the place of one of clips: frames are read and written each by itself.

    Its variables are those of `frame`.

    Attributes:
      frame: of one scale of h x w tokens.
      frames: f, of a clip.

    Raises:
      ValueError: no frames.

    Example:
      >>> tokenizer = FrameTokenizer(FlexibleTokenizer(patch_nums=((4, 8),), ch_mult=(1, 1, 2)), frames=4)
      >>> tokens = tokenizer.apply(variables, clips, method="encode")   # [b, 4, 16, 32, 3] -> [b, 4 * 4 * 8]
    """

    frame: FlexibleTokenizer
    frames: int

    def __post_init__(self):
        if self.frames < 1:
            raise ValueError(f"frames={self.frames}: expected at least 1")
        super().__post_init__()

    def setup(self):
        nn.share_scope(self, self.frame)

    @property
    def vocab(self) -> int:
        """Codes."""
        return self.frame.vocab

    @property
    def grid(self) -> tuple[int, int, int]:
        """(f, h, w)."""
        return self.frames, *self.frame.order.shapes[-1]

    @property
    def order(self) -> Order:
        """Frame by frame, each in raster order."""
        return raster(self.frames * self.frame.order.length)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the frames."""
        return self.frame.image_size

    def encode(self, clips: Float[Array, "b f H W C"]) -> Int[Array, "b l"]:
        """Tokens of clips in [-1, 1]."""
        if clips.ndim != 5 or clips.shape[1] != self.frames:
            raise ValueError(f"clips {clips.shape}: expected [b, {self.frames}, H, W, C]")
        return self.frame.encode(clips.reshape(-1, *clips.shape[2:])).reshape(len(clips), -1)

    def decode(self, tokens: Int[Array, "b l"]) -> Float[Array, "b f H W C"]:
        """Clips in [-1, 1]."""
        pictures = self.frame.decode(tokens.reshape(-1, self.frame.order.length))
        return pictures.reshape(len(tokens), self.frames, *pictures.shape[1:])
