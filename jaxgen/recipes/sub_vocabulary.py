"""A language model of binary codes as a recipe (S152 ELM): bits without a codebook, told as one number a cell or as several.

The model is causal, or masked: trained to fill in what is masked, and sampled in a few passes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxgen.benchmark import count_flops
from jaxgen.decoding import View
from jaxgen.generators import (
    MaskedSubVocabularyLlama,
    MaskedSubVocabularySampler,
    SubVocabularyLlama,
    SubVocabularySampler,
)
from jaxgen.objectives.diffusion import masked_prediction, stratified_times
from jaxgen.objectives.likelihood import cross_entropy, drop_labels
from jaxgen.paths import Cosine, Linear, Masking, Schedule
from jaxgen.recipe import Recipe, Stage, modules
from jaxgen.recipes import claims
from jaxgen.recipes.claims import Claim
from jaxgen.recipes.fields import check_dtype, check_fields
from jaxgen.recipes.image_llama import ImageLlamaConfig, ImageLlamaModelConfig
from jaxgen.recipes.token_cache import codes
from jaxgen.recipes.tokenizer import TokenizerTrainConfig
from jaxgen.tokenizers import BinaryTokenizer
from jaxgen.tokenizers.binary import check_bits

__all__ = [
    "MODELING",
    "BinaryTokenizerConfig",
    "RevealConfig",
    "SubVocabularyConfig",
    "SubVocabularyModelConfig",
    "compare_parts",
    "masked_stage",
]

MODELING = ("causal", "masked")


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
    """Sizes of `SubVocabularyLlama`; its vocabulary is that of the tokenizer's bits in so many parts.

    Attributes:
      modeling: "causal", a cell after another, or "masked", see `MaskedSubVocabularyLlama`.
    """

    parts: int = 2
    modeling: str = "causal"

    def __post_init__(self):
        super().__post_init__()
        check_fields("model", self, parts=1)
        if self.modeling not in MODELING:
            raise ValueError(f"model.modeling={self.modeling!r} is not one of {', '.join(MODELING)}")


@dataclasses.dataclass(frozen=True)
class RevealConfig:
    """How a masked model samples, and what it meets in training; see `MaskedSubVocabularySampler`. Causal ones need none."""

    steps: int = 10
    choice_temperature: float = 1.0

    def __post_init__(self):
        check_fields("reveal", self, steps=1, choice_temperature=0)


@dataclasses.dataclass(frozen=True)
class SubVocabularyConfig(ImageLlamaConfig):
    """Everything that defines a run. `recipe()` builds it.

    Raises:
      ValueError: parts that do not divide the bits or leave too many of them to one, a training that revives codes, or a masked
        model with more passes than cells.
    """

    tokenizer: BinaryTokenizerConfig = BinaryTokenizerConfig()
    tokenizer_train: TokenizerTrainConfig = TokenizerTrainConfig(revive_every=0)
    model: SubVocabularyModelConfig = SubVocabularyModelConfig()
    reveal: RevealConfig = RevealConfig()

    def __post_init__(self):
        super().__post_init__()
        check_bits(self.tokenizer.bits, self.model.parts, self.tokenizer.code)
        if self.tokenizer_train.revive_every:
            every = self.tokenizer_train.revive_every
            raise ValueError(f"tokenizer_train.revive_every={every}: bits are no codes to revive, set 0")
        cells = self.tokenizer.patch_nums[0] ** 2
        if self.masked and self.reveal.steps > cells:
            raise ValueError(f"reveal.steps={self.reveal.steps}: an image has {cells} cells, and each pass reveals one or more")

    @property
    def masked(self) -> bool:
        """Whether the model is."""
        return self.model.modeling == "masked"

    def build_tokenizer(self) -> BinaryTokenizer:
        """The tokenizer module."""
        return self.tokenizer.build(self.data.channels, self.model.parts)

    def build_generator(self) -> SubVocabularyLlama:
        """The generator module."""
        return (MaskedSubVocabularyLlama if self.masked else SubVocabularyLlama)(**self._generator_fields())

    def _generator_fields(self) -> dict:
        fields = dict(vocab=self.build_tokenizer().vocab, grid=self.tokenizer.patch_nums[0], dtype=jnp.dtype(self.model.dtype))
        fields = dataclasses.asdict(self.model) | fields
        return {name: value for name, value in fields.items() if name != "modeling"}

    def build_sampler(self) -> SubVocabularySampler | MaskedSubVocabularySampler:
        """From key and labels to images."""
        modules = dict(generator=self.build_generator(), tokenizer=self.build_tokenizer())
        if self.masked:
            return MaskedSubVocabularySampler(**modules, **dataclasses.asdict(self.reveal))
        return SubVocabularySampler(**modules)

    def recipe(self) -> Recipe:
        """The stages and the sampler."""
        base = super().recipe()
        if not self.masked:
            return base
        stages = (masked_stage(self, stage) if stage.name == "generator" else stage for stage in base.stages)
        return dataclasses.replace(base, stages=tuple(stages))


def masked_stage(config: SubVocabularyConfig, base: Stage) -> Stage:
    """The likelihood of the tokens of masked cells given the others (Liu et al. 2024; Chang et al. 2022, eq. 1).

    As many cells are masked as are left at one of the sampler's passes, drawn evenly for each image: the share is
    cos(pi i / 2n), i = 0..n-1, the authors' schedule. What is evaluated is an upper bound on the nats a token: with the number of
    masked cells drawn evenly from 1 to all of them, the mean loss of a masked token is what a model that makes cells in a random
    order pays for one, on average over the orders.

    Args:
      config: of a masked model.
      base: the stage of a causal one.
    """
    train, tokenizer, generator = config.model_train, config.build_tokenizer(), config.build_generator()
    passes = config.reveal.steps

    def corrupt(key, tokens, t, schedule: Schedule):
        """(Tokens, which of them are masked): whole cells."""
        path = Masking(generator.mask, schedule)
        _, masked = path.corrupt(key, tokens[:, :: generator.parts], t, exact=True)
        masked = jnp.repeat(masked, generator.parts, axis=1)
        return jnp.where(masked, generator.mask, tokens), masked

    def read(batch, frozen):
        return codes(functools.partial(tokenizer.apply, method="encode"), modules(frozen).get("tokenizer", {}), batch)

    def loss(params, state, batch, key, step, frozen):
        drop_key, time_key, mask_key, path_key = jax.random.split(key, 4)
        labels = drop_labels(drop_key, batch["label"], generator.num_classes, train.class_drop)
        tokens = read(batch, frozen)
        t = jnp.ceil(stratified_times(time_key, labels.shape) * passes) / passes
        noisy, masked = corrupt(mask_key, tokens, t, Cosine())
        logits = generator.apply(params["generator"], labels, noisy, train=True, rngs={"dropout": path_key})
        value = masked_prediction(logits, tokens, masked, label_smoothing=train.label_smoothing)
        hits = jnp.where(masked, logits.argmax(-1) == tokens, False).sum() / masked.sum()
        return value, ({"token_accuracy": hits.astype(jnp.float32)}, state)

    def eval_loss(params, state, batch, key, frozen):
        time_key, mask_key = jax.random.split(key)
        tokens = read(batch, frozen)
        t = stratified_times(time_key, batch["label"].shape, low=1e-6)
        noisy, masked = corrupt(mask_key, tokens, t, Linear())
        nll = cross_entropy(generator.apply(params["generator"], batch["label"], noisy), tokens)
        bound = (jnp.where(masked, nll, 0.0).sum(1) / masked.sum(1)).mean()
        return {"loss": bound, "nll_bound": bound}

    return dataclasses.replace(base, loss=loss, eval_loss=eval_loss)


def compare_parts(
    config: SubVocabularyConfig, parts: Sequence[int], *, seeds: int, samples: int, log: Callable[[str], None]
) -> Claim:
    """Likelihood, quality and cost of several vocabularies for the bits of one tokenizer, and of a masked model.

    The masked model has the first of the vocabularies. It is sampled in the configured number of passes, and again, where these
    are fewer, in as many as there are cells.

    Args:
      config: of the systems, whatever its parts and its modeling.
      parts: tokens a cell; 1 is one large softmax.
      seeds: trainings of each.
      samples: images that are judged.
      log: takes progress lines.
    """

    def variant(n: int, modeling: str = "causal", **reveal) -> SubVocabularyConfig:
        model = dataclasses.replace(config.model, parts=n, modeling=modeling)
        return dataclasses.replace(config, model=model, reveal=dataclasses.replace(config.reveal, **reveal))

    def name(n: int) -> str:
        bits = config.tokenizer.bits // n
        return f"baseline, one softmax of {bits} bits" if n == 1 else f"S152 ELM, {n} of {bits} bits"

    systems = {name(n): variant(n) for n in parts}
    cells, first = config.tokenizer.patch_nums[0] ** 2, f"{name(parts[0])}, masked"
    masked = {f"{first}, {n} passes": variant(parts[0], "masked", steps=n) for n in (config.reveal.steps, cells)}
    trained, *others = masked
    claim = claims.compare_generators(
        systems | masked,
        seeds=seeds,
        samples=samples,
        log=log,
        columns=_columns,
        same_weights={other: trained for other in others},
        title="Sub-vocabularies against one large softmax, and a masked model: equal bits, blocks, data and budget",
    )
    notes = (
        "One tokenizer for all, so that nats an image can be compared; those of the masked model are an upper bound, from one "
        "draw of masked cells for each test image. A cell's tokens are drawn independently."
    )
    return claim._replace(notes=f"{claim.notes} {notes}")


def _columns(recipe: Recipe, params: Mapping) -> dict:
    model, config = recipe.config.build_generator(), recipe.config
    nats = claims.test_nats(recipe, params)
    row = {"vocabulary": f"{model.parts} x {model.vocab}", "test nats an image": round(nats * model.length, 3)}
    if not config.masked:
        return row
    # The passes are a loop of no fixed length, which is counted as one turn.
    flops = count_flops(lambda params: recipe.sample(params, jax.random.key(0), jnp.zeros((1,), jnp.int32)), params)
    view = View(jnp.zeros((2, model.cells, model.parts), jnp.int32), jnp.arange(model.cells))
    step = functools.partial(model.apply, method="step")
    turn = count_flops(step, modules(params)["generator"], (), view, jnp.zeros((2,), jnp.int32))
    return row | {"model calls": config.reveal.steps, "sampling GFLOP/image": (flops + (config.reveal.steps - 1) * turn) / 1e9}
