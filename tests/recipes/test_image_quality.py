"""Oracles: statistics of all samples at once, and the same run in one piece and on one device."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.data import DataConfig, pixels, to_uint8
from jaxgen.metrics import ImageStats, image_scores, precision_recall
from jaxgen.nn.perceptual import VGG16Features, lpips
from jaxgen.recipes.evaluation import held_out, measure_reconstruction, sample_many
from jaxgen.recipes.image_quality import data_reference, npz_reference, sample_quality, sample_statistics
from jaxgen.train import make_mesh

pytestmark = pytest.mark.usefixtures("quick_compiles")

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from painting import Painter, Reader, close  # noqa: E402

LABELS = np.arange(22, dtype=np.int32) % 4
OPTIONS = dict(batch_size=8, keep=15, split=11)
NETWORK = Reader()


def sample(painter=None, labels=LABELS, params=0.5, **more):
    return sample_statistics(painter or Painter(), params, jax.random.key(0), labels, NETWORK, 2.0, **(OPTIONS | more))


def read(images):
    return jax.device_get(NETWORK.apply(2.0, jnp.asarray(images), "observe"))


@pytest.fixture(scope="module")
def whole():
    """The statistics of all samples at once."""
    images = np.asarray(to_uint8(sample_many(Painter(), 0.5, jax.random.key(0), LABELS, batch_size=8)))
    return ImageStats.empty(5, 3, 4, keep=15, split=11).update(read(images), np.arange(22))


def test_streamed_statistics_are_those_of_all_samples(whole):
    painter = Painter()
    assert close(sample(painter), whole) and painter.calls == [8, 8, 8]
    assert close(sample(mesh=make_mesh("data=1", jax.devices()[:1])), whole)
    assert not close(sample(settings={"cfg": 0.5}), whole)
    assert sample(keep=0).kept().shape == (0, 5)


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_an_interrupted_run_goes_on(whole, tmp_path, calls):
    with pytest.raises(KeyboardInterrupt):
        sample(Painter(left=calls), folder=tmp_path / "run", save_every_s=0.0)
    painter, lines = Painter(), []
    assert close(sample(painter, folder=tmp_path / "run", log=lines.append), whole)
    assert len(painter.calls) == 3 - calls and lines[-1].startswith("sampling 3/3  images 22")
    idle = Painter(left=0)  # nothing is left to do
    assert close(sample(idle, folder=tmp_path / "run"), whole)


def test_saving_seldom_loses_only_what_came_since(whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        sample(Painter(left=2), folder=tmp_path, save_every_s=1e9)
    painter = Painter()
    assert close(sample(painter, folder=tmp_path), whole) and len(painter.calls) == 3


def test_another_run_does_not_go_on_in_the_same_folder(tmp_path):
    sample(folder=tmp_path, about={"step": 100})
    for more, match in (
        ({"about": {"step": 200}}, "step 100 and not 200"),
        ({"settings": {"cfg": 2.0}, "about": {"step": 100}}, "settings {} and not {'cfg': 2.0}"),
        ({"batch_size": 11, "about": {"step": 100}}, "batch_size 8 and not 11"),
    ):
        with pytest.raises(ValueError, match=match):
            sample(folder=tmp_path, **more)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json: damaged"):
        sample(folder=tmp_path)


def test_what_does_not_fit_is_named(monkeypatch):
    with pytest.raises(ValueError, match="0 labels in batches of 8"):
        sample(labels=LABELS[:0])
    with pytest.raises(ValueError, match="num=3: at least one sample for each of the 4 classes"):
        sample_quality(Painter(), 0.5, jax.random.key(0), NETWORK, 2.0, None, num=3, batch_size=2)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="folder=None: 2 processes"):
        sample()


def test_quality_of_samples_of_every_class(whole):
    reference = whole.reference()
    got = sample_quality(Painter(), 0.5, jax.random.key(1), NETWORK, 2.0, reference, num=23, **OPTIONS)
    labels = np.arange(23) % 4
    images = np.asarray(to_uint8(sample_many(Painter(), 0.5, jax.random.key(1), labels, batch_size=8)))
    want = ImageStats.empty(5, 3, 4, keep=15, split=11).update(read(images), np.arange(23))
    assert got == pytest.approx(image_scores(want, reference), rel=1e-4)
    assert (got["precision"], got["recall"]) == precision_recall(reference.features, want.kept())


def test_references_from_data_and_from_files(tmp_path):
    data = DataConfig(path="digits", channels=3)
    images = next(held_out(data, batch_size=41, limit=41))["image"]
    lines = []
    got = data_reference(data, NETWORK, 2.0, split="test", limit=41, batch_size=6, keep=9, log=lines.append)
    want = ImageStats.empty(5, 3, 4, keep=9).update(read(images), np.arange(41)).reference()
    np.testing.assert_allclose(got.pool.cov, want.pool.cov, atol=1e-6)
    np.testing.assert_allclose(got.spatial.mean, want.spatial.mean, rtol=1e-6)
    np.testing.assert_allclose(got.features, want.features, rtol=1e-6)
    assert got.pool.count == 41 and lines[-1].startswith("reference 7/7  images 41")
    np.savez(tmp_path / "images.npz", arr_0=images)
    from_images = npz_reference(tmp_path / "images.npz", NETWORK, 2.0, batch_size=16, keep=9)
    np.testing.assert_allclose(from_images.pool.cov, want.pool.cov, atol=1e-6)
    # Statistics in the file count more than those of its images, which give the features.
    np.savez(tmp_path / "both.npz", arr_0=images, mu=np.ones(5), sigma=np.eye(5))
    both = npz_reference(tmp_path / "both.npz", NETWORK, 2.0, batch_size=16, keep=9)
    np.testing.assert_array_equal(both.pool.mean, np.ones(5))
    np.testing.assert_allclose(both.features, want.features, rtol=1e-6)
    np.savez(tmp_path / "moments.npz", mu=np.ones(5), sigma=np.eye(5))
    assert npz_reference(tmp_path / "moments.npz", NETWORK, 2.0).features is None


class Dimming:
    """A tokenizer whose continuous tokens are dimmed pixels."""

    def apply(self, variables, x, method):
        return x * variables if method == "encode" else x


def test_reconstruction_of_larger_pictures_has_a_perceptual_distance(randomize):
    data = DataConfig(path="digits", channels=1, image_size=16)
    shapes = jax.eval_shape(VGG16Features((4,) * 5).init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    weights = {"vgg": randomize(shapes), "weights": tuple(np.full(4, 0.5, np.float32) for _ in range(5))}
    found = measure_reconstruction(Dimming(), jnp.float32(0.5), data, batch_size=20, limit=30, perceptual=weights)
    images = pixels(np.concatenate([b["image"] for b in held_out(data, batch_size=30, limit=30)]))
    assert found["lpips"] == pytest.approx(float(lpips(weights, images, 0.5 * images).mean()), rel=1e-5) and found["lpips"] > 0
    assert "codebook_use" not in found


# Two more processes start JAX: slow on a busy machine.
@pytest.mark.slow
def test_two_processes_join_their_statistics(whole, tmp_path):
    whole.save(tmp_path / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{HERE}"}
    command = [sys.executable, HERE / "two_processes.py"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    runs = [subprocess.Popen([*command, str(i), port, tmp_path], **pipes) for i in range(2)]
    outputs = [run.communicate(timeout=400) for run in runs]
    assert all(run.returncode == 0 for run in runs), outputs[0][1][-3000:] + outputs[1][1][-3000:]
    found = json.loads(outputs[0][0].splitlines()[-1])
    for mesh in ("data=2,fsdp=2", "data=2,tensor=2"):
        assert found[mesh]["same"] and sum(found[mesh]["counts"]) == 22 and min(found[mesh]["counts"]) > 5
    one = data_reference(DataConfig(path="digits", channels=3), NETWORK, 2.0, split="test", limit=41, batch_size=12, keep=9)
    # The order of the data does not depend on the number of hosts, nor which images are the first 41.
    np.testing.assert_allclose(found["real"]["mean"], one.pool.mean, rtol=1e-6)
    assert (found["real"]["count"], found["real"]["features"]) == (41, 9)
