"""Semi-autoregressive drafting from features (S114 Falcon): a language model, its drafter, and a designed tree."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxgen.decoding.feature_drafts import designed_tree
from jaxgen.decoding.topology import Topology
from jaxgen.generators.feature_drafter import FeatureDraft, FeatureDrafter, unit_features
from jaxgen.generators.sequence_sampler import Method
from jaxgen.recipe import Recipe, Stage, modules
from jaxgen.recipes.feature_drafting import RULES, DrafterConfig, distil_features
from jaxgen.recipes.language import LanguageConfig, LanguageTrainConfig, language_stage

__all__ = ["FalconConfig", "drafter_stage"]


@dataclasses.dataclass(frozen=True)
class FalconConfig(LanguageConfig):
    """`LanguageConfig` with a stage "drafter" and a sampler that drafts with it.

    Attributes:
      tree: paths of branch numbers that the drafts lie on, such as "0 1 00 01 10", see `designed_tree`.
      drafter, drafter_train: the drafter and its training.
    """

    tree: str = "0 1 2 00 01 10 000 001 100 0000"
    drafter: DrafterConfig = DrafterConfig()
    drafter_train: LanguageTrainConfig = LanguageTrainConfig(steps=300)

    def __post_init__(self):
        designed_tree(self.tree)

    @property
    def topology(self) -> Topology:
        """Of the drafts."""
        return designed_tree(self.tree)

    def build_drafter(self) -> FeatureDrafter:
        """The drafter module."""
        return self.drafter.build(self.build_model())

    def method(self) -> Method:
        """How the sampler drafts and checks."""
        return FeatureDraft(self.build_model(), self.build_drafter(), self.topology)

    def recipe(self) -> Recipe:
        """The stages and the sampler."""
        base = super().recipe()
        return dataclasses.replace(base, stages=(*base.stages, drafter_stage(self)))


def drafter_stage(config: FalconConfig) -> Stage:
    """Distils the trained target into the drafter, on the text that the target was trained on (Gao et al. 2024, section 3.2)."""
    model, drafter, train = config.build_model(), config.build_drafter(), config.drafter_train

    def init(key, frozen):
        vectors = jnp.zeros((1, config.data.length, model.width))
        return {"drafter": drafter.init(key, vectors, vectors)}, ()

    def measure(params, batch, frozen, key=None, share=0.0):
        target, tokens = modules(frozen)["generator"], batch["tokens"]
        features = unit_features(model.apply(target, tokens[:, :-1], method="features"))
        weights = jnp.ones(features.shape[:2])
        return distil_features(config.drafter, drafter, params["drafter"], model, target, tokens, features, weights, key, share)

    def loss(params, state, batch, key, step, frozen):
        share = config.drafter.glance * (1 - step / train.steps)
        value, metrics = measure(params, batch, frozen, key, share)
        return value, (metrics, state)

    def eval_loss(params, state, batch, key, frozen):
        value, metrics = measure(params, batch, frozen)
        return {"loss": value, **metrics}

    stage = language_stage("drafter", model, config.data, train, loss=loss)
    return dataclasses.replace(stage, init=init, eval_loss=eval_loss, needs=("generator",), rules=RULES)
