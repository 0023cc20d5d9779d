"""Captions as bytes of one length, beside the images that they are about."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import UInt8

from jaxgen.data.sources import Example, Source

__all__ = ["Captioned", "CaptionedSource", "caption_array", "caption_bytes"]


class CaptionedSource(Source, Protocol):
    """A source that may know captions."""

    def caption(self, index: int) -> str | None:
        """What is said of an image; None if nothing is."""
        ...


def caption_bytes(text: str, length: int, *, name: str, cut: bool = False) -> UInt8[np.ndarray, "n"]:
    """UTF-8 bytes, then zeros.

    Args:
      text: a caption.
      length: n, of the result.
      name: names the caption in errors.
      cut: longer captions lose their end, whole characters of it; otherwise they are an error.

    Raises:
      ValueError: an empty caption, one with zero bytes, or a longer one.

    Example:
      >>> caption_bytes("a cat", 8, name="caption")
      array([ 97,  32,  99,  97, 116,   0,   0,   0], dtype=uint8)
    """
    raw = text.encode()
    if cut and len(raw) > length:
        raw = raw[:length].decode(errors="ignore").encode()
    if not raw.strip() or 0 in raw:
        raise ValueError(f"{name}: {text!r} is no caption, which has letters and no zero bytes")
    if len(raw) > length:
        raise ValueError(f"{name}: {text!r} has {len(raw)} bytes; expected at most {length} (data.captions)")
    return np.frombuffer(raw.ljust(length, b"\0"), np.uint8)


def caption_array(texts: Sequence[str], length: int) -> UInt8[np.ndarray, "b n"]:
    """Prompts as a model of captions is asked for them; raises as `caption_bytes`."""
    if isinstance(texts, str) or not len(texts):
        raise ValueError(f"prompts {texts!r}: expected at least one, in a list")
    return np.stack([caption_bytes(str(text), length, name="prompt") for text in texts])


@dataclasses.dataclass(frozen=True, eq=False)
class Captioned:
    """A source whose examples have "caption", uint8 [length].

    Attributes:
      source: the images and captions.
      length: bytes; longer captions are an error, unless `cut`.
      cut: see `caption_bytes`.

    Raises:
      ValueError: a source without captions.
    """

    source: CaptionedSource
    length: int
    cut: bool = False

    def __post_init__(self):
        if len(self.source) and (not hasattr(self.source, "caption") or self.source.caption(0) is None):
            raise ValueError(f"data.captions={self.length}: {self.source.name(0)} has no caption")

    @property
    def num_classes(self) -> int:
        """See `Source`."""
        return self.source.num_classes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """See `Source`."""
        return self.source.class_names

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        name, text = self.name(index), self.source.caption(index)
        if text is None:
            raise ValueError(f"{name}: has no caption")
        return {**self.source[index], "caption": caption_bytes(text, self.length, name=f"caption of {name}", cut=self.cut)}

    def name(self, index: int) -> str:
        """See `Source`."""
        return self.source.name(index)
