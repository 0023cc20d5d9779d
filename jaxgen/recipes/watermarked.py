"""Marked images: next-token systems whose samples carry a watermark (S013 LBW, S074 IndexMark), and their detectors."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgen.data import image_batches, pixels
from jaxgen.decoding import check_settings, truncate
from jaxgen.decoding.watermark import decoy_p_value, detect, green_counts, histogram
from jaxgen.decoding.watermark_bias import LexicalBias, green_lists
from jaxgen.decoding.watermark_index import green_of_pairs, pair_codes, place_crop, replace_red
from jaxgen.hosts import to_host
from jaxgen.objectives.likelihood import cross_entropy
from jaxgen.optim import OptimConfig, adamw
from jaxgen.quantizers.vector import nearest
from jaxgen.recipe import Recipe, Stage, modules
from jaxgen.recipes.fields import check_fields
from jaxgen.recipes.speculative_images import SpeculativeImageConfig, codebook_of

__all__ = [
    "Found",
    "IndexConfig",
    "IndexEncoderConfig",
    "IndexMarkConfig",
    "LexicalConfig",
    "LexicalMarkConfig",
    "index_encoder_stage",
    "index_variables",
]

# Squared distance at which a code is e times less likely than one that is met, for `IndexEncoderConfig.code_weight`.
WIDTH = 0.1

# Keys that come from one secret: the lists, and those that are never used.
LISTS, DECOYS = 0, 1

# The choice of a list, from the key of a sampling call; beside the streams of `jaxgen.decoding.noise`.
CHOICE = 7


@dataclasses.dataclass(frozen=True)
class LexicalMarkConfig:
    """The watermark of S013.

    Attributes:
      pool: green lists; each image gets one of them.
      gamma: share of the codes that are green.
      delta: nats by which they gain.
      hard: only green codes are drawn; `delta` does not matter then.
      positional: an own list for every place. The binomial law is then exact, and a crop loses its place.
      secret: seed of the lists.
    """

    pool: int = 8
    gamma: float = 0.5
    delta: float = 4.0
    hard: bool = False
    positional: bool = False
    secret: int = 0

    def __post_init__(self):
        check_fields("mark", self, pool=1, delta=0, secret=0, shares=("gamma",))


class Found(NamedTuple):
    """What a detector says of b images.

    Attributes:
      p_value: by decoys, see `decoy_p_value`: a false-positive rate that holds.
      binomial: as published, by the binomial law; too small where codes repeat.
      green: share of the tokens that are green, under the list or at the place where it is largest.
      index: of the list that fits best; 0 where there is one only.
    """

    p_value: Float[Array, "b"]
    binomial: Float[Array, "b"]
    green: Float[Array, "b"]
    index: Int[Array, "b"]


def _secret_key(secret: int, use: int) -> Key[Array, ""]:
    return jax.random.fold_in(jax.random.key(secret), use)


@dataclasses.dataclass(frozen=True)
class LexicalConfig(SpeculativeImageConfig):
    """`SpeculativeImageConfig` whose sampler prefers the codes of a secret list."""

    mark: LexicalMarkConfig = LexicalMarkConfig()

    def lists(self, key=None) -> Bool[Array, "p n v"]:
        """The pool; or, with a key, another one like it."""
        positions = self.build_tokenizer().order.length if self.mark.positional else 1
        key = _secret_key(self.mark.secret, LISTS) if key is None else key
        return green_lists(key, pool=self.mark.pool, vocab=self.tokenizer.vocab, gamma=self.mark.gamma, positions=positions)

    def build_mark(self, key) -> LexicalBias:
        """The transform of one call of the sampler, whose key is `key`."""
        delta = jnp.inf if self.mark.hard else self.mark.delta
        return LexicalBias(self.lists(), jax.random.fold_in(key, CHOICE), jnp.float32(delta))

    def recipe(self) -> Recipe:
        """The stages and the sampler."""
        base = super().recipe()

        def sample(params, key, labels, *, marked: bool = True, **settings) -> dict:
            return base.sample(params, key, labels, mark=self.build_mark(key) if marked else None, **settings)

        return dataclasses.replace(base, sample=sample)

    def find(self, params: Mapping[str, Any], images: Float[Array, "b H W C"], *, decoys: int = 999) -> Found:
        """Looks for the mark in images in [-1, 1]; their tokens are read back by the tokenizer.

        Args:
          params: by stage.
          images: suspected.
          decoys: see `decoy_p_value`.
        """
        return self.find_in_tokens(
            _read(self.build_tokenizer(), modules(params)["tokenizer"], jnp.asarray(images)), decoys=decoys
        )

    def find_in_tokens(self, tokens: Int[Array, "b l"], *, decoys: int = 999) -> Found:
        """Looks for the mark in tokens; in those that were sampled it is as clear as it can be."""
        # How strong the mark was does not matter here, and shall not compile anything anew.
        mark = dataclasses.replace(self.mark, delta=0.0, hard=False)
        return _find_lexical(dataclasses.replace(self, mark=mark), jnp.asarray(tokens), decoys)


@functools.partial(jax.jit, static_argnums=0)
def _read(tokenizer, variables, images):
    return tokenizer.apply(variables, images, method="encode")


@functools.partial(jax.jit, static_argnums=(0, 2))
def _find_lexical(config: LexicalConfig, tokens, decoys: int) -> Found:
    lists = config.lists()
    occurrences = histogram(tokens, vocab=lists.shape[-1], positions=lists.shape[-2])
    p_value = decoy_p_value(
        _secret_key(config.mark.secret, DECOYS),
        lambda lists: green_counts(occurrences, lists).max(axis=-1),
        config.lists,
        lists,
        decoys=decoys,
    )
    found = detect(tokens, lists)
    return Found(p_value, found.p_value, found.green / found.count, found.index)


@dataclasses.dataclass(frozen=True)
class IndexMarkConfig:
    """The watermark of S074.

    Attributes:
      share: of the positions of an image, those with the lowest confidence ratio, that may change.
      secret: seed of the green codes.
      margin: cells at the edge of a crop that the detector skips.
    """

    share: float = 1.0
    secret: int = 0
    margin: int = 1

    def __post_init__(self):
        check_fields("mark", self, secret=0, margin=0, shares=("share",))


@dataclasses.dataclass(frozen=True)
class IndexEncoderConfig:
    """How the index encoder is trained: the tokenizer's encoder goes on, on pictures that the decoder made.

    Attributes:
      steps: updates; 0 takes it from the work directory as it is.
      batch_size: global.
      pixel_weight: of the error of the picture decoded again.
      code_weight: of the cross-entropy of the codes, which the authors do not have, 0. A small encoder that is not sure needs it:
        the mean of two codes, best in squares, may be nearest to a third.
      swap: share of the tokens that are replaced by one of `neighbours` near codes before they are decoded, as a mark does;
        the authors train on plain reconstructions, 0.
      neighbours: see `swap`.
      optim: Adam and its schedule.
    """

    steps: int = 1000
    batch_size: int = 64
    pixel_weight: float = 0.5
    code_weight: float = 0.0
    swap: float = 0.0
    neighbours: int = 4
    optim: OptimConfig = OptimConfig(lr=1e-3, warmup_steps=50, schedule="cosine", lr_end=0.05, weight_decay=0.0, clip=1.0)

    def __post_init__(self):
        sizes = dict(steps=0, batch_size=1, pixel_weight=0, code_weight=0, neighbours=1)
        check_fields("index_train", self, **sizes, shares=("swap",))


@dataclasses.dataclass(frozen=True)
class IndexConfig(SpeculativeImageConfig):
    """`SpeculativeImageConfig` whose samples have red codes replaced by green ones, and a stage "index_encoder" that reads
    codes back from pictures."""

    mark: IndexMarkConfig = IndexMarkConfig()
    index_train: IndexEncoderConfig = IndexEncoderConfig()

    def pairs(self, params: Mapping[str, Any]) -> Int[np.ndarray, "v"]:
        """Each code's partner; see `pair_codes`."""
        codebook = codebook_of(self.build_tokenizer(), modules(params)["tokenizer"])
        return pair_codes(to_host(codebook), cosine=self.tokenizer.cosine)

    def green(self, partner: Int[Array, "v"]) -> Bool[Array, "v"]:
        """The secret."""
        return green_of_pairs(_secret_key(self.mark.secret, LISTS), jnp.asarray(partner))

    def recipe(self) -> Recipe:
        """The stages and the sampler."""
        base = super().recipe()
        return dataclasses.replace(base, stages=(*base.stages, index_encoder_stage(self)), sample=_Replacing(self, base.sample))

    def find(
        self,
        params: Mapping[str, Any],
        images: Float[Array, "b y x C"],
        *,
        decoys: int = 999,
        index_encoder: bool = True,
        partner: Int[np.ndarray, "v"] | None = None,
    ) -> Found:
        """Looks for the mark in images in [-1, 1], whole or cropped: all places of a crop are tried.

        Args:
          params: by stage.
          images: suspected.
          decoys: see `decoy_p_value`.
          index_encoder: read the codes with it; else with the tokenizer's own encoder.
          partner: of `pairs`, where they are known.
        """
        partner = self.pairs(params) if partner is None else partner
        variables = modules(params)
        encoder = index_variables(variables) if index_encoder else variables["tokenizer"]
        return _find_index(self, encoder, jnp.asarray(partner), images, decoys)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _find_index(config: IndexConfig, variables, partner, images, decoys: int) -> Found:
    tokenizer = config.build_tokenizer()
    factor = tokenizer.image_size[0] // tokenizer.order.shapes[-1][0]
    crops = place_crop(images, size=tokenizer.image_size, factor=factor, margin=config.mark.margin)
    b, o = crops.images.shape[:2]
    tokens = tokenizer.apply(variables, crops.images.reshape(b * o, *crops.images.shape[2:]), method="encode").reshape(b, o, -1)
    occurrences = histogram(tokens, vocab=tokenizer.vocab, counted=crops.inside)
    count = occurrences.sum((-2, -1))

    def rates(green):
        return green_counts(occurrences, green[None, None])[..., 0] / count

    # The same share says more of more cells: places are compared by their z.
    def statistic(green):
        return ((rates(green) - 0.5) * 2 * jnp.sqrt(count)).max(axis=-1)

    secret = config.green(partner)
    key = _secret_key(config.mark.secret, DECOYS)
    p_value = decoy_p_value(key, statistic, lambda key: green_of_pairs(key, partner), secret, decoys=decoys)
    found = detect(tokens.reshape(b * o, -1), secret[None, None], counted=jnp.tile(crops.inside, (b, 1)))
    binomial = jnp.minimum(1.0, o * found.p_value.reshape(b, o).min(axis=-1))
    return Found(p_value, binomial, rates(secret).max(axis=-1), jnp.zeros(b, jnp.int32))


