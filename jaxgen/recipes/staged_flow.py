"""Staged partial denoising (S093 E-CAR): its configuration, and the claim against a flow of the whole grid."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxgen import config as config_lib
from jaxgen.generators.staged_flow import StagedFlowTransformer
from jaxgen.recipe import Recipe
from jaxgen.recipes import claims
from jaxgen.recipes.claims import Claim
from jaxgen.recipes.evaluation import evaluate_images
from jaxgen.recipes.fields import check_fields
from jaxgen.recipes.flow_scales import FlowScaleConfig, FlowScaleModelConfig, ScaleSolverConfig
from jaxgen.recipes.next_x import NextXConfig

__all__ = ["StagedFlowConfig", "StagedFlowModelConfig", "compare_with_dit"]


@dataclasses.dataclass(frozen=True)
class StagedFlowModelConfig(FlowScaleModelConfig):
    """Sizes of `StagedFlowTransformer`."""

    starts: tuple[float, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if self.starts:
            check_fields("model", self, starts=0)


@dataclasses.dataclass(frozen=True)
class StagedFlowConfig(FlowScaleConfig):
    """Everything that defines a run. `recipe()` builds it."""

    model: StagedFlowModelConfig = StagedFlowModelConfig()
    sampler: ScaleSolverConfig = ScaleSolverConfig(steps=8, guided_below=1.0, two_speeds=False)

    def build_generator(self) -> StagedFlowTransformer:
        """The generator module.

        Raises:
          ValueError: stages that do not fit the latent, or one another.
        """
        generator = StagedFlowTransformer(**self._generator_fields())
        generator.path  # noqa: B018  - raises
        return generator


def compare_with_dit(
    config: StagedFlowConfig,
    dit: NextXConfig,
    *,
    steps: Sequence[int],
    dit_steps: Sequence[int],
    seeds: int,
    samples: int,
    log: Callable[[str], None],
) -> Claim:
    """Quality against cost: the system, and a transformer that runs at every step of a flow of the whole grid, as DiT does.

    Each is trained once a seed and sampled with several numbers of steps. Sampling is without guidance, and judged by one
    classifier.

    Args:
      config: the system's.
      dit: the baseline's, with as many parameters, and the same data, tokens and training.
      steps: of the solver, for each stage.
      dit_steps: of the baseline's solver.
      seeds, samples, log: see `compare_generators`.

    Raises:
      ValueError: no seeds.
    """
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: expected at least 1")
    rows, timed, judge = [], [], {}
    for name, system, counts in (("S093 E-CAR", config, steps), ("baseline, one stage", dit, dit_steps)):
        measured: dict[int, list[dict]] = {count: [] for count in counts}
        for seed in range(seeds):
            log(f"{name}: seed {seed}")
            recipe, params, _ = claims.train_all(system, seed, judge, log)
            judge = {"classifier": params["classifier"]}
            for count in counts:
                measured[count].append(_quality(_sampled_in(recipe, count), params, seed, samples))
        for count in counts:
            sampled = _sampled_in(recipe, count)
            rows.append({"system": name} | _row(sampled, params, measured[count]))
            timed.append((sampled, params))
    claims.add_times(rows, timed)
    return Claim("Staged partial denoising against a flow of the whole grid", rows, _notes(rows, seeds))


def _sampled_in(recipe: Recipe, steps: int) -> Recipe:
    return config_lib.override(recipe.config, [f"sampler.steps={steps}"]).recipe()


def _quality(recipe: Recipe, params, seed: int, samples: int) -> dict[str, float]:
    given = dict(settings=dict(cfg=0.0, top_k=0, top_p=0.0), batch_size=100)
    generation = evaluate_images(recipe, params, jax.random.key(seed), num=samples, **given)[0]["generation"]
    return {"class accuracy": generation["class_accuracy"], "Frechet": generation["frechet"]}


def _row(recipe: Recipe, params, measured: list[dict]) -> dict[str, Any]:
    """Sizes, quality and costs of a system that is sampled in so many steps."""
    config = recipe.config
    stages = config.build_generator().order.steps
    parameters = sum(x.size for x in jax.tree.leaves(params["generator"]))
    row: dict[str, Any] = {"parameters M": round(parameters / 1e6, 3), "stages": stages, "steps a stage": config.sampler.steps}
    row |= {column: claims.mean_and_spread([m[column] for m in measured]) for column in measured[0]}
    return row | claims.sampling_costs(recipe, params)


def _notes(rows: list[dict], seeds: int) -> str:
    """The cheapest row of each system whose distance is within a tenth of the baseline's best."""
    best = min(_number(row["Frechet"]) for row in rows if row["system"].startswith("baseline"))
    text = f"{seeds} seeds; mean (spread). The baseline's best Frechet distance is {best:.4g}."
    near = [row for row in rows if _number(row["Frechet"]) <= 1.1 * best]
    for name in dict.fromkeys(row["system"] for row in rows):
        mine = [row for row in near if row["system"] == name]
        if not mine:
            text += f" {name} does not come within a tenth of it."
            continue
        row = min(mine, key=lambda row: row["sampling GFLOP/image"])
        text += (
            f" {name} comes within a tenth of it with {row['steps a stage']} steps a stage: "
            f"{row['sampling GFLOP/image']:.4g} GFLOP and {row['ms/image, batch 64']} ms an image."
        )
    return text


def _number(cell) -> float:
    """The mean in a cell of `mean_and_spread`."""
    return float(str(cell).split()[0])
