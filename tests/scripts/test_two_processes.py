"""The scripts in a run of two processes, as on two hosts, against one process with as many devices."""

import json
import socket

import jax
import numpy as np
import pytest

from jaxgen.train import load_params

# Two runs of a whole system, one of them in two processes: minutes.
pytestmark = pytest.mark.slow

MESH = ("--mesh", "data=2,fsdp=2")


def flags(processes):
    """The flags of each process."""
    if processes == 1:
        return [()]
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"127.0.0.1:{server.getsockname()[1]}"
    return [("--coordinator", place, "--num_processes", processes, "--process_id", i) for i in range(processes)]


def measure(number, workdir, processes, config_path):
    """Trains, samples and evaluates with the scripts, in `number` processes; what they left."""

    def script(name, *args):
        each = [(name, "--workdir", workdir, *args, *MESH, *world) for world in flags(number)]
        started = [processes(call, devices=4 // number) for call in each]
        outputs = [process.communicate(timeout=500) for process in started]
        assert [process.returncode for process in started] == [0] * number, outputs
        # Gloo says that it is connected, from several threads at once.
        lines = [line for out, _ in outputs[1:] for line in out.splitlines()]
        spoken = [line for line in lines if line and "[Gloo]" not in line and "peer ranks" not in line]
        assert not spoken  # only process 0 speaks
        return outputs[0][0]

    said = script("train", "--config", config_path, "--variant", "smoke", "--set", "run.log_every=1", "run.eval_every=5")
    assert "classifier 10/10" in said
    script("sample", "--labels", "0,1", "--num", 2, "--top_k", 1, "--out", workdir / "g.png", "--npz", workdir / "g.npz")
    script("evaluate", "--num", 20, "--batch_size", 20, "--top_k", 1)
    assert (workdir / "g.png").exists()
    with np.load(workdir / "g.npz") as file:
        images = file["images"]
    return {
        "weights": {stage: load_params(workdir, stage)[0] for stage in ("tokenizer", "generator", "classifier")},
        "images": images.astype(int),
        "psnr": json.loads((workdir / "evaluation.json").read_text())["reconstruction"]["psnr"],
        "rows": [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()],
    }


def test_two_processes_make_what_one_makes(tmp_path, processes, config_path):
    one, two = (measure(number, tmp_path / str(number), processes, config_path) for number in (1, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), one["weights"], two["weights"])
    assert one["images"].shape[0] == 4
    assert np.abs(one["images"] - two["images"]).mean() < 1
    assert one["psnr"] == pytest.approx(two["psnr"], abs=0.05)
    losses = [[(row["stage"], row["step"], row["loss"]) for row in run["rows"] if "loss" in row] for run in (one, two)]
    assert [row[:2] for row in losses[0]] == [row[:2] for row in losses[1]]
    assert [row[2] for row in losses[0]] == pytest.approx([row[2] for row in losses[1]], rel=1e-3)