@dataclasses.dataclass(frozen=True, eq=False)
class _Replacing:
    """A recipe's sampler, then the replacement; the pairs are made once for a codebook."""

    config: IndexConfig
    plain: Any
    _last: list = dataclasses.field(default_factory=list, repr=False)

    def __call__(self, params: Mapping[str, Any], key, labels, *, marked: bool = True, share=None, **settings) -> dict:
        """As without a watermark, with "images" and "tokens" changed; the sampled ones are "plain_images", "plain_tokens".

        Raises:
          ValueError: a share that is not in [0, 1].
        """
        made = self.plain(params, key, labels, **settings)
        if not marked:
            return made
        share = self.config.mark.share if share is None else share
        if not 0 <= share <= 1:
            raise ValueError(f"share={share}: must be in [0, 1]")
        check_settings(**settings, vocab=self.config.tokenizer.vocab)
        variables = modules(params)
        if not self._last or self._last[0] is not variables["tokenizer"]:
            self._last[:] = [variables["tokenizer"], jnp.asarray(self.config.pairs(params))]
        options = {"cfg": 0.0, "temperature": 1.0, "top_k": 0, "top_p": 0.0} | settings
        options = {name: jnp.float32(value) for name, value in options.items()}
        tokens, images = _replace(self.config, variables, made["tokens"], jnp.asarray(labels), self._last[1], share, options)
        return made | {"plain_tokens": made["tokens"], "plain_images": made["images"], "tokens": tokens, "images": images}


