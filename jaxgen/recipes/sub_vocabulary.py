"""A language model of binary codes as a recipe (S152 ELM): bits without a codebook, told as one number a cell or as several."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp

from jaxgen.generators import SubVocabularyLlama, SubVocabularySampler
from jaxgen.recipes import claims
from jaxgen.recipes.claims import Claim
from jaxgen.recipes.fields import check_dtype, check_fields
from jaxgen.recipes.image_llama import ImageLlamaConfig, ImageLlamaModelConfig
from jaxgen.recipes.tokenizer import TokenizerTrainConfig
from jaxgen.tokenizers import BinaryTokenizer
from jaxgen.tokenizers.binary import check_bits

__all__ = ["BinaryTokenizerConfig", "SubVocabularyConfig", "SubVocabularyModelConfig", "compare_parts"]


@dataclasses.dataclass(frozen=True)
class BinaryTokenizerConfig:
    """Sizes of `BinaryTokenizer`; channels come from the data, parts from the model, and the grid is the one of `patch_nums`."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    attention: bool = True
    groups: int = 32
    dropout: float = 0.0
    z_channels: int = 256
    bits: int = 16
    patch_nums: tuple[int, ...] = (16,)
    code: str = "bernoulli"
    stochastic: bool = True
    penalty: float = 0.0
    dtype: str = "float32"

    def __post_init__(self):
        sizes = dict(ch=1, ch_mult=1, res_blocks=1, groups=1, z_channels=1, bits=1, patch_nums=1)
        check_fields("tokenizer", self, **sizes, penalty=0, shares=("dropout",))
        check_bits(self.bits, self.bits, self.code)
        check_dtype("tokenizer", self.dtype)

    def build(self, channels: int, parts: int) -> BinaryTokenizer:
        """The module, for images of so many channels and cells of so many tokens."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name != "patch_nums"}
        fields |= dict(grid=self.patch_nums[0], parts=parts, dtype=jnp.dtype(self.dtype))
        return BinaryTokenizer(channels=channels, **fields)


@dataclasses.dataclass(frozen=True)
class SubVocabularyModelConfig(ImageLlamaModelConfig):
    """Sizes of `SubVocabularyLlama`; its vocabulary is that of the tokenizer's bits in so many parts."""

    parts: int = 2

    def __post_init__(self):
        super().__post_init__()
        check_fields("model", self, parts=1)


@dataclasses.dataclass(frozen=True)
class SubVocabularyConfig(ImageLlamaConfig):
    """Everything that defines a run. `recipe()` builds it.

    Raises:
      ValueError: parts that do not divide the bits or leave too many of them to one, or a training that revives codes.
    """

    tokenizer: BinaryTokenizerConfig = BinaryTokenizerConfig()
    tokenizer_train: TokenizerTrainConfig = TokenizerTrainConfig(revive_every=0)
    model: SubVocabularyModelConfig = SubVocabularyModelConfig()

    def __post_init__(self):
        super().__post_init__()
        check_bits(self.tokenizer.bits, self.model.parts, self.tokenizer.code)
        if self.tokenizer_train.revive_every:
            every = self.tokenizer_train.revive_every
            raise ValueError(f"tokenizer_train.revive_every={every}: bits are no codes to revive, set 0")

    def build_tokenizer(self) -> BinaryTokenizer:
        """The tokenizer module."""
        return self.tokenizer.build(self.data.channels, self.model.parts)

    def build_generator(self) -> SubVocabularyLlama:
        """The generator module."""
        return SubVocabularyLlama(**self._generator_fields())

    def _generator_fields(self) -> dict:
        fields = dict(vocab=self.build_tokenizer().vocab, grid=self.tokenizer.patch_nums[0], dtype=jnp.dtype(self.model.dtype))
        return dataclasses.asdict(self.model) | fields

    def build_sampler(self) -> SubVocabularySampler:
        """From key and labels to images."""
        return SubVocabularySampler(generator=self.build_generator(), tokenizer=self.build_tokenizer())


def compare_parts(
    config: SubVocabularyConfig, parts: Sequence[int], *, seeds: int, samples: int, log: Callable[[str], None]
) -> Claim:
    """Likelihood, quality and cost of several vocabularies for the bits of one tokenizer.

    Args:
      config: of the systems, whatever its parts.
      parts: tokens a cell; 1 is one large softmax.
      seeds: trainings of each.
      samples: images that are judged.
      log: takes progress lines.
    """

    def parted(n: int) -> SubVocabularyConfig:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, parts=n))

    def columns(recipe, params) -> dict:
        model = recipe.config.build_generator()
        nats = claims.test_nats(recipe, params)
        return {"vocabulary": f"{model.parts} x {model.vocab}", "test nats an image": round(nats * model.length, 3)}

    def name(n: int) -> str:
        bits = config.tokenizer.bits // n
        return f"baseline, one softmax of {bits} bits" if n == 1 else f"S152 ELM, {n} of {bits} bits"

    systems = {name(n): parted(n) for n in parts}
    title = "Sub-vocabularies against one large softmax for the same bits at equal blocks, data and training budget"
    claim = claims.compare_generators(systems, seeds=seeds, samples=samples, log=log, columns=columns, title=title)
    notes = "One tokenizer for all, so that nats an image can be compared. A cell's tokens are drawn independently."
    return claim._replace(notes=f"{claim.notes} {notes}")
