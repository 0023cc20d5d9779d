"""S080 HMAR: a scale-Markov generator, and then a refiner on its trunk that predicts the masked tokens of a scale."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Key

from jaxgen import config as config_lib
from jaxgen.decoding import check_passes
from jaxgen.decoding.masked_scale import CONFIDENCES
from jaxgen.generators import RefinedScaleSampler, ScaleRefiner
from jaxgen.generators.scale_refiner import masked_logits, refiner_from
from jaxgen.objectives.likelihood import cross_entropy, drop_labels
from jaxgen.optim import adamw
from jaxgen.orders import Order
from jaxgen.recipe import Recipe, Stage, modules
from jaxgen.recipes import next_scale
from jaxgen.recipes.fields import check_fields
from jaxgen.recipes.markov_scale import MarkovConfig, MarkovScaleConfig
from jaxgen.recipes.next_scale import RULES, ModelTrainConfig, sample_images
from jaxgen.recipes.token_cache import check_codes, code_batches, codes

__all__ = ["RefinedScaleConfig", "RefinerConfig", "config_of", "mask_scales", "read_passes", "refiner_stage"]


@dataclasses.dataclass(frozen=True)
class RefinerConfig:
    """The refiner and how it is used.

    Attributes:
      depth: blocks of its own; the generator's others are its trunk.
      passes: for each scale how many tokens become certain at each pass, such as `1`, `1+3`, `1+1+2+5`; none is one pass each.
      confidence, cfg: `confidence` and `refine_cfg` of `RefinedScaleSampler`.
    """

    depth: int = 8
    passes: tuple[str, ...] = ()
    confidence: str = "drawn"
    cfg: float = 0.0

    def __post_init__(self):
        check_fields("refiner", self, depth=1, cfg=0)
        if self.confidence not in CONFIDENCES:
            raise ValueError(f"refiner.confidence={self.confidence!r} is not one of {', '.join(CONFIDENCES)}")


@dataclasses.dataclass(frozen=True)
class RefinedScaleConfig(MarkovScaleConfig):
    """`MarkovScaleConfig` with a refiner, and its training (Kumbong et al. 2025, section 4.2: the fine-tuning)."""

    refiner: RefinerConfig = RefinerConfig()
    refiner_train: ModelTrainConfig = ModelTrainConfig()

    def __post_init__(self):
        super().__post_init__()
        if self.refiner.depth >= self.model.depth:
            raise ValueError(f"refiner.depth={self.refiner.depth} must be below model.depth={self.model.depth}")
        if self.model.shared_adaln:
            raise ValueError("model.shared_adaln=True: a refiner's blocks have their own modulation")
        if len(self.tokenizer.patch_nums) < 2:
            raise ValueError(f"tokenizer.patch_nums={self.tokenizer.patch_nums}: the first scale is not refined; give two")

    def build_refiner(self) -> ScaleRefiner:
        """The refiner module."""
        others = ("depth", "num_classes", "shared_adaln")
        fields = {name: value for name, value in self._generator_fields().items() if name not in others}
        return ScaleRefiner(depth=self.refiner.depth, **fields)

    def build_sampler(self) -> RefinedScaleSampler:
        """From key and labels to images."""
        generator = self.build_generator()
        return RefinedScaleSampler(
            generator=generator,
            tokenizer=self.build_tokenizer(),
            refiner=self.build_refiner(),
            passes=read_passes(generator.order, self.refiner.passes),
            confidence=self.refiner.confidence,
            refine_cfg=self.refiner.cfg,
        )

    def recipe(self) -> Recipe:
        """The stages and the sampler, which takes another schedule as `passes`."""
        recipe = super().recipe()
        tokenizer, generator, *others = recipe.stages
        stages = (tokenizer, generator, refiner_stage(self), *others)
        return dataclasses.replace(recipe, stages=stages, sample=functools.partial(_sample, self.build_sampler()))


def read_passes(order: Order, texts: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """The schedule that `1`, `1+3`, ... say, one entry a scale; no entries are one pass a scale.

    Raises:
      ValueError: what is no number, and see `check_passes`.
    """
    if not texts:
        return tuple((size,) for size in order.sizes)
    try:
        passes = tuple(tuple(int(count) for count in text.split("+")) for text in texts)
    except ValueError:
        raise ValueError(f"passes={tuple(texts)}: expected counts such as 1+3, one entry a scale") from None
    check_passes(order, passes)
    return passes


def _sample(sampler: RefinedScaleSampler, params, key, labels, *, passes: tuple[str, ...] | None = None, **options) -> dict:
    """Samples with the schedule `passes`, or the configuration's; other options are those of `sample_images`."""
    if passes is not None:
        sampler = dataclasses.replace(sampler, passes=read_passes(sampler.generator.order, passes))
    return sample_images(sampler, params, key, labels, **options)


