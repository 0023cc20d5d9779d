"""Multi-token prediction by masks (S021): a trained model learns to read masks without changing what it says otherwise."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int

from jaxgen.decoding import Coupled, Rejection, Rule
from jaxgen.decoding.mask_drafts import MaskDrafts
from jaxgen.generators.multi_token import MultiTokenModel
from jaxgen.generators.sequence_sampler import SequenceSampler
from jaxgen.objectives.likelihood import cross_entropy
from jaxgen.recipe import Recipe, Stage, modules
from jaxgen.recipes.claims import Claim, train_all, trained
from jaxgen.recipes.decoding_claims import compare_samplers, held_out_prompts
from jaxgen.recipes.fields import check_fields
from jaxgen.recipes.language import ADAPTER_RULES, LanguageConfig, LanguageTrainConfig, language_stage, text_sample

__all__ = ["MaskMethod", "MultiTokenConfig", "compare_masks", "masked_inputs", "multi_token_stage"]

# Adapters, and the layers of the sampler head.
RULES = (*ADAPTER_RULES, (r"sampler/params/fc\d/kernel", P("fsdp", "tensor")))


@dataclasses.dataclass(frozen=True)
class MaskConfig:
    """What is added to the language model.

    Attributes:
      count: k, masks behind a token: how many tokens after the next one are drafted.
      rank: of the adapters.
      anchors: positions of an example behind which masks are read in training.
      consistency: weight of the loss that draws a mask's features to those of the token that it stands for.
      rule: "rejection" or "coupled".
    """

    count: int = 4
    rank: int = 32
    anchors: int = 24
    consistency: float = 1.0
    rule: str = "rejection"

    def __post_init__(self):
        check_fields("mask", self, count=1, rank=1, anchors=1, consistency=0)
        if self.rule not in ("rejection", "coupled"):
            raise ValueError(f"mask.rule={self.rule!r}: expected rejection or coupled")


@dataclasses.dataclass(frozen=True)
class MaskMethod:
    """`MaskDrafts` for `SequenceSampler`.

    Attributes:
      model: the target with masks.
      rule: which drafts stay.
    """

    model: MultiTokenModel
    rule: Rule = Rejection()

    def __call__(self, params, prompt, max_length):
        head = functools.partial(self.model.sampler_logits, params["generator"])
        coupled = isinstance(self.rule, Coupled)
        return MaskDrafts(head, self.model.base.width, self.model.probes, coupled), self.rule


@dataclasses.dataclass(frozen=True)
class MultiTokenConfig(LanguageConfig):
    """`LanguageConfig` with a second stage, "multi_token", that trains adapters, masks and a sampler head on the frozen model."""

    mask: MaskConfig = MaskConfig()
    mask_train: LanguageTrainConfig = LanguageTrainConfig()

    def build_target(self) -> MultiTokenModel:
        """The model with masks."""
        return MultiTokenModel(self.build_model(), self.mask.count, self.mask.rank)

    def method(self) -> MaskMethod:
        """How the sampler drafts and checks."""
        return MaskMethod(self.build_target(), Coupled() if self.mask.rule == "coupled" else Rejection())

    def build_sampler(self) -> SequenceSampler:
        """From key and prompts to text."""
        return SequenceSampler(model=self.build_target(), method=self.method())

    def recipe(self) -> Recipe:
        """The stages and the sampler."""
        base = super().recipe()
        sample = functools.partial(_sample, self.build_sampler())
        return dataclasses.replace(base, stages=(*base.stages, multi_token_stage(self)), sample=sample)


def _sample(sampler, params, key, prompts, **options):
    return text_sample(sampler, {"generator": {"generator": variables_of(params)}}, key, prompts, **options)


def variables_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a `MultiTokenModel`, from parameters by stage."""
    by_module = modules(params)
    return {"base": by_module["generator"], **by_module["multi_token"]}


