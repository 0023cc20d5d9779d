import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.data import digits, pixels
from jaxgen.recipes.next_scale import param_shapes


@pytest.fixture(scope="module", autouse=True)
def all_compile_quickly(quick_compiles):
    """Nothing here is large, so that compiling takes longer than running: less optimisation makes the tests quicker."""


@pytest.fixture(scope="module")
def params(request, randomize):
    """By stage, random ones of all modules that the sampler of the test module's `CONFIG` has."""
    return {
        name: {name: jax.tree.map(jnp.asarray, randomize(shapes, seed=len(name)))}
        for name, shapes in param_shapes(request.module.CONFIG.build_sampler()).items()
    }


@pytest.fixture(scope="module")
def batch():
    """Eight digits and their labels."""
    source = digits("train")
    return {"image": jnp.asarray(source.images[:8]), "label": jnp.asarray(source.labels[:8])}


@pytest.fixture
def raster_recipe_agrees(randomize):
    """`check(config)`: a next-token recipe's loss is the likelihood of its tokens, its greedy samples what it predicts."""

    def check(config):
        recipe, tokenizer, generator = config.recipe(), config.build_tokenizer(), config.build_generator()
        stage, params = recipe.stage("generator"), {}
        abstract = jax.eval_shape(tokenizer.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
        params["tokenizer"] = {"tokenizer": jax.device_put(randomize(abstract))}
        abstract, _ = jax.eval_shape(stage.init, jax.random.key(0), params)
        params["generator"] = jax.device_put(randomize(abstract, seed=1))
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
        last = generator.order.sizes[-1]
        assert metrics["nll_last_step"] == pytest.approx(nll[:, -last:].mean(), rel=1e-4)

        # Greedy samples are fixed points of the model's own predictions.
        made = recipe.sample(params, jax.random.key(0), np.asarray(batch["label"]), cfg=0.0, top_k=1)
        assert made["images"].shape == (8, 8, 8, 1)
        again = jax.jit(generator.apply)(params["generator"]["generator"], batch["label"], made["tokens"])
        np.testing.assert_array_equal(np.asarray(again).argmax(-1), made["tokens"])

    return check
