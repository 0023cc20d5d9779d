import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """Nothing here is large, so that compiling takes longer than running: less optimisation makes the tests quicker."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
