"""Programs for devices that are not here: the whole op with its gradients, lowered for TPUs and NVIDIA GPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from kernels_pallas import BlockMask, target
from kernels_pallas.attention import block_sparse_attention

pytestmark = pytest.mark.numeric

# Platform, device, implementation, and what must be in the program.
CASES = [
    ("tpu", "v5e", "splash", "tpu_custom_call"),
    ("tpu", "v5e", "tpu", "tpu_custom_call"),
    ("tpu", "v5e", "split", "dot_general"),
    ("tpu", "v5e", "xla", "while"),
    ("cuda", "h100", "hopper", "mosaic_gpu"),
    ("cuda", "a100", "cudnn", "__cudnn$fmhaSoftmax"),
    ("cuda", "a100", "split", "dot_general"),
    ("cuda", "a100", "xla", "while"),
]
CALLS = ("mosaic_gpu", "mosaic_gpu_v2", "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")
BIASED = ("__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward")


def lowered(platform, kind, implementation, mask):
    """StableHLO of (o, lse) and the gradients of both."""

    def both(q, k, v, do, dlse):
        out, vjp = jax.vjp(lambda *x: block_sparse_attention(*x, mask, None, True, implementation), q, k, v)
        return *out, *vjp((do, dlse))

    (sq, sk), half = mask.shape, jnp.bfloat16
    q, k = (jax.ShapeDtypeStruct((2, n, h, 128), half) for n, h in ((sq, 4), (sk, 2)))
    lse = jax.ShapeDtypeStruct((2, sq, 4), jnp.float32)
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in (*CALLS, *BIASED)]
    with target(kind):
        return export.export(jax.jit(both), platforms=[platform], disabled_checks=checks)(q, k, k, q, lse).mlir_module()


@pytest.mark.parametrize(("platform", "kind", "implementation", "content"), CASES)
def test_lowers(checks, platform, kind, implementation, content):
    mask = BlockMask.build(checks.not_later, checks.scales(650), checks.scales(650))
    assert content in lowered(platform, kind, implementation, mask)


def test_cudnn_calls(checks):
    """A call forwards and one backwards for every piece of a mask that splits; a mask or causality where it does not."""
    split = BlockMask.build(checks.not_later, checks.scales(650), checks.scales(650))
    line = np.arange(128)[None]
    causal, window = (BlockMask.build(pred, line, line) for pred in (checks.not_later, checks.near))
    for mask, calls, kind in ((split, 5, "NO_MASK"), (causal, 1, "CAUSAL")):
        text = lowered("cuda", "a100", "cudnn", mask)
        assert text.count("@__cudnn$fmhaSoftmax(") == text.count("@__cudnn$fmhaSoftmaxBackward(") == calls
        assert text.count(f"mask_type\\22: \\22{kind}\\22") == 2 * calls
    text = lowered("cuda", "a100", "cudnn", window)
    assert text.count("@__cudnn$fmhaScaleBiasSoftmax(") == text.count("@__cudnn$fmhaScaleBiasSoftmaxBackward(") == 1
