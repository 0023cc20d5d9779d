"""The baseline of S047: the same recipe with the tokens of one grid, one after another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import config as config_lib
from jaxgen.data import DataConfig, digits, pixels
from jaxgen.recipes.next_scale import ModelConfig, ModelTrainConfig, TokenizerConfig
from jaxgen.recipes.next_token import NextTokenConfig

CONFIG = NextTokenConfig(
    data=DataConfig(path="digits", channels=1),
    tokenizer=TokenizerConfig(
        ch=8, ch_mult=(1, 2), res_blocks=1, attention=False, groups=8, vocab=16, width=4, patch_nums=(4,), phis=1
    ),
    model=ModelConfig(depth=1, width=16, heads=2, num_classes=10),
    model_train=ModelTrainConfig(steps=4, batch_size=8, class_drop=0.0),
)


def test_one_scale_and_no_shared_modulation():
    with pytest.raises(ValueError, match=r"tokenizer.patch_nums=\(1, 4\): next-token models take one scale"):
        config_lib.override(CONFIG, ["tokenizer.patch_nums=1,4"])
    with pytest.raises(ValueError, match="model.shared_adaln=True"):
        config_lib.override(CONFIG, ["model.shared_adaln=true"])
    assert config_lib.from_json(config_lib.to_json(CONFIG)) == CONFIG


@pytest.mark.numeric
def test_stage_and_sampler_work_on_raster_tokens(randomize):
    recipe, tokenizer, generator = CONFIG.recipe(), CONFIG.build_tokenizer(), CONFIG.build_generator()
    assert generator.order.steps == generator.order.length == 16
    stage = recipe.stage("generator")
    abstract = jax.eval_shape(tokenizer.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    params = {"tokenizer": {"tokenizer": jax.tree.map(jnp.asarray, randomize(abstract))}}
    abstract, _ = jax.eval_shape(stage.init, jax.random.key(0), params)
    params["generator"] = jax.tree.map(jnp.asarray, randomize(abstract, seed=1))
    source = digits("train")
    batch = {"image": jnp.asarray(source.images[:8]), "label": jnp.asarray(source.labels[:8])}

    value, (metrics, _) = jax.jit(stage.loss)(params["generator"], (), batch, jax.random.key(0), 0, params)

    @jax.jit
    def by_hand():
        tokens = tokenizer.apply(params["tokenizer"]["tokenizer"], pixels(batch["image"]), method="encode")
        return tokens, generator.apply(params["generator"]["generator"], batch["label"], tokens)

    tokens, logits = by_hand()
    probs = np.exp(np.asarray(logits, np.float64))
    probs /= probs.sum(-1, keepdims=True)
    nll = -np.log(np.take_along_axis(probs, np.asarray(tokens)[..., None], -1))
    assert value == pytest.approx(nll.mean(), rel=1e-4)
    assert metrics["nll_last_step"] == pytest.approx(nll[:, -1].mean(), rel=1e-4)

    # Greedy samples are fixed points of the model's own predictions.
    made = recipe.sample(params, jax.random.key(0), np.asarray(batch["label"]), cfg=0.0, top_k=1)
    assert made["images"].shape == (8, 8, 8, 1)
    again = jax.jit(generator.apply)(params["generator"]["generator"], batch["label"], made["tokens"])
    np.testing.assert_array_equal(np.asarray(again).argmax(-1), made["tokens"])
