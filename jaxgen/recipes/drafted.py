"""Language models with a draft model: plain, aligned to its target by distillation (S099), and behind long contexts (S095)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxgen.data.text import text_batches
from jaxgen.decoding import Coupled, KSeq, Rejection, Sequential, chains, speculate, truncate
from jaxgen.generators.long_context import Exposing, TriForce
from jaxgen.generators.sequence_sampler import Draft, Method, SequenceSampler, stepper
from jaxgen.objectives.distillation import forward_kl, policy_gradient, total_variation, tvd_plus_plus
from jaxgen.objectives.likelihood import cross_entropy
from jaxgen.optim import OptimConfig, adamw
from jaxgen.recipe import Recipe, Stage, modules
from jaxgen.recipes.fields import check_fields
from jaxgen.recipes.language import RULES, LanguageConfig, LanguageModelConfig, LanguageTrainConfig, language_stage

__all__ = [
    "AlignConfig",
    "AlignedConfig",
    "ContextConfig",
    "DraftedConfig",
    "DraftingConfig",
    "LongContextConfig",
    "SparseConfig",
    "align_stage",
    "context_stage",
]

RULES_BY_NAME = {"k_seq": KSeq, "rejection": Rejection, "coupled": Coupled}
LOSSES = ("likelihood", "kl", "tvd", "tvd++")


@dataclasses.dataclass(frozen=True)
class DraftingConfig:
    """How the draft model is used.

    Attributes:
      paths: chains of drafts from the last certain token, drawn independently.
      length: of each.
      rule: "k_seq" (SpecTr), "rejection" (of several paths recursively), or "coupled", which needs one path.
    """

    paths: int = 1
    length: int = 4
    rule: str = "rejection"

    def __post_init__(self):
        check_fields("drafting", self, paths=1, length=1)
        if self.rule not in RULES_BY_NAME:
            raise ValueError(f"drafting.rule={self.rule!r}: expected one of {', '.join(RULES_BY_NAME)}")
        if self.rule == "coupled" and self.paths != 1:
            raise ValueError(f"drafting.paths={self.paths}: independent paths cannot share the target's noise; 'coupled' needs 1")


@dataclasses.dataclass(frozen=True)
class DraftedConfig(LanguageConfig):
    """`LanguageConfig` with a second stage "draft", a smaller model of the same text that drafts for the first."""

    draft: LanguageModelConfig = LanguageModelConfig(width=64, heads=2, depth=1)
    draft_train: LanguageTrainConfig = LanguageTrainConfig()
    drafting: DraftingConfig = DraftingConfig()

    def __post_init__(self):
        if self.draft.vocab != self.model.vocab:
            raise ValueError(f"draft.vocab={self.draft.vocab}: drafts are the target's tokens, model.vocab={self.model.vocab}")

    def method(self) -> Method:
        """The draft model's chains."""
        one, options = self.drafting, dict(coupled=self.drafting.rule == "coupled", replacement=self.drafting.rule != "coupled")
        return Draft(self.draft.build(), chains(one.paths, one.length), RULES_BY_NAME[one.rule](), **options)

    def recipe(self) -> Recipe:
        """The stages and the sampler."""
        base = super().recipe()
        stage = language_stage("draft", self.draft.build(), self.data, self.draft_train)
        return dataclasses.replace(base, stages=(*base.stages, stage))


