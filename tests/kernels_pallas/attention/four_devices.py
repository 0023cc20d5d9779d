"""What `test_api.py` runs on four CPU devices: attention and its gradients over batch and heads; prints one JSON object."""

import contextlib
import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas import BlockMask, block_sparse_attention, partitioned, target

mesh = jax.make_mesh((2, 2), ("batch", "heads"), axis_types=(AxisType.Auto,) * 2)
SPEC = P("batch", None, "heads", None)
LSE = P("batch", None, "heads")


def not_later(q, k):
    return q[0] >= k[0]


steps = np.repeat(np.arange(6), np.arange(1, 7) ** 2)[None]
mask = BlockMask.build(not_later, steps, steps)
rng = np.random.default_rng(0)
q, do = (jnp.asarray(rng.standard_normal((2, 91, 4, 8)), jnp.float32) for _ in range(2))
k, v = (jnp.asarray(rng.standard_normal((2, 91, 2, 8)), jnp.float32) for _ in range(2))
dlse = jnp.asarray(rng.standard_normal((2, 91, 4)), jnp.float32)
arguments, specs = (q, k, v, do, dlse), (SPEC,) * 4 + (LSE,)


def attend(name, q, k, v):
    return block_sparse_attention(q, k, v, mask, return_lse=True, implementation=name)


results = {}
for name in ("xla", "split", "tpu"):

    def both(q, k, v, do, dlse, name=name, spread=False):
        with contextlib.ExitStack() as stack:
            if name == "tpu":
                stack.enter_context(target("v5e", interpret=True))
            if spread:
                stack.enter_context(partitioned(mesh, batch=("batch",), heads=("heads",)))
            (o, lse), vjp = jax.vjp(partial(attend, name), q, k, v)
            return o, lse, *vjp((do, dlse))

    out = (SPEC, LSE, SPEC, SPEC, SPEC)
    want = jax.jit(both)(*arguments)
    spread = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arguments, specs)]
    runs = {
        f"{name}/mapped": jax.jit(jax.shard_map(both, mesh=mesh, in_specs=specs, out_specs=out, check_vma=name != "tpu"))(
            *spread
        ),
        f"{name}/automatic": jax.jit(partial(both, spread=True))(*spread),
    }
    for key, got in runs.items():
        differences = [float(jnp.abs(x - y).max()) for x, y in zip(got, want)]
        pieces = [len({str(i) for i in x.sharding.devices_indices_map(x.shape).values()}) for x in got]
        results[key] = {"difference": max(differences), "pieces": min(pieces)}
json.dump(results, sys.stdout)
