"""S026 Token-Shuffle: a next-token system whose transformer reads and predicts s x s tokens at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from jax.sharding import PartitionSpec as P

from jaxgen import config as config_lib
from jaxgen.generators import ShuffledSampler, ShuffledTransformer
from jaxgen.nn.token_shuffle import window_order
from jaxgen.recipe import Recipe
from jaxgen.recipes import claims
from jaxgen.recipes.claims import Claim
from jaxgen.recipes.fields import check_fields
from jaxgen.recipes.next_token import RULES, NextTokenConfig

__all__ = ["ShuffleConfig", "TokenShuffleConfig", "compare_windows"]

SHUFFLE_RULES = (
    *RULES,
    (r"shuffle/mix/mlp_\d+/fc1/kernel|shuffle/(compress|expand)/kernel", P("fsdp", "tensor")),
    (r"shuffle/mix/mlp_\d+/fc2/kernel", P("tensor", "fsdp")),
)


@dataclasses.dataclass(frozen=True)
class ShuffleConfig:
    """What is joined.

    Attributes:
      window: s, tokens along a side.
      mixing: residual MLPs before the transformer, and as many after it.
    """

    window: int = 2
    mixing: int = 2

    def __post_init__(self):
        check_fields("shuffle", self, window=1, mixing=0)


@dataclasses.dataclass(frozen=True)
class TokenShuffleConfig(NextTokenConfig):
    """`NextTokenConfig` whose transformer sees windows of tokens."""

    shuffle: ShuffleConfig = ShuffleConfig()

    def __post_init__(self):
        super().__post_init__()
        (side,), (window, width) = self.tokenizer.patch_nums, (self.shuffle.window, self.model.width or 64 * self.model.depth)
        window_order((side, side), window)
        if width % window**2:
            raise ValueError(f"shuffle.window={window}: its square must divide the model's width, {width}")

    @property
    def rules(self) -> tuple:
        """See `NextScaleConfig.rules`."""
        return SHUFFLE_RULES

    def build_generator(self) -> ShuffledTransformer:
        """The generator module."""
        return ShuffledTransformer(**self._generator_fields(), **dataclasses.asdict(self.shuffle))

    def build_sampler(self) -> ShuffledSampler:
        """From key and labels to images."""
        return ShuffledSampler(generator=self.build_generator(), tokenizer=self.build_tokenizer())


def unshuffled(config: TokenShuffleConfig) -> NextTokenConfig:
    """The next-token system of the same data and training, its MLPs wider so that it has as many parameters."""
    shuffle, model = config.shuffle, config.model
    # In squares of the width: a compression and an expansion, and two matrices for each residual MLP; a block has two in its own.
    extra = 2 / shuffle.window**2 + 4 * shuffle.mixing
    wider = dataclasses.replace(model, mlp_ratio=model.mlp_ratio + extra / (2 * model.depth))
    return NextTokenConfig(**config_lib.fields_of(config, NextTokenConfig) | dict(model=wider))


def compare_windows(
    config: TokenShuffleConfig, windows: Sequence[int], *, seeds: int, samples: int, log: Callable[[str], None]
) -> Claim:
    """Sequence length, calls, speed, likelihood and quality of windows of several sizes against one token a call.

    Args:
      config: of the shuffled systems.
      windows: s of each; the first decides how many parameters the system without windows has.
      seeds: trainings of each.
      samples: images that are judged.
      log: takes progress lines.
    """

    def sized(window: int) -> TokenShuffleConfig:
        return dataclasses.replace(config, shuffle=dataclasses.replace(config.shuffle, window=window))

    systems = {f"S026 Token-Shuffle, s={window}": sized(window) for window in windows}
    systems["baseline, one token a call"] = unshuffled(sized(windows[0]))
    title = "Token-Shuffle against the unshuffled model of equal size, data and training budget"
    claim = claims.compare_generators(systems, seeds=seeds, samples=samples, log=log, columns=_columns, title=title)
    notes = "The tokens of a window are drawn independently of one another: what that costs shows in the test likelihood."
    return claim._replace(notes=f"{claim.notes} {notes}")


def _columns(recipe: Recipe, params: dict) -> dict:
    """The transformer's sequence, and the nats a token of the test images."""
    order = recipe.config.build_generator().order
    return {"sequence length": order.steps, "test nats a token": round(claims.test_nats(recipe, params), 4)}
