"""What recipes of clips share: frames of the data's size, and a judge that reads the frames of a clip as one image's channels."""

from __future__ import annotations

import dataclasses

from jaxgen.data.clips import ClipConfig, ClipPictures
from jaxgen.recipe import Stage
from jaxgen.recipes.classifier import classifier_stage
from jaxgen.recipes.next_scale import ClassifierConfig

__all__ = ["judge_stage", "resolve_clips"]


def resolve_clips(data: ClipConfig, num_classes: int) -> ClipConfig:
    """`data` with the frames' size filled in, for a model of so many classes.

    Raises:
      ValueError: the data cannot be read, or have more classes.
    """
    source = data.source("train")
    if source.num_classes > num_classes:
        raise ValueError(f"model.num_classes={num_classes}: {data.path} has {source.num_classes} classes")
    height, width = source.shape[1:3]
    return dataclasses.replace(data, height=height, width=width)


def judge_stage(config: ClassifierConfig, data: ClipConfig, num_classes: int) -> Stage:
    """The classifier of clips, see `evaluate_images`."""
    return classifier_stage(ClipPictures(data, apart=False), num_classes=num_classes, **dataclasses.asdict(config))
