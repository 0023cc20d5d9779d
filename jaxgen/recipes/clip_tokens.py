"""Llamas of the tokens of clips as recipes: a VQ tokenizer of frames, then frames x rows x columns of its tokens.

They are those of images (`image_llama`, `neighbours`) with other data: the tokenizer is trained on frames, the Llama's positions
have three coordinates, and what judges samples reads the frames of a clip as channels of one image.
"""

from __future__ import annotations

import dataclasses
import functools

from jaxgen.data.clips import ClipConfig, ClipPictures
from jaxgen.recipe import Recipe, Stage
from jaxgen.recipes.clips import judge_stage, resolve_clips
from jaxgen.recipes.image_llama import ImageLlamaConfig
from jaxgen.recipes.neighbours import NeighbourConfig
from jaxgen.recipes.tokenizer import tokenizer_stage
from jaxgen.tokenizers import FrameTokenizer

__all__ = ["ClipLlamaConfig", "ClipNeighbourConfig"]


class _OfClips:
    """What is another for clips than for images, before an `ImageLlamaConfig` in a class's bases.

    `tokenizer.patch_nums` has the rows of a frame's tokens; columns are as many as its shape asks for.
    """

    data: ClipConfig

    def resolve(self):
        """The configuration with the frames' size filled in from the data.

        Raises:
          ValueError: the data cannot be read, have more classes, or frames that the tokenizer's rows do not divide.
        """
        config = dataclasses.replace(self, data=resolve_clips(self.data, self.num_classes))
        found, sides = (config.data.height, config.data.width), config.build_tokenizer().image_size
        if found != sides:
            raise ValueError(
                f"frames of {found[0]}x{found[1]} (data.path={self.data.path}); the tokenizer's patch_nums="
                f"{self.tokenizer.patch_nums} and ch_mult={self.tokenizer.ch_mult} take {sides[0]}x{sides[1]}"
            )
        return config

    def build_tokenizer(self) -> FrameTokenizer:
        """The tokenizer module; frames whose shape only the data can tell are squares."""
        (rows,), data = self.tokenizer.patch_nums, self.data
        columns = max(1, rows * data.width // data.height) if data.height else rows
        frame = self.tokenizer.build(data.channels).clone(patch_nums=((rows, columns),))
        return FrameTokenizer(frame, data.frames)

    def tokenizer_stage(self) -> Stage:
        """What trains the tokenizer: frames."""
        return tokenizer_stage(self.tokenizer_train, ClipPictures(self.data, apart=True), self.build_tokenizer().frame)

    def judge_stage(self) -> Stage:
        """What trains the judge of samples."""
        return judge_stage(self.classifier, self.data, self.num_classes)

    def _generator_fields(self) -> dict:
        return super()._generator_fields() | dict(grid=self.build_tokenizer().grid)

    def recipe(self) -> Recipe:
        """The stages and the sampler, of clips."""
        base = super().recipe()
        return dataclasses.replace(base, sample=functools.partial(_sample, base.sample), modality="video")


def _sample(of_images, params, key, labels, **settings) -> dict:
    out = of_images(params, key, labels, **settings)
    return {"clips": out["images"], "tokens": out["tokens"]}


@dataclasses.dataclass(frozen=True)
class ClipLlamaConfig(_OfClips, ImageLlamaConfig):
    """Everything that defines a run: one token a call, frame by frame in raster order. `recipe()` builds it."""

    data: ClipConfig = ClipConfig()


@dataclasses.dataclass(frozen=True)
class ClipNeighbourConfig(_OfClips, NeighbourConfig):
    """Everything that defines a run: next-neighbour order in space and time. `recipe()` builds it."""

    data: ClipConfig = ClipConfig()
