"""Measures of a trained image system: reconstruction by its tokenizer, and samples against real images."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxgen import metrics
from jaxgen.data import DataConfig, Pictures, image_batches, pixels
from jaxgen.data.clips import ClipPictures, stacked
from jaxgen.hosts import to_host
from jaxgen.nn.classifier import Classifier
from jaxgen.nn.perceptual import lpips
from jaxgen.recipe import modules
from jaxgen.recipes.image_quality import observe
from jaxgen.recipes.sampling import sample_batch

__all__ = [
    "evaluate_images",
    "held_out",
    "measure_reconstruction",
    "measure_samples",
    "read_images",
    "real_features",
    "sample_many",
    "sample_outputs",
]


def held_out(data: DataConfig | Pictures, *, batch_size: int, limit: int, split: str = "test") -> Iterator[dict[str, np.ndarray]]:
    """Batches of the first `limit` examples of a split, in a fixed order; the last one may be smaller."""
    left = limit
    for batch in image_batches(data, batch_size, split, 0, 1, endless=False):
        take = min(left, len(batch["label"]))
        if take:
            yield {name: values[:take] for name, values in batch.items()}
        left -= take
        if not left:
            return


def measure_reconstruction(
    tokenizer,
    variables,
    data: DataConfig | Pictures,
    *,
    batch_size: int = 64,
    limit: int = 10_000,
    inception: tuple[Any, Any] | None = None,
    perceptual: dict[str, Any] | None = None,
) -> dict:
    """PSNR in dB, SSIM and, of tokenizers with a codebook, its use on held-out images; on request "rfid", "rsfid" and "lpips".

    Args:
      tokenizer: a module with methods `encode` and `decode`, and the field `vocab` where tokens are discrete.
      variables: its parameters.
      data: whose test split is encoded and decoded; of clips, whose frames count as channels of one image, PSNR and SSIM.
      inception: `(module, variables)` of `interop.inception.load`: "rfid" is the Frechet distance between the held-out images
        and their reconstructions, both as uint8, and "rsfid" the one of spatial features.
      perceptual: weights of `nn.perceptual.load_perceptual`, for the mean LPIPS.
    """

    @jax.jit
    def one(variables, images, perceptual):
        tokens = tokenizer.apply(variables, images, method="encode")
        output = tokenizer.apply(variables, tokens, method="decode")
        images, output = _as_images(images), _as_images(output)
        scores = {"psnr": metrics.psnr(images, output), "ssim": metrics.ssim(images, output)}
        if perceptual is not None:
            scores["lpips"] = lpips(perceptual, images, output)
        return scores, tokens, output

    discrete = hasattr(tokenizer, "vocab")
    parts, counts, stats = [], 0, [{}, {}]
    for batch in held_out(data, batch_size=batch_size, limit=limit):
        scores, tokens, output = one(variables, pixels(batch["image"]), perceptual)
        parts.append(jax.device_get(scores))
        if discrete:
            counts = counts + metrics.count_tokens(tokens, tokenizer.vocab)
        if inception is not None:
            stats = [_add(old, observe(*inception, images)) for old, images in zip(stats, (batch["image"], output))]
    result = {"images": sum(len(part["psnr"]) for part in parts)}
    result |= {name: float(np.concatenate([part[name] for part in parts]).mean()) for name in parts[0]}
    if inception is not None:
        for name, key in (("rfid", "pool"), ("rsfid", "spatial")):
            result[name] = metrics.frechet_distance(*(side[key] for side in stats))
    if discrete:
        result |= {"codebook_use": float(metrics.usage(counts)), "codebook_perplexity": float(metrics.perplexity(counts))}
    return result


def _as_images(pictures):
    """Images as they are, and of clips their frames behind one another."""
    return pictures if pictures.ndim == 4 else stacked(pictures)


def _add(stats: dict[str, metrics.FeatureStats], observed: dict[str, jax.Array]) -> dict[str, metrics.FeatureStats]:
    """With the features of one more batch."""
    new = {name: metrics.FeatureStats.of(observed[name]) for name in ("pool", "spatial")}
    return {name: stats[name].merge(x) if stats else x for name, x in new.items()}


def real_features(classifier, variables, data: DataConfig | Pictures, *, split: str, batch_size: int = 256, limit: int = 10_000):
    """(features [n, d], logits [n, v], labels [n]) of real images under a classifier."""
    parts = []
    for batch in held_out(data, batch_size=batch_size, limit=limit, split=split):
        parts.append((*read_images(classifier, variables, pixels(batch["image"])), batch["label"]))
    return tuple(np.concatenate(column) for column in zip(*parts))


def measure_samples(
    classifier,
    variables,
    images: np.ndarray,
    labels: np.ndarray,
    data: DataConfig | Pictures,
    *,
    batch_size: int = 256,
    limit: int = 10_000,
) -> dict:
    """How good samples are, in the eyes of a classifier of the real images.

    Args:
      classifier: a module with `__call__` -> logits and a method `features`.
      variables: its parameters.
      images: samples in [-1, 1], [n, H, W, C].
      labels: the classes that were asked for, [n].
      data: whose training split the samples should resemble; its test split gives the classifier's accuracy on real images,
        and the distance of real from real images that no model can be expected to beat.
    """
    real, _, _ = real_features(classifier, variables, data, split="train", limit=limit)
    test, logits, truth = real_features(classifier, variables, data, split="test", limit=limit)
    parts = [read_images(classifier, variables, images[i : i + batch_size]) for i in range(0, len(images), batch_size)]
    features, sampled_logits = (np.concatenate(column) for column in zip(*parts))
    stats = metrics.FeatureStats.of(real)
    precision, recall = metrics.precision_recall(real, features)
    real_accuracy = metrics.class_accuracy(logits, truth)
    accuracy = metrics.class_accuracy(sampled_logits, labels)
    return {
        "samples": len(images),
        "class_accuracy": accuracy,
        "class_accuracy_real": real_accuracy,
        "class_accuracy_ratio": accuracy / real_accuracy,
        "frechet": metrics.frechet_distance(stats, metrics.FeatureStats.of(features)),
        "frechet_real": metrics.frechet_distance(stats, metrics.FeatureStats.of(test)),
        "precision": precision,
        "recall": recall,
    }


def read_images(classifier, variables, images) -> tuple[np.ndarray, np.ndarray]:
    """(Features [n, d], logits [n, v]) of images in [-1, 1] under a classifier."""
    features, logits = _apply(classifier, variables, jnp.asarray(images))
    return np.asarray(features), np.asarray(logits)


@functools.partial(jax.jit, static_argnums=0)
def _apply(classifier, variables, images):
    return classifier.apply(variables, images, method="features"), classifier.apply(variables, images)


def sample_many(recipe, params: Mapping[str, Any], key, labels: np.ndarray, **options) -> np.ndarray:
    """Images [n, H, W, C], or clips [n, f, H, W, C], for many labels; arguments are those of `sample_outputs`."""
    return sample_outputs(recipe, params, key, labels, names=(recipe.shows,), **options)[recipe.shows]


def sample_outputs(
    recipe,
    params: Mapping[str, Any],
    key,
    labels: np.ndarray,
    *,
    names: Sequence[str],
    batch_size: int,
    mesh: Mesh | None = None,
    **settings,
) -> dict[str, np.ndarray]:
    """What a recipe's sampler makes for many labels, in compiled batches; the last one is padded so that nothing is recompiled.

    Args:
      recipe: of images or clips.
      params: by stage.
      key: of all samples.
      labels: of the samples, [n], or what `Recipe.prompts` made of captions, [n, ...].
      names: which of the sampler's outputs [b, ...] are wanted.
      batch_size: samples made at a time, over all processes.
      mesh: where `params` lie.
      settings: of the sampler.

    Raises:
      ValueError: batches of less than 1, no labels, or see the recipe's sampler.
    """
    if batch_size < 1 or not len(labels):
        raise ValueError(f"{len(labels)} labels in batches of {batch_size}: expected at least 1 of each")
    parts = []
    for i, start in enumerate(range(0, len(labels), batch_size)):
        chunk = np.asarray(labels[start : start + batch_size])
        padded = chunk[np.arange(batch_size) % len(chunk)]
        out = sample_batch(recipe, params, jax.random.fold_in(key, i), padded, mesh=mesh, **settings)
        parts.append({name: to_host(out[name])[: len(chunk)] for name in names})
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def evaluate_images(
    recipe, params, key, *, num: int, batch_size: int, settings: dict, mesh: Mesh | None = None
) -> tuple[dict, np.ndarray]:
    """Everything that can be measured of a trained recipe of images or clips, whose frames count as channels of one image.

    Args:
      recipe: of classes, with the stage "classifier" if samples are to be judged; its configuration has `data`,
        `num_classes`, `classifier` and `build_tokenizer()`.
      params: by stage.
      key: for the samples.
      num: samples, spread evenly over the classes.
      batch_size: of sampling.
      settings: of sampling.
      mesh: where `params` lie and samples are made; what is measured of them, each process measures by itself.

    Returns:
      ({"reconstruction": ..., "generation": ...}, the samples [num, ..., H, W, C] sorted by class).

    Raises:
      ValueError: fewer samples than classes.
    """
    config, variables = recipe.config, modules(params)
    classes = config.num_classes
    if num < classes:
        raise ValueError(f"num={num}: at least one sample for each of the {classes} classes")
    labels = np.sort(np.arange(num, dtype=np.int32) % classes)
    # First, since the sampler checks that the parameters fit.
    images = sample_many(recipe, params, key, labels, batch_size=min(batch_size, num), mesh=mesh, **settings)
    if mesh is not None:
        variables = to_host({name: tree for name, tree in variables.items() if name in ("tokenizer", "classifier")})
    # Patches of pixels have no parameters, and no stage.
    reconstruction = measure_reconstruction(config.build_tokenizer(), variables.get("tokenizer", {}), config.data)
    generation = {"settings": dict(settings)}
    if "classifier" in variables:
        classifier = Classifier(num_classes=classes, width=config.classifier.width)
        data = config.data if images.ndim == 4 else ClipPictures(config.data, apart=False)
        generation |= measure_samples(classifier, variables["classifier"], _as_images(images), labels, data)
    else:
        generation["note"] = "not judged: the recipe has no classifier (classifier.steps=0)"
    return {"reconstruction": reconstruction, "generation": generation}, images