@dataclasses.dataclass(frozen=True)
class AlignConfig:
    """How the draft model is distilled.

    Attributes:
      loss: "kl" (of the target to the draft), "tvd", "tvd++", or "likelihood", which only reads on.
      sampled: "tvd" and "tvd++" by tokens sampled from the draft, in place of sums over the vocabulary.
      steps: updates; 0 takes the weights from the work directory as they are.
      batch_size: sequences an update.
      share: of them that the target made, from prompts of the text; the others are the text itself.
      prompt: tokens of a prompt; the loss is on what follows.
      temperatures: of the target's responses, in turn.
      top_p: of the target's responses.
      pool: responses that are made at once.
      refresh: updates until the pool is made anew.
      optim: AdamW and its schedule.
    """

    loss: str = "tvd++"
    sampled: bool = False
    steps: int = 300
    batch_size: int = 16
    share: float = 0.9
    prompt: int = 16
    temperatures: tuple[float, ...] = (1.0,)
    top_p: float = 1.0
    pool: int = 256
    refresh: int = 100
    optim: OptimConfig = OptimConfig(lr=1e-3, warmup_steps=20, schedule="cosine", lr_end=0.05, clip=1.0, no_decay=("scale",))

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise ValueError(f"align.loss={self.loss!r}: expected one of {', '.join(LOSSES)}")
        if self.sampled and not self.loss.startswith("tvd"):
            raise ValueError(f"align.sampled=True: only 'tvd' and 'tvd++' are estimated by samples, not {self.loss!r}")
        check_fields("align", self, shares=("share", "top_p"), steps=0, batch_size=1, prompt=1, pool=1, refresh=1)
        if not self.temperatures or min(self.temperatures) <= 0:
            raise ValueError(f"align.temperatures={self.temperatures}: expected numbers > 0")
        if self.pool < self.batch_size:
            raise ValueError(f"align.pool={self.pool}: expected at least align.batch_size={self.batch_size}")


@dataclasses.dataclass(frozen=True)
class AlignedConfig(DraftedConfig):
    """`DraftedConfig` with a third stage "align", whose draft model the sampler uses."""

    align: AlignConfig = AlignConfig()

    def __post_init__(self):
        super().__post_init__()
        if self.align.prompt > self.data.length:
            raise ValueError(f"align.prompt={self.align.prompt}: responses need room in data.length={self.data.length}")

    def recipe(self) -> Recipe:
        """The stages and the sampler."""
        base = super().recipe()
        return dataclasses.replace(base, stages=(*base.stages, align_stage(self)))


def align_stage(config: AlignedConfig) -> Stage:
    """The stage that trains the draft model on its target's own responses (Goel et al. 2024, arXiv:2403.00858, section 2).

    The target samples a pool of responses inside the training step, every `refresh` updates; the pool is the stage's state.
    """
    options, data = config.align, config.data
    target, draft = config.build_model(), config.draft.build()
    made = round(options.share * options.batch_size)
    temperatures = jnp.resize(jnp.array(options.temperatures), (options.pool,))

    def init(key, frozen):
        pool = jnp.zeros((options.pool, data.length + 1), jnp.int32)
        return {"draft": jax.tree.map(jnp.copy, modules(frozen)["draft"])}, {"pool": pool, "round": jnp.int32(-1)}

    def respond(key, frozen, prompts):
        return speculate(
            stepper(target),
            Sequential(),
            Coupled(),
            params=modules(frozen)["generator"],
            cache=target.init_cache(options.pool, data.length + 1),
            cond=None,
            prompt=prompts,
            max_length=data.length + 1,
            key=key,
            transform=lambda logits, context: truncate(logits, temperature=temperatures, top_p=options.top_p),
        ).tokens

    def refreshed(state, batch, key, step, frozen):
        now = step // options.refresh
        prompts = batch["tokens"][:, : options.prompt]
        pool = jax.lax.cond(state["round"] != now, lambda: respond(key, frozen, prompts), lambda: state["pool"])
        return {"pool": pool, "round": now.astype(jnp.int32)}

    def laws(params, tokens, frozen):
        inputs = tokens[:, :-1]
        return draft.apply(params["draft"], inputs), target.apply(modules(frozen)["generator"], inputs)

    def objective(key, q, p, tokens, where):
        if options.loss == "likelihood":
            return cross_entropy(q, tokens[:, 1:])
        if options.loss == "kl":
            return forward_kl(q, p)
        if options.sampled:
            drawn = jax.random.categorical(key, jax.lax.stop_gradient(q))
            return policy_gradient(q, p, drawn, where, normalise=options.loss == "tvd++")
        return tvd_plus_plus(q, p, where) if options.loss == "tvd++" else total_variation(q, p)

    def loss(params, state, batch, key, step, frozen):
        keys, frozen = jax.random.split(key, 3), jax.lax.stop_gradient(frozen)
        if made:
            state = refreshed(state, batch, keys[0], step, frozen)
        chosen = jax.random.choice(keys[1], options.pool, (made,), replace=False)
        tokens = jnp.concatenate([state["pool"][chosen], batch["tokens"][: options.batch_size - made]])
        answers = (jnp.arange(options.batch_size) >= made)[:, None] | (jnp.arange(1, data.length + 1) >= options.prompt)
        q, p = laws(params, tokens, frozen)
        count = answers.sum()
        value = (objective(keys[2], q, p, tokens, answers) * answers).sum() / count
        accepted = 1 - (total_variation(q, p) * answers).sum() / count
        return value, ({"acceptance": jax.lax.stop_gradient(accepted)}, state)

    def eval_loss(params, state, batch, key, frozen):
        q, p = laws(params, batch["tokens"], frozen)
        rejected = total_variation(q, p).mean()
        nll = cross_entropy(q, batch["tokens"][:, 1:]).mean()
        return {"loss": rejected, "acceptance": 1 - rejected, "kl": forward_kl(q, p).mean(), "nll": nll}

    def batches(split, size, train, shard_index, shard_count):
        return text_batches(data, split, batch_size=size, train=train, shard_index=shard_index, shard_count=shard_count)

    return Stage(
        name="align",
        steps=options.steps,
        init=init,
        loss=loss,
        optimizer=adamw(options.optim, max(options.steps, 1)),
        data=functools.partial(batches, "train", options.pool, True),
        needs=("generator", "draft"),
        eval_data=functools.partial(batches, "test", options.batch_size, False),
        eval_loss=eval_loss,
        rules=((r"pool", P(("data", "fsdp"))), *RULES),
    )


