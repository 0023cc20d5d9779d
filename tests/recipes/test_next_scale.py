"""The next-scale recipe: its configuration, its loss, its sampler, with random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import config as config_lib
from jaxgen.data import DataConfig, digits, pixels
from jaxgen.generators import box_mask
from jaxgen.recipes.fields import check_fields
from jaxgen.recipes.next_scale import (
    ClassifierConfig,
    ModelConfig,
    ModelTrainConfig,
    NextScaleConfig,
    TokenizerConfig,
    config_of,
)

CONFIG = NextScaleConfig(
    data=DataConfig(path="digits", channels=1),
    tokenizer=TokenizerConfig(
        ch=8, ch_mult=(1, 2), res_blocks=1, attention=False, groups=8, vocab=16, width=4, patch_nums=(1, 2, 4), phis=2
    ),
    model=ModelConfig(depth=2, width=16, heads=2, num_classes=10, scan_layers=True),
    model_train=ModelTrainConfig(steps=4, batch_size=8, class_drop=0.0),
)


def numpy_cross_entropy(logits, tokens, smoothing=0.0):
    logits = np.asarray(logits, np.float64)
    logp = logits - logits.max(-1, keepdims=True)
    logp = logp - np.log(np.exp(logp).sum(-1, keepdims=True))
    picked = np.take_along_axis(logp, np.asarray(tokens)[..., None], -1)[..., 0]
    return -((1 - smoothing) * picked + smoothing * logp.mean(-1))


@pytest.mark.numeric
def test_the_loss_is_the_likelihood_of_the_tokens(params, batch):
    """By hand: encode, feed the true tokens, take the mean negative log-probability."""
    tokenizer, generator = CONFIG.build_tokenizer(), CONFIG.build_generator()

    @jax.jit
    def by_hand(labels):
        variables = params["tokenizer"]["tokenizer"]
        tokens = tokenizer.apply(variables, pixels(batch["image"]), method="encode")
        features = tokenizer.apply(variables, tokens, method="inputs")
        return tokens, generator.apply(params["generator"]["generator"], labels, features)

    tokens, logits = by_hand(batch["label"])
    nll = numpy_cross_entropy(logits, tokens)
    frozen = {"tokenizer": params["tokenizer"]}

    def loss(config):
        stage = config.recipe().stage("generator")
        return jax.jit(stage.loss)(params["generator"], (), batch, jax.random.key(0), 0, frozen), stage

    (value, (metrics, state)), stage = loss(CONFIG)
    assert state == () and stage.needs == ("tokenizer",)
    assert value == pytest.approx(nll.mean(), rel=1e-4)
    assert metrics["nll"] == pytest.approx(nll.mean(), rel=1e-4)
    assert metrics["nll_last_step"] == pytest.approx(nll[:, 5:].mean(), rel=1e-4)
    assert metrics["token_accuracy"] == pytest.approx((np.asarray(logits).argmax(-1) == tokens).mean())

    train = dataclasses.replace(CONFIG.model_train, class_drop=1.0, label_smoothing=0.2)
    (value, (metrics, _)), _ = loss(dataclasses.replace(CONFIG, model_train=train))
    _, unconditional = by_hand(jnp.full_like(batch["label"], 10))
    assert metrics["nll"] == pytest.approx(numpy_cross_entropy(unconditional, tokens).mean(), rel=1e-4)
    assert value == pytest.approx(numpy_cross_entropy(unconditional, tokens, 0.2).mean(), rel=1e-4)
    assert abs(value - nll.mean()) > 1e-3


def test_sampling_with_the_parameters_of_all_stages(params):
    recipe = CONFIG.recipe()
    more = params | {"classifier": {"classifier": {"params": {"unused": jnp.zeros(3)}}}}
    labels, key = np.array([1, 10, 3], np.int32), jax.random.key(0)
    made = recipe.sample(more, key, labels, cfg=2.0, top_p=0.9)
    assert made["images"].shape == (3, 8, 8, 1) and made["tokens"].shape == (3, 21)
    assert made["tokens"].min() >= 0 and made["tokens"].max() < 16 and abs(made["images"]).max() <= 1
    with pytest.raises(ValueError, match="label 11 is out of range"):
        recipe.sample(params, key, np.array([11]))
    with pytest.raises(TypeError, match="colour"):
        recipe.sample(params, key, labels, colour=3)


def test_parameters_of_another_model_are_named(params):
    recipe, key = CONFIG.recipe(), jax.random.key(0)
    wide = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, width=32)).recipe()
    with pytest.raises(ValueError, match=r"generator: params/.* shape \(11, 16\) in the checkpoint and \(11, 32\) in the model"):
        wide.sample(params, key, np.array([1]))
    inner = dict(params["tokenizer"]["tokenizer"]["params"])
    del inner["quant_conv"]
    less = params | {"tokenizer": {"tokenizer": {"params": inner}}}
    with pytest.raises(ValueError, match="tokenizer: params/quant_conv/bias has shape none in the checkpoint"):
        recipe.sample(less, key, np.array([1]))


def test_editing_nothing_is_an_error(params):
    image = pixels(digits("test")[0]["image"])
    with pytest.raises(ValueError, match="smaller than a token: all 21 stay"):
        CONFIG.recipe().sample(params, jax.random.key(0), np.array([1]), image=image, keep=box_mask((0.4, 0.4, 0.45, 0.45)))


def test_what_only_the_data_can_tell():
    def resolved(*edits):
        return config_lib.override(CONFIG, edits).resolve()

    assert resolved() == CONFIG
    assert resolved("model.num_classes=0").model == CONFIG.model
    assert resolved("model.num_classes=11").model.num_classes == 11  # room for more is fine
    with pytest.raises(ValueError, match="model.num_classes=9: digits has 10 classes"):
        resolved("model.num_classes=9")
    with pytest.raises(ValueError, match=r"images of 8x8 \(data.path=digits.* take 6x6"):
        resolved("tokenizer.patch_nums=1,3")
    assert resolved("tokenizer.patch_nums=1,3", "data.image_size=6").data.image_size == 6
    with pytest.raises(ValueError, match="data.path='/no/such/place'"):
        resolved("data.path=/no/such/place")


def test_stages_follow_the_configuration():
    names = [stage.name for stage in CONFIG.recipe().stages]
    assert names == ["tokenizer", "generator"]
    judged = dataclasses.replace(CONFIG, classifier=ClassifierConfig(steps=3, width=8)).recipe()
    assert [stage.name for stage in judged.stages] == [*names, "classifier"] and judged.stages[2].steps == 3
    given = config_lib.override(CONFIG, ["tokenizer_train.steps=0", "model_train.steps=0"]).recipe()
    assert [stage.steps for stage in given.stages] == [0, 0]


def test_the_configuration_of_modules():
    """The way back: from a generator and a tokenizer to what builds them."""
    edits = ["data.image_size=8", "tokenizer.beta=0.3", "model.dtype=bfloat16", "tokenizer.cosine=true"]
    config = config_lib.override(CONFIG, edits)
    back = config_of(config.build_generator(), config.build_tokenizer())
    assert (back.data, back.tokenizer, back.model) == (config.data, config.tokenizer, config.model)
    assert back.build_sampler() == config.build_sampler()
    assert [stage.steps for stage in back.recipe().stages] == [0, 0] and back.recipe().stages[0].notes == ()
    assert config_lib.from_json(config_lib.to_json(back)) == back


def test_fields_are_checked():
    for cls, field, value in (
        (ModelConfig, "depth", 0),
        (ModelConfig, "drop_path_rate", -0.1),
        (ModelTrainConfig, "steps", -1),
        (ModelTrainConfig, "class_drop", 1.5),
        (TokenizerConfig, "patch_nums", ()),
        (TokenizerConfig, "ch_mult", (1, 0)),
        (TokenizerConfig, "phi_ratio", 2.0),
        (ClassifierConfig, "lr", -1.0),
    ):
        with pytest.raises(ValueError) as error:
            cls(**{field: value})
        assert f".{field}={value}: expected" in str(error.value)
    with pytest.raises(ValueError, match="model.dtype='int32': expected one of float32, bfloat16, float16"):
        config_lib.override(CONFIG, ["model.dtype=int32"]).recipe()
    nan = dataclasses.make_dataclass("C", [("x", float), ("y", float)])(float("nan"), float("nan"))
    for kwargs, message in (({"x": 0}, "c.x=nan: expected at least 0"), ({"shares": ("y",)}, r"c.y=nan: expected a share")):
        with pytest.raises(ValueError, match=message):
            check_fields("c", nan, **kwargs)
