"""The picture world as data: coloured shapes with classes, captions, masks, depth and edges, made by index."""

from __future__ import annotations

import dataclasses
from typing import TypedDict

import numpy as np

from jaxgen.data.sources import Example, check_split
from jaxgen.data.world_captions import Caption, describe, say
from jaxgen.data.world_render import Picture, render
from jaxgen.data.world_scene import CLASSES, Scene, WorldConfig, draw_scene

__all__ = ["World", "WorldExample"]

SPLIT_NUMBER = {"train": 0, "test": 1}


class WorldExample(TypedDict):
    """All that is known of one picture.

    Attributes:
      picture: pixels, mask, depth and edges.
      scene: what was drawn.
      label: class of the nearest object, an index in CLASSES.
      caption: a few true statements, drawn at random.
      description: all that can be said.
    """

    picture: Picture
    scene: Scene
    label: int
    caption: Caption
    description: Caption


@dataclasses.dataclass(frozen=True)
class World:
    """A `jaxgen.data.Source` of pictures, the classes of their nearest object, and captions; `example` gives the rest.

    Picture i of a split is the same in every run and process, at any size in pixels of the same proportions. Any i >= 0 has a
    picture; an epoch has `len(world)`.

    Attributes:
      config: which scenes.
      split: "train" or "test".

    Raises:
      ValueError: an unknown split.

    Example:
      >>> world = World(WorldConfig(most=3), "train")
      >>> str(world.example(0)["caption"]), world[0]["image"].shape    # doctest: +SKIP
    """

    config: WorldConfig = WorldConfig()
    split: str = "train"

    def __post_init__(self):
        check_split(self.split)

    @property
    def num_classes(self) -> int:
        """A class is a colour and a shape."""
        return len(CLASSES)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Such as "red circle"."""
        return CLASSES

    def __len__(self) -> int:
        return self.config.size if self.split == "train" else self.config.size // 10

    def name(self, index: int) -> str:
        """See `Source`."""
        return f"world {self.split}[{index}]"

    def _rng(self, index: int) -> np.random.Generator:
        if index < 0:
            raise IndexError(f"index {index}: pictures are numbered from 0")
        return np.random.default_rng([self.config.seed, SPLIT_NUMBER[self.split], index])

    def __getitem__(self, index: int) -> Example:
        scene = draw_scene(self.config, self._rng(index))
        image = render(scene, self.config.height, self.config.width)["image"]
        return {"image": image, "label": scene.objects[0].label}

    def caption(self, index: int) -> str:
        """What `example` says of a picture, without drawing it."""
        rng = self._rng(index)
        return str(say(draw_scene(self.config, rng), rng))

    def example(self, index: int) -> WorldExample:
        """Picture `index` with everything that is known of it."""
        rng = self._rng(index)
        scene = draw_scene(self.config, rng)
        return {
            "picture": render(scene, self.config.height, self.config.width),
            "scene": scene,
            "label": scene.objects[0].label,
            "caption": say(scene, rng),
            "description": describe(scene),
        }
