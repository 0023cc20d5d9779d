"""S016 JPEG-LM: a plain Llama over the bytes of files; and over the bytes of pixels, which it is measured against."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from jaxgen.data import DataConfig, image_batches, make_source
from jaxgen.decoding import JpegGrammar
from jaxgen.recipe import Recipe, Stage
from jaxgen.recipes.byte_files import LEARNT_FROM, ByteFileConfig, FileCodecConfig
from jaxgen.recipes.classifier import classifier_stage
from jaxgen.recipes.fields import check_fields
from jaxgen.recipes.token_cache import check_no_cache
from jaxgen.tokenizers.bytes import PixelCodec
from jaxgen.tokenizers.jpeg import JpegCodec

__all__ = ["ByteImageConfig", "CodecConfig", "jpeg_grammar"]


@dataclasses.dataclass(frozen=True)
class CodecConfig(FileCodecConfig):
    """How images become tokens.

    Attributes:
      length, merges, pairs: see `FileCodecConfig`.
      kind: "jpeg" or "pixels", see there.
      size: side of the images; 0 is what the data have.
      quality, subsampling, restart, header: see `JpegCodec`.
    """

    kind: str = "jpeg"
    size: int = 0
    quality: int = 25
    subsampling: str = "4:2:0"
    restart: int = 0
    header: str = "none"

    kinds = ("jpeg", "pixels")

    def __post_init__(self):
        check_fields("codec", self, size=0)
        super().__post_init__()
        self.build(3)

    def build(self, channels: int) -> JpegCodec | PixelCodec:
        """The codec of images with so many channels."""
        size = self.size or 8
        if self.kind == "pixels":
            return PixelCodec((size, size, channels))
        try:
            return JpegCodec(size, channels, self.quality, self.subsampling, self.restart, self.header)
        except ValueError as error:
            raise ValueError(f"codec.{error}") from None


@dataclasses.dataclass(frozen=True)
class ByteImageConfig(ByteFileConfig):
    """Everything that defines a run. `recipe()` builds it."""

    data: DataConfig = DataConfig()
    codec: CodecConfig = CodecConfig()

    def resolve(self) -> ByteImageConfig:
        """The configuration with what the data tell filled in: the images' size, and `codec.pairs`.

        Raises:
          ValueError: the data cannot be read, have more classes or another size, or files longer than `codec.length` among the
            first hundred.
        """
        source, data = make_source(self.data, "train"), self.data
        if source.num_classes > self.model.num_classes:
            raise ValueError(f"model.num_classes={self.model.num_classes}: {data.path} has {source.num_classes} classes")
        found = (data.image_size,) * 2 if data.image_size else source[0]["image"].shape[:2]
        if found[0] != found[1] or self.codec.size not in (0, found[0]):
            raise ValueError(f"images of {found[0]}x{found[1]} (data.path={data.path}): codec.size={self.codec.size}")
        config = dataclasses.replace(self, codec=dataclasses.replace(self.codec, size=found[0]))
        config = config.with_pairs(config._files("train", LEARNT_FROM))
        config.check_length(config._files("test", 100))
        return config

    def _files(self, split: str, count: int) -> Iterator[bytes]:
        """The files of the first images of a split, in the order in which they are read."""
        images = next(iter(image_batches(self.data, count, split, 0, 1)))["image"]
        return map(self.build_codec().encode, images)

    def build_codec(self) -> JpegCodec | PixelCodec:
        """See `ByteFileConfig`."""
        return self.codec.build(self.data.channels)

    def build_grammar(self) -> JpegGrammar | None:
        """See `ByteFileConfig`; pixels have none."""
        return jpeg_grammar(self.build_codec()) if self.codec.kind == "jpeg" else None

    def token_batches(self, split: str, shard_index: int, shard_count: int):
        """See `ByteFileConfig`."""
        tokenizer = self.build_file_tokenizer()

        def to_files(batch):
            files = map(tokenizer.codec.encode, batch["image"])
            return {"tokens": np.stack([*map(tokenizer.tokens, files)]), "label": batch["label"]}

        return image_batches(self.data, self.model_train.batch_size, split, shard_index, shard_count).map(to_files)

    def recipe(self) -> Recipe:
        """The stages and the sampler."""
        check_no_cache(self.data, "files are made of images")
        return super().recipe()

    def judge_stage(self) -> Stage:
        """See `ByteFileConfig`."""
        return classifier_stage(self.data, num_classes=self.num_classes, **dataclasses.asdict(self.classifier))


def jpeg_grammar(codec: JpegCodec) -> JpegGrammar:
    """The grammar of a codec's bytes."""
    blocks = tuple((0, 1) if component == 0 else (2, 3) for component in codec.blocks)
    return JpegGrammar(tables=codec.tables, blocks=blocks, mcus=codec.mcus, restart=codec.restart, head=codec.head)