@functools.partial(jax.jit, static_argnums=0)
def _replace(config: IndexConfig, variables, tokens, labels, partner, share, options) -> tuple[Any, Any]:
    """(tokens, images) after the replacement, by the laws that the tokens were drawn from, read in one pass."""
    generator, options = config.build_generator(), dict(options)
    t = options.pop("cfg")
    both = jnp.concatenate([labels, jnp.full_like(labels, generator.num_classes)])
    conditional, unconditional = jnp.split(generator.apply(variables["generator"], both, jnp.concatenate([tokens, tokens])), 2)
    log_p = jax.nn.log_softmax(truncate((1 + t) * conditional - t * unconditional, **options), axis=-1)
    marked = replace_red(tokens, log_p, partner, config.green(partner), share)
    return marked, config.build_tokenizer().apply(variables["tokenizer"], marked, method="decode")


def index_variables(variables: Mapping[str, Any]) -> dict:
    """The tokenizer's variables with the index encoder in the place of its encoder, from variables by module."""
    return {"params": variables["tokenizer"]["params"] | variables["index_encoder"]["params"]}


def index_encoder_stage(config: IndexConfig) -> Stage:
    """The stage that makes the tokenizer's encoder read the codes of pictures that its decoder made (section 3.4).

    With h the features of the new encoder, e the codes of a picture and D the decoder, the loss is
    |h(D(e)) - e|^2 + w |D(e) - D(q(h(D(e))))|^2, q the nearest code with a straight-through gradient; with `code_weight` also
    the cross-entropy of e under softmax(-|h - codes|^2 / WIDTH). The stage's parameters are
    `{"index_encoder": {"params": {"encoder": ...}}}`.
    """
    train, tokenizer = config.index_train, config.build_tokenizer()

    def init(key, frozen):
        encoder = modules(frozen)["tokenizer"]["params"]["encoder"]
        return {"index_encoder": {"params": {"encoder": jax.tree.map(jnp.asarray, encoder)}}}, ()

    def swapped(key, tokens, codebook):
        """Tokens of which a share became one of their nearest codes."""
        distance = jnp.square(codebook[:, None] - codebook).sum(-1).at[jnp.diag_indices(len(codebook))].set(jnp.inf)
        near = jax.lax.top_k(-distance, min(train.neighbours, len(codebook) - 1))[1]
        which, whether = jax.random.split(key)
        other = near[tokens, jax.random.randint(which, tokens.shape, 0, near.shape[1])]
        return jnp.where(jax.random.bernoulli(whether, train.swap, tokens.shape), other, tokens)

    def measure(params, images, key, frozen):
        fixed = modules(frozen)["tokenizer"]
        codebook = codebook_of(tokenizer, fixed)
        tokens = tokenizer.apply(fixed, pixels(images), method="encode")
        if train.swap:
            tokens = swapped(key, tokens, codebook)
        pictures = jax.lax.stop_gradient(tokenizer.apply(fixed, tokens, method="decode"))
        target = codebook[tokens]
        h = tokenizer.apply(index_variables({"tokenizer": fixed} | params), pictures, method="features")
        h = h.reshape(target.shape)
        read = nearest(h, codebook, cosine=config.tokenizer.cosine)
        straight = h + jax.lax.stop_gradient(codebook[read] - h)
        again = tokenizer.apply(fixed, straight.reshape(-1, *tokenizer.order.shapes[-1], h.shape[-1]), method="decode_features")
        latent, picture = jnp.square(h - target).mean(), jnp.square(again - pictures).mean()
        metrics = {"latent": latent, "picture": picture, "index_accuracy": (read == tokens).mean()}
        value = latent + train.pixel_weight * picture
        if train.code_weight:
            distance = jnp.square(h[..., None, :] - codebook).sum(-1)
            metrics["codes"] = cross_entropy(-distance / WIDTH, tokens).mean()
            value += train.code_weight * metrics["codes"]
        return value, metrics

    def loss(params, state, batch, key, step, frozen):
        value, metrics = measure(params, batch["image"], key, frozen)
        return value, (metrics, state)

    def eval_loss(params, state, batch, key, frozen):
        value, metrics = measure(params, batch["image"], key, frozen)
        return {"loss": value, **metrics}

    return Stage(
        name="index_encoder",
        steps=train.steps,
        init=init,
        loss=loss,
        optimizer=adamw(train.optim, train.steps) if train.steps else optax.identity(),
        data=functools.partial(image_batches, config.data, train.batch_size, "train"),
        needs=("tokenizer",),
        eval_data=functools.partial(image_batches, config.data, train.batch_size, "test"),
        eval_loss=eval_loss,
    )
