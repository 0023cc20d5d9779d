"""Pictures, questions and answers of rows of digits."""

import numpy as np
import pytest

from jaxgen.data.digit_captions import QUESTIONS, DigitCaptionConfig, DigitCaptions, answer, digit_caption_batches
from jaxgen.data.sources import digits


def test_answers():
    assert answer("describe: ", (3, 8, 1)) == "three in a row: a three, an eight, then a one."
    assert answer("describe: ", (6,)) == "one in a row: a six."
    assert answer("total: ", (9, 9, 9, 8)) == "nine and nine and nine and eight make thirty-five."
    assert answer("total: ", (7,)) == "seven makes seven."
    assert answer("total: ", (9, 9, 2)) == "nine and nine and two make twenty."
    assert answer("largest: ", (0, 4)) == "of two in a row a four is the largest."
    assert answer("months: ", (1,)) == answer("months: ", (2, 3))
    with pytest.raises(ValueError, match="question 'why' is not one of"):
        answer("why", (1,))
    assert len({question[0] for question in QUESTIONS}) == len(QUESTIONS)


def test_what_is_said_is_what_is_shown():
    """The digits in a picture are looked up among the source's by their pixels."""
    config = DigitCaptionConfig(cell=10)
    data, source = DigitCaptions(config, "test"), digits("test")
    labels = {image.tobytes(): int(label) for image, label in zip(source.images, source.labels)}
    asked = set()
    for i in range(60):
        example = data[i]
        cells = example["image"].reshape(10, 4, 10).swapaxes(0, 1)[:, 1:9, 1:9]
        shown = tuple(labels[cell.tobytes()] for cell in cells if cell.any())
        text = bytes(example["tokens"][: example["length"]].astype(np.uint8)).decode()
        question = text[: example["prompt"]]
        assert text == question + answer(question, shown) + "\n"
        assert example["image"].shape == (10, 40, 1) and example["tokens"].shape == (config.length + 1,)
        assert not example["tokens"][example["length"] :].any()
        asked.add(question)
    assert asked == set(QUESTIONS)


def test_batches():
    config = DigitCaptionConfig(size=300)
    both = [next(iter(digit_caption_batches(config, "train", batch_size=4, train=True))) for _ in range(2)]
    np.testing.assert_array_equal(both[0]["tokens"], both[1]["tokens"])
    halves = [
        next(iter(digit_caption_batches(config, "train", batch_size=4, train=True, shard_index=i, shard_count=2))) for i in (0, 1)
    ]
    np.testing.assert_array_equal(np.concatenate([half["tokens"] for half in halves]), both[0]["tokens"])
    test = list(digit_caption_batches(config, "test", batch_size=100, train=False))
    assert [len(batch["image"]) for batch in test] == [100, 100, 56]
    other = next(iter(digit_caption_batches(DigitCaptionConfig(size=300, seed=1), "test", batch_size=100, train=False)))
    assert (other["tokens"] != test[0]["tokens"]).any()


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(digits=0), "data.digits=0: expected at least 1"),
        (dict(digits=12, length=400), "data.digits=12: totals above 99"),
        (dict(length=40), "data.length=40: the longest text has 66 bytes"),
    ],
)
def test_bad_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        DigitCaptionConfig(**fields)


def test_bad_input():
    with pytest.raises(ValueError, match="data.cell=6: digits have 8 x 8 pixels"):
        DigitCaptions(DigitCaptionConfig(cell=6), "test")
    with pytest.raises(ValueError, match="batch_size=3: must be a positive multiple of the 2 hosts"):
        digit_caption_batches(DigitCaptionConfig(), "train", batch_size=3, train=True, shard_index=0, shard_count=2)
    with pytest.raises(ValueError, match="shard_index=2"):
        digit_caption_batches(DigitCaptionConfig(), "train", batch_size=4, train=True, shard_index=2, shard_count=2)
