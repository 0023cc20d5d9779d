"""What all tests share: a CPU, a compilation cache, tiny models whose every weight is random, and the reference data."""

import gc
import os
import types
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Threads of the CPU client: kernels in an interpreter wait for one another, and with as few as two of them for ever.
os.environ.setdefault("NPROC", "8")

import jax
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")

if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    jax.config.update("jax_compilation_cache_dir", str(CACHE / "jaxgen" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)


def random_params(shapes, seed: int = 0):
    """A parameter tree in which nothing is zero, so that no term can hide: initialisers leave biases, gates and heads at 0.

    Kernels keep the scale of their input; codebooks have unit scale, norms' weights are near 1.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        x = rng.standard_normal(leaf.shape)
        if name == "kernel":
            fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) < 5 else np.prod(leaf.shape[:3])
            x *= max(fan_in, 1) ** -0.5
        elif name == "scale":
            x = 1 + 0.2 * x
        elif name == "log_scale":
            x = 1 + 0.5 * x
        elif name != "codebook":
            x *= 0.3
        return x.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="session")
def randomize():
    """`random_params`."""
    return random_params


@pytest.fixture(scope="session")
def tiny():
    """A generator and a tokenizer for 6x6 images in 3 scales (14 tokens), with random parameters for both."""
    from jaxgen.generators import NextScaleSampler, NextScaleTransformer
    from jaxgen.tokenizers import MultiScaleTokenizer

    tokenizer = MultiScaleTokenizer(
        ch=8, ch_mult=(1, 2), res_blocks=1, attention=False, groups=4, vocab=16, width=6, patch_nums=(1, 2, 3), phis=2
    )
    generator = NextScaleTransformer(vocab=16, num_classes=3, patch_nums=(1, 2, 3), width=32, heads=2, depth=2, scan_layers=True)
    image = jax.ShapeDtypeStruct((1, 6, 6, 3), np.float32)
    params = {
        "tokenizer": random_params(jax.eval_shape(tokenizer.init, jax.random.key(0), image), seed=1),
        "generator": random_params(generator.param_shapes(tokenizer.width), seed=2),
    }
    params = jax.device_put(params)
    # Features as long as the codes, so that many codes occur.
    params["tokenizer"]["params"]["quant_conv"]["kernel"] *= 4
    # Logits with a standard deviation of about 1.5: neither uniform nor decided.
    params["generator"]["params"]["head"]["head"]["kernel"] *= 1.5
    return types.SimpleNamespace(
        tokenizer=tokenizer,
        generator=generator,
        params=params,
        sampler=NextScaleSampler(generator=generator, tokenizer=tokenizer),
        images=np.random.default_rng(3).uniform(-1, 1, (4, 6, 6, 3)).astype(np.float32),
        labels=np.array([0, 2, 1, 3], np.int32),
    )


@pytest.fixture(scope="session")
def shared():
    """The folder of reference checkpoints and data beside the repository."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"{path}: no reference data")
    return path


@pytest.fixture(scope="session")
def compile_cache():
    """Variables of the environment by which a process that a test starts keeps its programs where this one does."""
    folder = jax.config.jax_compilation_cache_dir
    least = str(jax.config.jax_persistent_cache_min_compile_time_secs)
    return {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": least} if folder else {}


@pytest.fixture(scope="module", autouse=True)
def few_mappings():
    """Compiled functions map memory, of which Linux lets a process have 65,530 pieces: those of earlier modules go in time."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def quick_compiles():
    """For modules that run nothing large: compiling takes longer than running, and less optimisation makes it quicker."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
