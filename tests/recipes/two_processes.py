"""What `test_image_quality.py` runs in two processes of two devices each; the first one prints one JSON object."""

import json
import sys
from pathlib import Path

import jax

process, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)

import numpy as np  # noqa: E402
from painting import Painter, Reader, close  # noqa: E402

from jaxgen.data import DataConfig  # noqa: E402
from jaxgen.metrics import ImageStats  # noqa: E402
from jaxgen.recipes.image_quality import data_reference, sample_statistics  # noqa: E402
from jaxgen.train import make_mesh  # noqa: E402

labels = np.arange(22, dtype=np.int32) % 4
options = dict(batch_size=8, keep=15, split=11, save_every_s=0.0)
one, results = ImageStats.load(folder / "one"), {}
for mesh in ("data=2,fsdp=2", "data=2,tensor=2"):
    place = {"mesh": make_mesh(mesh), "folder": folder / mesh}
    both = sample_statistics(Painter(), 0.5, jax.random.key(0), labels, Reader(), 2.0, **options, **place)
    counts = [len(ImageStats.load(folder / mesh / f"part_0000{i}")) for i in range(2)]
    results[mesh] = {"same": close(both, one), "counts": counts}
data = DataConfig(path="digits", channels=3)
real = data_reference(data, Reader(), 2.0, split="test", limit=41, batch_size=6, folder=folder / "real", keep=9)
results["real"] = {"mean": real.pool.mean.tolist(), "count": real.pool.count, "features": len(real.features)}
if process == 0:
    print(json.dumps(results))
