"""The baseline of S047: the same recipe with the tokens of one grid, one after another."""

import pytest

from jaxgen import config as config_lib
from jaxgen.data import DataConfig
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
def test_stage_and_sampler_work_on_raster_tokens(raster_recipe_agrees):
    generator = CONFIG.build_generator()
    assert generator.order.steps == generator.order.length == 16
    raster_recipe_agrees(CONFIG)
