"""From key and labels to images in one compiled function: the next-scale generator and its tokenizer together."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgen.decoding import Known, Settings, check_settings, ramped, sample_scales
from jaxgen.generators.next_scale import NextScaleTransformer
from jaxgen.hosts import to_host
from jaxgen.orders import Order
from jaxgen.resample import resize
from jaxgen.tokenizers.multi_scale import MultiScaleTokenizer

__all__ = ["NextScaleSampler", "box_mask", "check_labels", "keep_tokens"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextScaleSampler:
    """Samples images scale by scale.

    Attributes:
      generator: predicts the tokens.
      tokenizer: turns them into pictures.
      smooth: see `sample_scales`.

    Example:
      >>> sampler = NextScaleSampler(generator=generator, tokenizer=tokenizer)
      >>> images, tokens = sampler(params, jax.random.key(0), jnp.array([0, 1, 2]), Settings(cfg=2.0, top_p=0.96))
    """

    generator: NextScaleTransformer
    tokenizer: MultiScaleTokenizer
    smooth: bool = False

    def __post_init__(self):
        ours, theirs = self.generator, self.tokenizer
        if tuple(ours.patch_nums) != tuple(theirs.patch_nums) or ours.vocab != theirs.vocab:
            raise ValueError(
                f"generator (patch_nums={ours.patch_nums}, vocab={ours.vocab}) does not fit "
                f"tokenizer (patch_nums={theirs.patch_nums}, vocab={theirs.vocab})"
            )

    def param_shapes(self) -> dict:
        """Shapes of the variables by module; nothing is computed."""
        tokenizer = self.tokenizer
        image = jax.ShapeDtypeStruct((1, *tokenizer.image_size, tokenizer.channels), jnp.float32)
        return {
            "tokenizer": jax.eval_shape(tokenizer.init, jax.random.key(0), image),
            "generator": self.generator.param_shapes(tokenizer.width),
        }

    def __call__(
        self,
        params: dict,
        key: Key[Array, ""],
        labels: Int[Array, "b"],
        settings: Settings = Settings(),
        known: Known | None = None,
    ) -> tuple[Float[Array, "b H W C"], Int[Array, "b l"]]:
        """Samples one image a label.

        Args:
          params: `{"generator": ..., "tokenizer": ...}`.
          key: the i-th image depends on the key, i, its label and the settings, not on the rest of the batch.
          labels: class ids; `num_classes` is unconditional.
          settings: traced, so changing them compiles nothing.
          known: tokens to force, see `keep_tokens`.

        Returns:
          (images in [-1, 1], tokens).

        Raises:
          ValueError: labels or settings out of range, or known tokens of another shape than [b, l].
        """
        labels, settings = self._checked(labels, settings, known)
        return self._sample(params, key, labels, settings, known)

    def _checked(self, labels, settings: Settings, known: Known | None):
        """(labels, settings) as arrays; raises as a call does."""
        labels = check_labels(labels, self.generator.num_classes)
        check_settings(**settings._asdict(), vocab=self.generator.vocab)
        want = (labels.shape[0], self.generator.order.length)
        if known is not None and not known.tokens.shape == known.keep.shape == want:
            raise ValueError(f"known tokens {known.tokens.shape} and keep {known.keep.shape}: expected {want}")
        return labels, Settings(*map(jnp.float32, settings))

    @functools.partial(jax.jit, static_argnums=0)
    def _sample(self, params, key, labels, settings, known):
        tokens, picture = self._scales(params, key, labels, settings, known)
        return self.tokenizer.apply(params["tokenizer"], picture, method="decode_features"), tokens

    def _scales(self, params, key, labels, settings, known, sample=sample_scales):
        b = labels.shape[0]
        unconditional = jnp.full_like(labels, self.generator.num_classes)

        def step(params, cache, view, cond):
            return self.generator.apply(params["generator"], cache, view, cond, method="step")

        def feed(params, picture, scale, tokens):
            return self.tokenizer.apply(params["tokenizer"], picture, scale, tokens, method="feed")

        order = self.generator.order
        width = self.tokenizer.width
        return sample(
            step,
            feed,
            order,
            params=params,
            cache=self.generator.init_cache(2 * b),
            cond=jnp.concatenate([labels, unconditional]),
            carry=jnp.zeros((b, *order.shapes[-1], width)),
            inputs=jnp.zeros((b, order.sizes[0], width)),
            key=key,
            settings=settings,
            known=known,
            smooth=self.smooth,
            schedule=self.schedule,
            revise=self.revise(params, labels, settings),
        )

    def revise(self, params, labels, settings):
        """What may change the tokens of a scale before they are fed, see `sample_scales`; None is nothing."""
        return None

    def schedule(self, settings: Settings, scale: int, order: Order) -> Settings:
        """The settings of one scale, see `sample_scales`; systems with another guidance override it."""
        return ramped(settings, scale, order)


def check_labels(labels, num_classes: int) -> Int[Array, "b"]:
    """`labels` as int32 [b].

    Raises:
      ValueError: a rank other than 1, a type other than integer, or concrete values outside 0..num_classes.
    """
    if not isinstance(labels, jax.Array):
        labels = np.asarray(labels)
    if labels.ndim != 1 or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integers [b]; got {labels.dtype} {labels.shape}")
    if not isinstance(labels, jax.core.Tracer):
        values = to_host(labels)
        bad = values[(values < 0) | (values > num_classes)]
        if bad.size:
            raise ValueError(f"label {bad[0]} is out of range 0..{num_classes} ({num_classes} = unconditional)")
    return jnp.asarray(labels, jnp.int32)


@functools.partial(jax.jit, static_argnames=("order", "batch"))
def keep_tokens(order: Order, mask: Bool[Array, "*b h w"], *, batch: int) -> Bool[Array, "b l"]:
    """Which tokens to keep when the pixels or cells of `mask` are to stay as they are.

    The mask is resampled bilinearly to each scale and thresholded at 1/2; scales of at most three cells are kept whole, since
    they hold the overall layout (as in the authors' editing demo).

    Args:
      order: the scales.
      mask: True where the picture stays, of any resolution, one for all rows or one a row.
      batch: b.
    """
    mask = jnp.broadcast_to(jnp.asarray(mask, jnp.float32), (batch, *np.shape(mask)[-2:]))[..., None]
    keep = []
    for h, w in order.shapes:
        cells = resize(mask, (h, w), "bilinear").reshape(batch, h * w) > 0.5
        keep.append(cells | (h * w <= 3))
    return jnp.concatenate(keep, axis=1)


def box_mask(box: tuple[float, float, float, float], *, outpaint: bool = False, size: int = 64) -> Bool[np.ndarray, "h w"]:
    """The mask for `keep_tokens` that frees a box, or with `outpaint` keeps just the box.

    Args:
      box: top, left, bottom, right as shares of the picture.
      size: resolution of the mask.

    Raises:
      ValueError: a box that is empty or reaches outside the picture.
    """
    top, left, bottom, right = box if len(box) == 4 else (0, 0, 0, 0)
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise ValueError(f"box={tuple(box)}: expected 0 <= top < bottom <= 1 and 0 <= left < right <= 1")
    inside = np.zeros((size, size), bool)
    inside[round(top * size) : round(bottom * size), round(left * size) : round(right * size)] = True
    return inside if outpaint else ~inside
