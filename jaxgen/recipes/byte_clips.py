"""S016 AVC-LM: a plain Llama over the bytes of short clips."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from jaxgen.data.clips import ClipConfig, ClipSource
from jaxgen.decoding import H264Grammar
from jaxgen.recipe import Stage
from jaxgen.recipes.byte_files import LEARNT_FROM, ByteFileConfig, FileCodecConfig
from jaxgen.recipes.clips import judge_stage, resolve_clips
from jaxgen.recipes.fields import check_fields
from jaxgen.tokenizers.bytes import ByteTokenizer, PixelCodec
from jaxgen.tokenizers.video import H264Codec

__all__ = ["ByteClipConfig", "ClipCodecConfig"]


@dataclasses.dataclass(frozen=True)
class ClipCodecConfig(FileCodecConfig):
    """How clips become tokens.

    Attributes:
      length, merges, pairs: see `FileCodecConfig`.
      kind: "h264" or "pixels", see there.
      quantiser, restart: see `H264Codec`.
    """

    length: int = 256
    kind: str = "h264"
    quantiser: int = 37
    restart: int = 0

    kinds = ("h264", "pixels")

    def __post_init__(self):
        check_fields("codec", self, quantiser=0, restart=0)
        super().__post_init__()
        if self.quantiser > 51:
            raise ValueError(f"codec.quantiser={self.quantiser}: expected at most 51")


@dataclasses.dataclass(frozen=True)
class ByteClipConfig(ByteFileConfig):
    """Everything that defines a run. `recipe()` builds it."""

    data: ClipConfig = ClipConfig()
    codec: ClipCodecConfig = ClipCodecConfig()

    modality = "video"

    def __post_init__(self):
        for name in ("height", "width"):
            if self.codec.kind == "h264" and getattr(self.data, name) % 2:
                raise ValueError(f"data.{name}={getattr(self.data, name)}: H.264 needs an even number")

    def resolve(self) -> ByteClipConfig:
        """The configuration with what the data tell filled in: the clips' size, and `codec.pairs`.

        Raises:
          ValueError: the data cannot be read, have more classes, or streams longer than `codec.length` among a hundred of each
            split.
        """
        config, train = dataclasses.replace(self, data=resolve_clips(self.data, self.num_classes)), self.data.source("train")
        config = config.with_pairs(config._files(train, LEARNT_FROM))
        for source in (train, self.data.source("test")):
            config.check_length(config._files(source, 100))
        return config

    def _files(self, source: ClipSource, count: int) -> Iterator[bytes]:
        """The streams of some clips, from all over the source."""
        some = np.linspace(0, len(source) - 1, min(count, len(source))).astype(int)
        codec = self.build_codec()
        return (codec.encode(source[i]["clip"]) for i in some)

    def build_codec(self) -> H264Codec | PixelCodec:
        """See `ByteFileConfig`; sizes that only the data can tell are those of the digits."""
        data = self.data
        size = dict(height=data.height or 16, width=data.width or 32)
        if self.codec.kind == "pixels":
            return PixelCodec((data.frames, *size.values(), data.channels))
        return H264Codec(frames=data.frames, quantiser=self.codec.quantiser, restart=self.codec.restart, **size)

    def build_grammar(self) -> H264Grammar | None:
        """See `ByteFileConfig`; pixels have none."""
        if self.codec.kind == "pixels":
            return None
        codec = self.build_codec()
        down, across = (-(-size // 16) for size in codec.shape[1:3])
        return H264Grammar(headers=codec.headers, mbs=down * across, across=across, restart=codec.restart)

    def token_batches(self, split: str, shard_index: int, shard_count: int):
        """See `ByteFileConfig`; a clip's stream is made once."""
        source = _Streams(self.data.source(split), self.build_file_tokenizer())
        part = dict(shard_index=shard_index, shard_count=shard_count)
        return self.data.stream(source, _as_it_is, batch_size=self.model_train.batch_size, train=split == "train", **part)

    def judge_stage(self) -> Stage:
        """See `ByteFileConfig`."""
        return judge_stage(self.classifier, self.data, self.num_classes)


class _Streams:
    """The streams of clips, as a source."""

    def __init__(self, clips: ClipSource, tokenizer: ByteTokenizer):
        self._clips, self._tokenizer, self._made = clips, tokenizer, {}

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, index: int) -> dict:
        if index not in self._made:
            example = self._clips[index]
            tokens = self._tokenizer.tokens(self._tokenizer.codec.encode(example["clip"]))
            self._made[index] = {"tokens": tokens, "label": example["label"]}
        return self._made[index]


def _as_it_is(example: dict) -> dict:
    return example