def mask_scales(key: Key[Array, ""], order: Order, batch: int, share=None) -> Bool[Array, "b l-first"]:
    """Masked positions of all scales but the first: ceil(p n) of n in each, with p uniform in (0, 1] for each row, or `share`.

    The authors draw p and the positions once for the whole batch.
    """
    share_key, *keys = jax.random.split(key, order.steps)
    p = 1 - jax.random.uniform(share_key, (batch, 1)) if share is None else jnp.full((batch, 1), share)

    def one(key, size):
        rank = jnp.argsort(jnp.argsort(jax.random.uniform(key, (batch, size)), axis=1), axis=1)
        # A hair less than the product, so that rounding does not mask one more than its exact value asks for.
        return rank < jnp.ceil(size * p * (1 - 1e-6))

    masked = [one(key, size) for key, size in zip(keys, order.sizes[1:])]
    return jnp.concatenate([jnp.zeros((batch, 0), bool), *masked], axis=1)


def config_of(sampler: RefinedScaleSampler) -> RefinedScaleConfig:
    """The configuration of modules that exist already, with nothing left to train (see `next_scale.config_of`)."""
    base = next_scale.config_of(sampler.generator, sampler.tokenizer)
    passes = tuple("+".join(map(str, counts)) for counts in sampler.passes)
    refiner = RefinerConfig(sampler.refiner.depth, passes, sampler.confidence, sampler.refine_cfg)
    markov = MarkovConfig(window=sampler.generator.window, since=sampler.generator.since)
    fields = config_lib.fields_of(base)
    return RefinedScaleConfig(**fields, markov=markov, refiner=refiner, refiner_train=ModelTrainConfig(steps=0))


def refiner_stage(config: RefinedScaleConfig) -> Stage:
    """Masked prediction by the last blocks and a head of their own, on the trunk that next-scale prediction has trained."""
    train, tokenizer, generator, refiner = (
        config.refiner_train,
        config.build_tokenizer(),
        config.build_generator(),
        config.build_refiner(),
    )
    order, first = generator.order, generator.order.sizes[0]

    def init(key, frozen):
        return {"refiner": refiner_from(generator, modules(frozen)["generator"], refiner, key)}, ()

    def measures(params, batch, labels, masked, frozen, smoothing=0.0, **options):
        frozen = modules(frozen)
        variables = frozen["tokenizer"]
        tokens = codes(functools.partial(tokenizer.apply, method="encode"), variables, batch)
        inputs = config.teacher_inputs(tokenizer, variables, tokens)
        scales = list(enumerate(order.split(tokens)))[1:]
        own = [tokenizer.apply(variables, scale, ids, method="own") for scale, ids in scales]
        given = jax.lax.stop_gradient((inputs, jnp.concatenate([inputs[:, :0], *own], axis=1)))
        both = {"generator": jax.lax.stop_gradient(frozen["generator"]), "refiner": params["refiner"]}
        logits = masked_logits(generator, refiner, both, labels, *given, masked, **options)[:, first:]
        tokens, weights = tokens[:, first:], masked / masked.sum(axis=1, keepdims=True) / len(labels)
        losses = {"loss": cross_entropy(logits, tokens, label_smoothing=smoothing), "masked_nll": cross_entropy(logits, tokens)}
        return {name: (x * weights).sum() for name, x in (losses | {"masked_accuracy": logits.argmax(-1) == tokens}).items()}

    def loss(params, state, batch, key, step, frozen):
        drop_key, path_key, mask_key = jax.random.split(key, 3)
        labels = drop_labels(drop_key, batch["label"], generator.num_classes, train.class_drop)
        masked = mask_scales(mask_key, order, len(labels))
        options = dict(smoothing=train.label_smoothing, train=True, rngs={"dropout": path_key})
        metrics = measures(params, batch, labels, masked, frozen, **options)
        return metrics.pop("loss"), (metrics, state)

    def eval_loss(params, state, batch, key, frozen):
        masked = mask_scales(key, order, len(batch["label"]), share=0.5)
        return measures(params, batch, batch["label"], masked, frozen)

    return Stage(
        name="refiner",
        steps=train.steps,
        init=init,
        loss=loss,
        optimizer=adamw(train.optim, train.steps) if train.steps else optax.identity(),
        data=functools.partial(code_batches, config.data, train.batch_size, "train"),
        needs=("tokenizer", "generator"),
        check=functools.partial(check_codes, config.data),
        eval_data=functools.partial(code_batches, config.data, train.batch_size, "test"),
        eval_loss=eval_loss,
        ema=train.ema,
        accumulate=train.accumulate,
        rules=RULES,
    )