@dataclasses.dataclass(frozen=True)
class ContextConfig:
    """How target and draft learn to read more than `data.length` tokens.

    Attributes:
      length: tokens of an example.
      train: of the target's second training.
    """

    length: int = 512
    train: LanguageTrainConfig = LanguageTrainConfig(
        steps=60,
        batch_size=4,
        optim=OptimConfig(lr=5e-4, warmup_steps=10, schedule="cosine", lr_end=0.05, clip=1.0, no_decay=("scale",)),
    )

    def __post_init__(self):
        check_fields("context", self, length=1)


@dataclasses.dataclass(frozen=True)
class SparseConfig:
    """The caches of the lower levels, see `jaxgen.generators.long_context.TriForce`."""

    length: int = 6
    inner: int = 1
    sink: int = 16
    window: int = 64
    budget: int = 128
    chunk: int = 8
    recent: int = 80

    def __post_init__(self):
        check_fields("sparse", self, length=1, inner=1, sink=0, window=1, budget=0, chunk=1, recent=1)
        if self.budget % self.chunk or self.recent < self.chunk:
            raise ValueError(f"sparse.chunk={self.chunk}: must divide budget={self.budget} and be at most recent={self.recent}")


@dataclasses.dataclass(frozen=True)
class LongContextConfig(DraftedConfig):
    """`DraftedConfig` for long prompts: a stage "context" that lengthens the target's context, and a sampler of three levels."""

    context: ContextConfig = ContextConfig()
    sparse: SparseConfig = SparseConfig()

    def method(self) -> TriForce:
        """The three levels."""
        return TriForce(draft=self.draft.build(), target=self.build_model(), **dataclasses.asdict(self.sparse))

    def build_sampler(self) -> SequenceSampler:
        """From key and prompts to text."""
        return SequenceSampler(model=Exposing(self.build_model()), method=self.method())

    def recipe(self) -> Recipe:
        """The stages and the sampler."""
        base = LanguageConfig.recipe(self)
        data = dataclasses.replace(self.data, length=self.context.length)
        draft = language_stage("draft", self.draft.build(), data, self.draft_train)
        return dataclasses.replace(base, stages=(*base.stages, context_stage(self), draft))


def context_stage(config: LongContextConfig) -> Stage:
    """The stage that goes on training the target on longer examples."""
    data = dataclasses.replace(config.data, length=config.context.length)
    stage = language_stage("generator", config.build_model(), data, config.context.train)

    def init(key, frozen):
        return {"generator": jax.tree.map(jnp.copy, modules(frozen)["generator"])}, ()

    return dataclasses.replace(stage, name="context", init=init, needs=("generator",))
