"""What a prefix of tokens shows: previews of held-out images and of samples, by the number of groups."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.data import pixels
from jaxgen.metrics import detail, psnr
from jaxgen.nn.classifier import Classifier
from jaxgen.recipe import modules
from jaxgen.recipes import claims
from jaxgen.recipes.claims import Claim, mean_and_spread
from jaxgen.recipes.diffusion_tokens import DiffusionTokensConfig
from jaxgen.recipes.evaluation import held_out, measure_samples

__all__ = ["measure_previews", "sharpening"]


def sharpening(config: DiffusionTokensConfig, *, seeds: int, samples: int, log: Callable[[str], None]) -> Claim:
    """A row for each number of groups: how close, how detailed and how good the previews are.

    Args:
      config: of the system, with a classifier.
      seeds: trainings.
      samples: images that are judged.
      log: takes progress lines.

    Raises:
      ValueError: no seeds.
    """
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: expected at least 1")
    measured = []
    for seed in range(seeds):
        log(f"previews: seed {seed}")
        recipe, params, _ = claims.train_all(config, seed, {}, log)
        measured.append(measure_previews(recipe.config, modules(params), jax.random.key(seed), samples))
    rows = []
    for i, group in enumerate(zip(*measured)):
        row = {"groups": i + 1, "tokens": (i + 1) * config.build_tokenizer().group}
        rows.append(row | {name: mean_and_spread([one[name] for one in group]) for name in group[0]})
    steps = [float(np.mean([one[i]["PSNR, held out"] for one in measured])) for i in range(len(rows))]
    up = all(a < b for a, b in zip(steps, steps[1:]))
    notes = (
        f"{seeds} seeds; mean (spread). PSNR of held-out images {'rises' if up else 'does not rise'} with every group. Detail is "
        "the mean squared difference of neighbouring pixels, as a share of the real images'."
    )
    return Claim("Previews from the first groups of tokens", rows, notes)


def measure_previews(config: DiffusionTokensConfig, variables: dict, key, samples: int) -> list[dict]:
    """What is measured of the previews of 1, 2, ... groups.

    Args:
      config: of the system.
      variables: by module; samples are judged by the "classifier".
      key: of the samples.
      samples: how many.
    """
    tokenizer, data = config.build_tokenizer(), config.data
    test = np.concatenate([pixels(batch["image"]) for batch in held_out(data, batch_size=64, limit=1000)])

    @jax.jit
    def previews(tokens):
        return tokenizer.apply(variables["tokenizer"], tokens, method="previews")

    tokens = jax.jit(lambda x: tokenizer.apply(variables["tokenizer"], x, method="encode"))(test)
    known, real = previews(tokens), detail(test)
    labels = np.sort(np.arange(samples, dtype=np.int32) % config.num_classes)
    drawn = [out for _, out in config.build_sampler().stream(variables, key, labels)]
    classifier = Classifier(num_classes=config.num_classes, width=config.classifier.width)
    rows = []
    for shown, made in zip(known, map(np.asarray, drawn)):
        judged = measure_samples(classifier, variables["classifier"], made, labels, data)
        rows.append(
            {
                "PSNR, held out": float(psnr(jnp.asarray(test), shown).mean()),
                "detail, held out": detail(np.asarray(shown)) / real,
                "distance to the sample": float(np.sqrt(np.square(made - np.asarray(drawn[-1])).mean())),
                "detail, samples": detail(made) / real,
                "class accuracy": judged["class_accuracy"],
                "Frechet": judged["frechet"],
            }
        )
    return rows
