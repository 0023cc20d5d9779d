"""The scripts in a run of two processes, as on two hosts, against one process with as many devices and against one device."""

import json
import socket
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.interop import inception
from jaxgen.nn.inception import InceptionV3
from jaxgen.train import load_params
from jaxgen.train.mesh import path_name

# Whole systems trained, sampled and measured, again and again: minutes.
pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[2] / "configs"

MESH = ("--mesh", "data=2,fsdp=2")

# Processes, devices of each, and flags.
PLACES = {"two processes": (2, 2, MESH), "four devices": (1, 4, MESH), "one device": (1, 1, ("--mesh", "data=1"))}


@pytest.fixture
def script(processes):
    """`script(place, name, argument, ...)` runs a script in all processes of a place; what the first of them said."""

    def run(place, name, *args):
        number, devices, mesh = PLACES[place]
        started = [processes((name, *args, *mesh, *world), devices=devices) for world in worlds(number)]
        outputs = [process.communicate(timeout=1200) for process in started]
        assert [process.returncode for process in started] == [0] * number, outputs
        # Gloo says that it is connected, from several threads at once.
        lines = [line for out, _ in outputs[1:] for line in out.splitlines()]
        spoken = [line for line in lines if line and "[Gloo]" not in line and "peer ranks" not in line]
        assert not spoken  # only process 0 speaks
        return outputs[0][0]

    return run


def worlds(number):
    """The flags of each process."""
    if number == 1:
        return [()]
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"127.0.0.1:{server.getsockname()[1]}"
    return [("--coordinator", place, "--num_processes", number, "--process_id", i) for i in range(number)]


def trained(workdir, *stages):
    """What a training left: weights, as one device reads them, and losses.

    Without biases: those in front of a norm, and of attention's keys, have no gradient but rounding, whose sign Adam follows.
    """
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    weights = {stage: load_params(workdir, stage)[0] for stage in stages}
    leaves = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(weights)}
    return {
        "weights": {name: x for name, x in leaves.items() if not name.endswith("/bias")},
        "steps": [(row["stage"], row["step"]) for row in rows],
        "losses": [row["loss"] for row in rows if "loss" in row],
        "evaluations": [row["eval/loss"] for row in rows if "eval/loss" in row],
    }


def agree(one, two):
    """That two trainings are the same but for rounding."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), one["weights"], two["weights"])
    assert one["steps"] == two["steps"]
    for name in ("losses", "evaluations"):
        np.testing.assert_allclose(one[name], two[name], rtol=1e-3)


def test_two_processes_make_what_one_makes(tmp_path, script, config_path):
    workdirs = {place: tmp_path / place.replace(" ", "_") for place in PLACES}
    for place, workdir in workdirs.items():
        edits = ("--set", "run.log_every=1", "run.eval_every=5")
        said = script(place, "train", "--config", config_path, "--variant", "smoke", "--workdir", workdir, *edits)
        assert "classifier 10/10" in said
    two, *others = (trained(workdir, "tokenizer", "generator", "classifier") for workdir in workdirs.values())
    assert len(two["evaluations"]) == 6
    for one in others:
        agree(one, two)

    # Checkpoints of two processes, read by as many, by one process, and by one device.
    workdir, images, measures = workdirs["two processes"], {}, {}
    for place in PLACES:
        picture, npz = tmp_path / "g.png", tmp_path / f"{place}.npz"
        said = script(place, "sample", "--workdir", workdir, "--labels", "0,1", "--num", 4, "--out", picture, "--npz", npz)
        assert said.endswith(f"{picture}: 8 samples\n")
        picture.unlink()
        with np.load(npz) as file:
            assert file["labels"].tolist() == [0] * 4 + [1] * 4
            images[place] = file["images"].astype(int)
        script(place, "evaluate", "--workdir", workdir, "--num", 20, "--batch_size", 8)
        found = json.loads((workdir / "evaluation.json").read_text())
        measures[place] = found["reconstruction"] | found["generation"]
        assert measures[place].pop("settings")["top_p"] == 0.96
        (workdir / "evaluation.json").unlink()
    one = "one device"
    assert len({image.tobytes() for image in images[one]}) == 8
    for place in PLACES:
        # Drawn with temperature 1: a single other token would show.
        assert np.abs(images[place] - images[one]).max() <= 1
        assert measures[place] == pytest.approx(measures[one], rel=1e-3)


def test_text_of_two_processes(tmp_path, script):
    """A target and its draft: trained, and texts that both made together."""
    places, found, texts = ("two processes", "one device"), [], []
    for place in places:
        workdir = tmp_path / place.replace(" ", "_")
        edits = ("--set", "run.log_every=1", "run.eval_every=4")
        said = script(place, "train", "--config", CONFIGS / "spectr.py", "--variant", "smoke", "--workdir", workdir, *edits)
        assert "draft 4/4" in said
        found.append(trained(workdir, "generator", "draft"))
    agree(*found)
    for place in places:
        out = tmp_path / "text.txt"
        flags = ("--workdir", tmp_path / "two_processes", "--num", 2, "--length", 40, "--out", out)
        said = script(place, "sample", *flags, "--prompt", "def ", "--prompt", "In the")
        assert "4 samples" in said
        texts.append(out.read_bytes())
        out.unlink()
    assert texts[0] == texts[1] and len(set(texts[0].split(b"\n" + 40 * b"-" + b"\n"))) == 4


# Those whose samplers read arrays of all processes on the host.
@pytest.mark.parametrize("name", ["hack", "indexmark", "rdm", "semaim", "tts_var"])
def test_samplers_with_a_part_on_the_host(tmp_path, script, name):
    workdir, images = tmp_path / "run", {}
    script("one device", "train", "--config", CONFIGS / f"{name}.py", "--variant", "smoke", "--workdir", workdir)
    for place in ("two processes", "one device"):
        npz = tmp_path / f"{place}.npz"
        flags = ("--labels", "0,1", "--num", 2, "--cfg", 0, "--top_p", 0, "--out", tmp_path / "g.png", "--npz", npz)
        script(place, "sample", "--workdir", workdir, *flags)
        with np.load(npz) as file:
            images[place] = file["images"].astype(int)
    assert np.abs(images["two processes"] - images["one device"]).max() <= 1
    assert len({image.tobytes() for image in images["one device"]}) == 4


def positive(path, x):
    """Variances have to be."""
    return np.abs(x) + 0.5 if path[-1].key == "var" else x


def test_inception_scores_of_two_processes(tmp_path, script, put_weights, randomize):
    workdir, weights, reference = tmp_path / "run", tmp_path / "inception.safetensors", tmp_path / "real.npz"
    put_weights(workdir)
    variables = randomize(jax.eval_shape(InceptionV3(1008).init, jax.random.key(0), jnp.zeros((1, 299, 299, 3))))
    inception.save(weights, jax.tree_util.tree_map_with_path(positive, variables))
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
    np.savez(reference, arr_0=images)
    found = {}
    for place in ("two processes", "one device"):
        flags = ("--num", 10, "--batch_size", 4, "--inception", weights, "--reference", reference)
        script(place, "evaluate", "--workdir", workdir, *flags)
        found[place] = json.loads((workdir / "inception.json").read_text())
        (workdir / "inception.json").unlink()
        (workdir / "quality").rename(tmp_path / place)
    assert found["two processes"] == pytest.approx(found["one device"], rel=1e-3)
