"""Both kernels lower for their devices without one, and read four bits a weight."""

import jax
import jax.numpy as jnp
import pytest
from jax.export import DisabledSafetyCheck

from kernels_pallas import explain, target
from kernels_pallas.int4 import int4_matmul, pack_int4

pytestmark = pytest.mark.numeric
CHECKS = [DisabledSafetyCheck.custom_call(name) for name in ("mosaic_gpu_v2", "mosaic_gpu")]


@pytest.mark.parametrize("kind, platform, call", [("v5e", "tpu", "tpu_custom_call"), ("h100", "cuda", "mosaic_gpu")])
@pytest.mark.parametrize("m, k, n, group, dtype", [(16, 1024, 8192, 128, "bfloat16"), (300, 1920, 130, 128, "float32")])
def test_lowering(kind, platform, call, m, k, n, group, dtype):
    x = jax.ShapeDtypeStruct((m, k), dtype)
    with target(kind):
        w = jax.eval_shape(lambda w: pack_int4(w, group), jax.ShapeDtypeStruct((k, n), jnp.float32))
        assert explain(int4_matmul, x, w)[0].implementation == ("tpu" if platform == "tpu" else "hopper")
        fn = jax.jit(lambda x, w: jax.vjp(lambda x: int4_matmul(x, w), x)[1](jnp.ones((m, n), dtype)))
        text = jax.export.export(jax.jit(int4_matmul), platforms=[platform], disabled_checks=CHECKS)(x, w).mlir_module()
        gradient = jax.export.export(fn, platforms=[platform], disabled_checks=CHECKS)(x, w)
    assert call in text and gradient.out_avals[0].shape == (m, k)
    assert w.words.size * 4 == k * (n if platform == "tpu" else -(-n // 64) * 64) // 2
