"""S016 AVC-LM: a plain Llama over the bytes of short clips."""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxgen.data.clips import ClipConfig, ClipSource
from jaxgen.data.loader import stream
from jaxgen.decoding import H264Grammar
from jaxgen.recipes.byte_files import ByteFileConfig
from jaxgen.recipes.fields import check_fields
from jaxgen.tokenizers.bytes import END, to_tokens
from jaxgen.tokenizers.video import H264Codec

__all__ = ["ByteClipConfig", "ClipCodecConfig"]


@dataclasses.dataclass(frozen=True)
class ClipCodecConfig:
    """How clips become bytes.

    Attributes:
      length: tokens a model reads and makes; streams with fewer bytes are filled up, longer ones are cut.
      quantiser, restart: see `H264Codec`.
    """

    length: int = 256
    quantiser: int = 37
    restart: int = 0

    def __post_init__(self):
        check_fields("codec", self, length=1, quantiser=0, restart=0)
        if self.quantiser > 51:
            raise ValueError(f"codec.quantiser={self.quantiser}: expected at most 51")


@dataclasses.dataclass(frozen=True)
class ByteClipConfig(ByteFileConfig):
    """Everything that defines a run. `recipe()` builds it."""

    data: ClipConfig = ClipConfig()
    codec: ClipCodecConfig = ClipCodecConfig()

    shows = "clips"
    modality = "video"

    def __post_init__(self):
        for name in ("height", "width"):
            if getattr(self.data, name) % 2:
                raise ValueError(f"data.{name}={getattr(self.data, name)}: H.264 needs an even number")

    def resolve(self) -> ByteClipConfig:
        """The configuration with the clips' size filled in from the data.

        Raises:
          ValueError: the data cannot be read, have more classes, or streams longer than `codec.length` among a hundred of each
            split.
        """
        train, path = self.data.source("train"), self.data.path
        if train.num_classes > self.model.num_classes:
            raise ValueError(f"model.num_classes={self.model.num_classes}: {path} has {train.num_classes} classes")
        height, width = train.shape[1:3]
        config = dataclasses.replace(self, data=dataclasses.replace(self.data, height=height, width=width))
        codec, longest = config.build_codec(), 0
        for source in (train, self.data.source("test")):
            some = np.linspace(0, len(source) - 1, min(100, len(source))).astype(int)
            longest = max(longest, *(len(codec.encode(source[i]["clip"])) for i in some))
        if longest > self.codec.length:
            raise ValueError(f"codec.length={self.codec.length}: there are streams of {longest} bytes")
        return config

    def build_codec(self) -> H264Codec:
        """See `ByteFileConfig`; sizes that only the data can tell are those of the digits."""
        data = self.data
        size = dict(height=data.height or 16, width=data.width or 32)
        return H264Codec(frames=data.frames, quantiser=self.codec.quantiser, restart=self.codec.restart, **size)

    def build_grammar(self) -> H264Grammar:
        """See `ByteFileConfig`."""
        return H264Grammar(headers=self.build_codec().headers, length=self.codec.length, end=END)

    def token_batches(self, split: str, shard_index: int, shard_count: int):
        """See `ByteFileConfig`; a clip's stream is made once."""
        source = _Streams(self.data.source(split), self.build_codec(), self.codec.length)
        shard = dict(shard_index=shard_index, shard_count=shard_count, workers=self.data.workers)
        batch = dict(batch_size=self.model_train.batch_size, train=split == "train")
        return stream(source, _as_it_is, random=False, seed=self.data.seed, **batch, **shard)


class _Streams:
    """The streams of clips, as a source."""

    def __init__(self, clips: ClipSource, codec: H264Codec, length: int):
        self._clips, self._codec, self._length, self._made = clips, codec, length, {}

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, index: int) -> dict:
        if index not in self._made:
            example = self._clips[index]
            tokens = to_tokens(self._codec.encode(example["clip"]), self._length)
            self._made[index] = {"tokens": tokens, "label": example["label"]}
        return self._made[index]


def _as_it_is(example: dict) -> dict:
    return example