def masked_inputs(tokens: Int[Array, "b l"], anchors: Int[Array, "b n"], masks: tuple[int, ...]):
    """The tokens, then k masks behind each anchor: mask j stands at position anchor + 1 + j.

    Returns:
      (inputs [b, m], positions [b, m], who sees whom bool [b, m, m]), m = l + n k: tokens see tokens up to themselves; masks see
      the tokens up to their anchor, and the masks of their group up to themselves.
    """
    b, length = tokens.shape
    n, k = anchors.shape[1], len(masks)
    inputs = jnp.concatenate([tokens, jnp.tile(jnp.array(masks, jnp.int32), (b, n))], axis=1)
    place = (anchors[..., None] + 1 + jnp.arange(k)).reshape(b, n * k)
    pos = jnp.concatenate([jnp.broadcast_to(jnp.arange(length), (b, length)), place], axis=1)
    group = jnp.concatenate([jnp.full((length,), -1), jnp.repeat(jnp.arange(n), k)])
    last = jnp.concatenate([pos[:, :length], jnp.repeat(anchors, k, axis=1)], axis=1)  # the last token that each sees
    to_tokens = (group == -1) & (pos[:, None, :] <= last[:, :, None])
    to_masks = (group != -1) & (group[:, None] == group) & (pos[:, None, :] <= pos[:, :, None])
    visible: Bool[Array, "b m m"] = to_tokens | to_masks
    return inputs, pos, visible


def multi_token_stage(config: MultiTokenConfig) -> Stage:
    """Cross-entropy of the masks' tokens by both heads, and the consistency of the features (section 3.3)."""
    model, settings = config.build_target(), config.mask
    k = settings.count

    def init(key, frozen):
        return {"multi_token": model.init(key, modules(frozen)["generator"])}, ()

    def measure(params, batch, key, frozen):
        tokens = batch["tokens"]
        b, length = tokens.shape
        variables = {"base": modules(frozen)["generator"], **params["multi_token"]}
        # Behind an anchor i there are tokens i + 1 .. i + k, where the masks stand, and i + k + 1, which the last mask is to say.
        anchors = jax.random.randint(key, (b, settings.anchors), 0, length - k - 1)
        features = model.features(variables, *masked_inputs(tokens, anchors, model.probes))
        at = (anchors[..., None] + 1 + jnp.arange(k)).reshape(b, -1)
        here, target = (jnp.take_along_axis(tokens, at + shift, axis=1) for shift in (0, 1))
        real = jax.lax.stop_gradient(jnp.take_along_axis(features[:, :length], at[..., None], axis=1))
        masks = features[:, length:]
        base = cross_entropy(model.logits(variables, masks), target)
        logits = model.sampler_logits(variables, masks, here)
        sampler, distance = cross_entropy(logits, target), jnp.square(masks - real).mean(-1)
        hits = (logits.argmax(-1) == target).astype(jnp.float32).reshape(b, -1, k)
        loss = base.mean() + sampler.mean() + settings.consistency * distance.mean()
        metrics = {"nll": sampler.mean(), "nll_base": base.mean(), "distance": distance.mean()}
        return loss, metrics | {f"accuracy_{i + 1}": hits[..., i].mean() for i in range(k)}

    def loss(params, state, batch, key, step, frozen):
        value, metrics = measure(params, batch, key, frozen)
        return value, (metrics, state)

    def eval_loss(params, state, batch, key, frozen):
        value, metrics = measure(params, batch, key, frozen)
        return {"loss": value, **metrics}

    fields = dict(init=init, loss=loss, eval_loss=eval_loss, needs=("generator",), rules=RULES)
    return language_stage("multi_token", model, config.data, config.mask_train, **fields)


def compare_masks(config: MultiTokenConfig, *, prompts: int, new_tokens: int, repeats: int, log: Callable[[str], None]) -> Claim:
    """S021: tokens a target call and time against plain sampling of the same model, checked by rejection and by coupling."""
    plain = config.plain()
    given = trained(plain, config.run.seed, log)[1]
    _, params, metrics = train_all(config, config.run.seed, given, log)
    variables = {"generator": variables_of(params), "plain": modules(params)["generator"]}
    model = config.build_target()
    samplers = {
        "plain": dataclasses.replace(plain.build_sampler(), name="plain"),
        f"{model.masks} masks": SequenceSampler(model=model, method=MaskMethod(model)),
        f"{model.masks} masks, coupled": SequenceSampler(model=model, method=MaskMethod(model, Coupled())),
    }
    held_out = held_out_prompts(config.data, count=prompts, length=32)
    rows = []
    for temperature in (1.0, 0.5):
        for row in compare_samplers(
            samplers, variables, held_out, new_tokens=new_tokens, repeats=repeats, temperature=temperature
        ):
            rows.append({"temperature": temperature} | row)
    accuracy = ", ".join(f"{metrics['multi_token'][f'accuracy_{i + 1}']:.3f}" for i in range(model.masks))
    notes = f"Share of held-out tokens that the sampler head ranks first, by distance from the next token: {accuracy}."
    return Claim("Multi-token prediction by masks: the same law in fewer target calls", rows, notes)
