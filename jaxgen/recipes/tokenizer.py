"""Training a VQ autoencoder: reconstruction, perceptual and adversarial losses, and revival of dead codes.

The objective is VQGAN's (Esser et al. 2021, eq. 4 to 7): L_rec + L_perceptual + L_vq + lambda L_adversarial, with lambda
the ratio of the gradients' norms at the decoder's last convolution.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxgen.data import DataConfig, Pictures, image_batches, pixels
from jaxgen.metrics import psnr
from jaxgen.nn.discriminator import PatchDiscriminator
from jaxgen.nn.perceptual import NO_PERCEPTUAL, load_perceptual, lpips
from jaxgen.objectives.adversarial import adaptive_weight, hinge_discriminator, hinge_generator, warm
from jaxgen.optim import OptimConfig, adamw
from jaxgen.quantizers import CodebookState, revive
from jaxgen.recipe import Stage
from jaxgen.recipes.fields import check_fields
from jaxgen.resample import resize
from jaxgen.tokenizers import MultiScaleTokenizer

__all__ = ["TokenizerTrainConfig", "reviving", "tokenizer_stage"]


@dataclasses.dataclass(frozen=True)
class TokenizerTrainConfig:
    """How a tokenizer is trained.

    Attributes:
      steps: updates; 0 takes the tokenizer from the work directory as it is.
      batch_size: global.
      accumulate: micro-batches an update.
      ema: decay, 0 is off.
      l1_weight: of the mean absolute error.
      l2_weight: of the mean squared error.
      perceptual_weight: of the LPIPS distance; needs `perceptual_path`.
      perceptual_path: torchvision's VGG-16 weights file; empty is none, which is said when training starts.
      lpips_path: LPIPS' linear weights; empty weighs all VGG channels alike.
      adversarial_weight: 0 trains no discriminator.
      adversarial_start: update at which the adversarial loss sets in.
      discriminator_width: channels of its first layer.
      discriminator_layers: how often it halves the resolution.
      revive_every: updates between revivals of dead codes; 0 is never.
      revive_threshold: a code chosen less often than this share of the average is dead.
      optim: of the autoencoder and the discriminator.
    """

    steps: int = 1000
    batch_size: int = 256
    accumulate: int = 1
    ema: float = 0.0
    l1_weight: float = 1.0
    l2_weight: float = 1.0
    perceptual_weight: float = 1.0
    perceptual_path: str = ""
    lpips_path: str = ""
    adversarial_weight: float = 0.5
    adversarial_start: int = 0
    discriminator_width: int = 64
    discriminator_layers: int = 3
    revive_every: int = 100
    revive_threshold: float = 0.03
    optim: OptimConfig = OptimConfig()

    def __post_init__(self):
        weights = dict(l1_weight=0, l2_weight=0, perceptual_weight=0, adversarial_weight=0)
        counts = dict(steps=0, batch_size=1, accumulate=1, adversarial_start=0, revive_every=0, revive_threshold=0)
        check_fields("tokenizer_train", self, **weights, **counts, shares=("ema",))


def tokenizer_stage(
    config: TokenizerTrainConfig,
    data_config: DataConfig | Pictures,
    tokenizer: MultiScaleTokenizer,
    *,
    name: str = "tokenizer",
) -> Stage:
    """The stage that trains `tokenizer`; its parameters are `{"tokenizer": ..., "discriminator": ...}`."""
    adversarial = config.adversarial_weight > 0
    discriminator = PatchDiscriminator(width=config.discriminator_width, layers=config.discriminator_layers)
    candidates = max(tokenizer.vocab, 256)

    def init(key, frozen):
        keys = jax.random.split(key)
        images = jnp.zeros((1, *tokenizer.image_size, tokenizer.channels))
        params = {"tokenizer": tokenizer.init(keys[0], images)}
        if adversarial:
            params["discriminator"] = discriminator.init(keys[1], images)
        state = {"codebook": CodebookState.zeros(tokenizer.vocab, tokenizer.width, candidates)}
        if config.perceptual_path:
            state["perceptual"] = load_perceptual(config.perceptual_path, config.lpips_path or None)
        return params, state

    def reconstruction(state, images, output):
        """(loss, metrics) of pixels and features."""
        error = images - output
        l1, l2 = jnp.abs(error).mean(), jnp.square(error).mean()
        value, metrics = config.l1_weight * l1 + config.l2_weight * l2, {"l1": l1, "l2": l2}
        if config.perceptual_path:
            metrics["perceptual"] = lpips(state["perceptual"], images, output).mean()
            value = value + config.perceptual_weight * metrics["perceptual"]
        return value, metrics

    def adversary(params, state, images, out, step):
        """The generator's and the discriminator's losses, weighted."""
        fixed = jax.lax.stop_gradient({"hidden": out.hidden, **params})
        inner = fixed["tokenizer"]["params"]
        last = inner["decoder"]["conv_out"]

        def output(last):
            variables = {"params": inner | {"decoder": inner["decoder"] | {"conv_out": last}}}
            return tokenizer.apply(variables, fixed["hidden"], method="to_pixels")

        def fool(images):
            return hinge_generator(discriminator.apply(fixed["discriminator"], images))

        rec_grad = jax.grad(lambda w: reconstruction(state, images, output(w))[0])(last)["kernel"]
        adv_grad = jax.grad(lambda w: fool(output(w)))(last)["kernel"]
        weight = adaptive_weight(rec_grad, adv_grad)
        gate = config.adversarial_weight * warm(step, config.adversarial_start)
        generator = fool(out.images)
        real = discriminator.apply(params["discriminator"], images)
        fake = discriminator.apply(params["discriminator"], jax.lax.stop_gradient(out.images))
        critic = hinge_discriminator(real, fake)
        metrics = {"adversarial": generator, "discriminator": critic, "adaptive_weight": weight}
        return gate * weight * generator + warm(step, config.adversarial_start) * critic, metrics

    def loss(params, state, batch, key, step, frozen):
        images = pixels(batch["image"])
        dropout_key, codebook_key = jax.random.split(key)
        out = tokenizer.apply(params["tokenizer"], images, train=True, rngs={"dropout": dropout_key})
        value, metrics = reconstruction(state, images, out.images)
        for output in out.smaller:
            value += reconstruction(state, resize(images, output.shape[1:3], "area"), output)[0]
        quantized = out.quantized
        value = value / (1 + len(out.smaller)) + quantized.loss
        metrics |= {"vq": quantized.loss, "psnr": psnr(images, jnp.clip(out.images, -1, 1)).mean()}
        if adversarial:
            extra, more = adversary(params, state, images, out, step)
            value, metrics = value + extra, metrics | more
        codebook = state["codebook"].update(quantized.counts, quantized.vectors, codebook_key)
        metrics["codebook_use"] = (quantized.counts > 0).mean()
        return value, (metrics, state | {"codebook": codebook})

    def eval_loss(params, state, batch, key, frozen):
        images = pixels(batch["image"])
        out = tokenizer.apply(params["tokenizer"], images)
        value, metrics = reconstruction(state, images, out.images)
        return {"loss": value, **metrics, "psnr": psnr(images, jnp.clip(out.images, -1, 1)).mean()}

    missing = config.steps and config.perceptual_weight and not config.perceptual_path
    return Stage(
        name=name,
        steps=config.steps,
        init=init,
        loss=loss,
        optimizer=adamw(config.optim, config.steps) if config.steps else optax.identity(),
        data=functools.partial(image_batches, data_config, config.batch_size, "train"),
        after_update=reviving(config, tokenizer) if config.revive_every else None,
        eval_data=functools.partial(image_batches, data_config, config.batch_size, "test"),
        eval_loss=eval_loss,
        ema=config.ema,
        accumulate=config.accumulate,
        notes=(f"{NO_PERCEPTUAL} (tokenizer_train.perceptual_path and .lpips_path)",) if missing else (),
    )


def reviving(config, tokenizer) -> Callable:
    """A stage's `after_update` that moves dead codes of `tokenizer.quantizer` (see `revive`), by `state["codebook"]`.

    Args:
      config: with `steps`, `batch_size`, `accumulate`, `revive_every` and `revive_threshold`, see `TokenizerTrainConfig`.
      tokenizer: with `vocab` and an `order`.
    """
    share = config.revive_threshold * (config.batch_size // config.accumulate * tokenizer.order.length) / tokenizer.vocab

    def after_update(params, state, key, step):
        def restart(params, state):
            inner = params["tokenizer"]["params"]
            codes, codebook, _ = revive(inner["quantizer"]["codebook"], state["codebook"], key, threshold=share)
            inner = inner | {"quantizer": inner["quantizer"] | {"codebook": codes}}
            return params | {"tokenizer": {"params": inner}}, state | {"codebook": codebook}

        # Codes keep still in the last tenth, so that the decoder can settle on them.
        due = (step % config.revive_every == 0) & (step < 0.9 * config.steps)
        return jax.lax.cond(due, restart, lambda *args: args, params, state)

    return after_update
