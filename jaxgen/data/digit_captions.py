"""Rows of handwritten digits and what can be said about them: pictures, questions and exact answers, made by index."""

from __future__ import annotations

import dataclasses
import functools

import grain
import numpy as np
from jaxtyping import UInt8

from jaxgen.data.loader import DataConfig, make_source
from jaxgen.data.shards import READ, check_shards, share
from jaxgen.data.sources import Source, check_split

__all__ = ["QUESTIONS", "DigitCaptionConfig", "DigitCaptions", "answer", "digit_caption_batches"]

NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen"
).split()
# The last one does not need the picture. Their first letters differ.
QUESTIONS = ("describe: ", "total: ", "largest: ", "months: ")
END = "\n"
SPLIT_NUMBER = {"train": 0, "test": 1}


@dataclasses.dataclass(frozen=True)
class DigitCaptionConfig:
    """Which digits, and how they become examples.

    Attributes:
      path: "digits" or a file of labelled digits, see `DataConfig.path`.
      digits: the most in a picture.
      cell: side of the square that a digit is centred in.
      length: tokens of an example that are predicted; an example has one more, zeros behind its text.
      size: examples of an epoch.
      seed: of the examples.
    """

    path: str = "digits"
    digits: int = 4
    cell: int = 8
    length: int = 68
    size: int = 20000
    seed: int = 0

    def __post_init__(self):
        for name, least in (("digits", 1), ("cell", 1), ("length", 1), ("size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name}={getattr(self, name)}: expected at least {least}")
        if 9 * self.digits > 99:
            raise ValueError(f"data.digits={self.digits}: totals above 99 have no name")
        longest = max(len(q) + len(answer(q, (7,) * self.digits)) for q in QUESTIONS) + 1
        if self.length < longest:
            raise ValueError(f"data.length={self.length}: the longest text has {longest} bytes")

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of pictures."""
        return self.cell, self.cell * self.digits


def answer(question: str, digits: tuple[int, ...]) -> str:
    """What is to be said of a row of digits.

    Raises:
      ValueError: an unknown question.

    Example:
      >>> answer("total: ", (3, 7, 1))
      'three and seven and one make eleven.'
    """
    names = [NUMBERS[digit] for digit in digits]
    if question == "describe: ":
        last = f", then {_a(names[-1])}" if len(names) > 1 else f": {_a(names[0])}"
        listed = ", ".join(map(_a, names[:-1]))
        return f"{NUMBERS[len(digits)]} in a row{': ' + listed if listed else ''}{last}."
    if question == "total: ":
        return f"{' and '.join(names)} make{'s' if len(names) == 1 else ''} {_name(sum(digits))}."
    if question == "largest: ":
        return f"of {NUMBERS[len(digits)]} in a row {_a(NUMBERS[max(digits)])} is the largest."
    if question == "months: ":
        return "january, february, march, april, may, june and so on."
    raise ValueError(f"question {question!r} is not one of {', '.join(map(repr, QUESTIONS))}")


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" and name != "one" else f"a {name}"


def _name(number: int) -> str:
    if number < 20:
        return NUMBERS[number]
    ten = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")[number // 10 - 2]
    return f"{ten}-{NUMBERS[number % 10]}" if number % 10 else ten


@dataclasses.dataclass(frozen=True, eq=False)
class DigitCaptions:
    """Random access to examples: `captions[i]` is the same in every run.

    Attributes:
      config: what they are like.
      split: "train" or "test": whose digits are used.
    """

    config: DigitCaptionConfig
    split: str

    def __post_init__(self):
        check_split(self.split)
        height, width = self._source[0]["image"].shape[:2]
        if max(height, width) > self.config.cell:
            raise ValueError(f"data.cell={self.config.cell}: digits have {height} x {width} pixels")

    @functools.cached_property
    def _source(self) -> Source:
        return make_source(DataConfig(path=self.config.path), self.split)

    def __len__(self) -> int:
        return self.config.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """ "image" uint8 [H, W, 1], "tokens" int32 [length + 1], and the lengths "prompt" and "length" of question and text."""
        config = self.config
        rng = np.random.default_rng([config.seed, SPLIT_NUMBER[self.split], index])
        chosen = rng.integers(0, len(self._source), rng.integers(1, config.digits + 1))
        examples = [self._source[int(i)] for i in chosen]
        question = QUESTIONS[rng.integers(len(QUESTIONS))]
        text = question + answer(question, tuple(int(example["label"]) for example in examples)) + END
        tokens = np.zeros(config.length + 1, np.int32)
        tokens[: len(text)] = np.frombuffer(text.encode(), np.uint8)
        return {
            "image": self._canvas([example["image"] for example in examples]),
            "tokens": tokens,
            "prompt": np.int32(len(question)),
            "length": np.int32(len(text)),
        }

    def _canvas(self, images: list[UInt8[np.ndarray, "h w c"]]) -> UInt8[np.ndarray, "H W 1"]:
        cell = self.config.cell
        canvas = np.zeros((*self.config.image_size, 1), np.uint8)
        for i, image in enumerate(images):
            h, w = image.shape[:2]
            top, left = (cell - h) // 2, i * cell + (cell - w) // 2
            canvas[top : top + h, left : left + w] = image[..., :1]
        return canvas


def digit_caption_batches(
    config: DigitCaptionConfig, split: str, *, batch_size: int, train: bool, shard_index: int = 0, shard_count: int = 1
) -> grain.IterDataset:
    """One host's share of batches of `DigitCaptions`; endless and shuffled in training, else one pass over 256 examples at most.

    Raises:
      ValueError: a batch size that `shard_count` does not divide, or a shard index out of range.
    """
    check_shards(batch_size, shard_index, shard_count)
    ds = grain.MapDataset.range(config.size if train else min(config.size, -(-256 // shard_count) * shard_count))
    if train:
        ds = ds.shuffle(seed=config.seed).repeat()
    ds = ds.map(DigitCaptions(config, split).__getitem__)
    ds = share(ds, batch_size, shard_index, shard_count).batch(batch_size // shard_count, drop_remainder=train)
    return ds.to_iter_dataset(READ)
