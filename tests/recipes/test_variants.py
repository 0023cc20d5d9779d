"""configs/var.py: sizes, schedules and claims of S047."""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from jaxgen import cli
from jaxgen import config as config_lib
from jaxgen.optim import decay_mask, lr_schedule, weight_decay_schedule
from jaxgen.recipes import claims
from jaxgen.recipes.next_scale import RULES, param_shapes
from jaxgen.train.mesh import AXES, path_name, shardings

VAR = cli.load_config_file(str(Path(__file__).parents[2] / "configs" / "var.py"))

# The commands in the authors' README and the defaults of their arguments: depth, batch, epochs, base learning rate, alng, final
# learning rate (share), final weight decay, shared AdaLN.
COMMANDS = {
    "d16": (16, 768, 200, 1e-4, 1e-3, 0.1, 0.05, False),
    "d20": (20, 768, 250, 1e-4, 1e-3, 0.1, 0.05, False),
    "d24": (24, 768, 350, 8e-5, 1e-4, 0.01, 0.05, False),
    "d30": (30, 1024, 350, 8e-5, 1e-5, 0.01, 0.08, False),
    "d36_512": (36, 768, 350, 8e-5, 5e-6, 0.01, 0.08, True),
}
PUBLISHED_M = {"d16": (310, 5), "d20": (600, 5), "d24": (1000, 50), "d30": (2000, 50), "d36_512": (2300, 60)}


def generator_shapes(config):
    return param_shapes(config.build_sampler())["generator"]["params"]


def leaves(shapes):
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}


@pytest.mark.parametrize("variant", VAR.VARIANTS)
def test_every_variant_builds_and_survives_json(variant):
    recipe = VAR.get_config(variant)
    assert [stage.name for stage in recipe.stages][:2] == ["tokenizer", "generator"]
    assert all(stage.steps > 0 for stage in recipe.stages)
    assert config_lib.from_json(config_lib.to_json(recipe.config)) == recipe.config
    assert recipe.config.recipe().config == recipe.config
    pixels = recipe.config.data.image_size or 8
    assert recipe.config.build_tokenizer().image_size == (pixels, pixels)


def test_unknown_variants():
    with pytest.raises(ValueError, match="variant 'd17' is not one of smoke, demo, small, d16, d20, d24, d30, d36_512"):
        VAR.get_config("d17")


@pytest.mark.parametrize("variant", COMMANDS)
def test_published_sizes(variant):
    """Counted by hand from the layers of the paper's table, and as published."""
    config = VAR.get_config(variant).config
    d, shared = COMMANDS[variant][0], COMMANDS[variant][7]
    c, v, z = 64 * d, 4096, 32
    patch_nums = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32) if shared else (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    length = sum(n * n for n in patch_nums)
    ada = 6 * c * c + 6 * c
    attention = 3 * c * c + 2 * c + d + c * c + c  # no bias for keys; a scale for each of d heads
    mlp = 8 * c * c + 5 * c
    blocks = d * (attention + mlp + (6 * c if shared else ada)) + (ada if shared else 0)
    embeddings = (z * c + c) + 1001 * c + c + length * c + len(patch_nums) * c
    total = blocks + embeddings + (2 * c * c + 2 * c) + (c * v + v)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(generator_shapes(config))) == total
    millions, rounding = PUBLISHED_M[variant]
    assert abs(total / 1e6 - millions) <= rounding
    tokenizer = config.build_tokenizer()
    assert (config.model.dtype, tokenizer.ch, tokenizer.vocab, tokenizer.patch_nums) == ("bfloat16", 160, v, patch_nums)


@pytest.mark.parametrize("variant", COMMANDS)
def test_published_schedules(variant):
    depth, batch, epochs, base, alng, lr_end, decay_end, _ = COMMANDS[variant]
    config = VAR.get_config(variant).config
    train, optim = config.model_train, config.model_train.optim
    updates = math.ceil(1_281_167 / batch)
    assert (train.batch_size, train.steps) == (batch, epochs * updates)
    warmup = round(epochs / 50 * updates)
    lr, decay = lr_schedule(optim, train.steps), weight_decay_schedule(optim, train.steps)
    peak = base * batch / 256
    for t, share in ((0, 0.005), (warmup, 1), (warmup + 0.04 * (train.steps - warmup), 1), (train.steps - 1, lr_end)):
        np.testing.assert_allclose(lr(t), share * peak, rtol=1e-4)
    assert lr(warmup - 1) < peak
    np.testing.assert_allclose([decay(0), decay(train.steps - 1)], [0.05, decay_end], rtol=1e-5)
    assert (optim.b1, optim.b2, optim.clip, optim.schedule) == (0.9, 0.95, 2.0, "lin0")
    assert (train.class_drop, train.label_smoothing, train.ema) == (0.1, 0.0, 0.0)
    assert config.model.gate_init == alng and config.model.drop_path_rate == pytest.approx(0.1 * depth / 24)
    assert (config.data.mid_scale, config.data.flip) == (1.125, False)


@pytest.mark.parametrize("variant", ["d16", "d36_512"])
def test_only_kernels_and_class_embeddings_decay(variant):
    config = VAR.get_config(variant).config
    mask = leaves(decay_mask(generator_shapes(config), config.model_train.optim.no_decay))
    assert {name.rpartition("/")[2] for name, decays in mask.items() if decays} == {"kernel", "embedding"}
    assert {name.rpartition("/")[2] for name, decays in mask.items() if not decays} >= {"bias", "start", "position", "level"}
    assert not any(decays for name, decays in mask.items() if "log_scale" in name or "offset" in name)


@pytest.mark.parametrize(
    "variant, edits, mesh",
    [
        ("smoke", (), (1, 2, 2)),
        ("smoke", ("model.scan_layers=false",), (2, 2, 2)),
        ("demo", (), (1, 2, 4)),
        ("d16", (), (1, 4, 8)),
        ("d36_512", (), (1, 8, 4)),
    ],
)
def test_large_parameters_are_split_over_every_axis(variant, edits, mesh):
    config = VAR.get_config(variant).override(edits).config
    shapes = generator_shapes(config)
    mesh = AbstractMesh((*mesh, 1), AXES, axis_types=(AxisType.Auto,) * 4)
    placed = leaves(shardings(mesh, shapes, RULES))
    parts = {}
    for name, leaf in leaves(shapes).items():
        axes = [axis for entry in placed[name].spec if entry for axis in ([entry] if isinstance(entry, str) else entry)]
        parts[name] = (math.prod(leaf.shape), math.prod(mesh.shape[axis] for axis in axes))
    whole = sum(size for size, _ in parts.values())
    largest = sum(size / count for size, count in parts.values())
    blocks = [count for name, (_, count) in parts.items() if "/blocks" in f"/{name}" and name.endswith("kernel")]
    assert set(blocks) == {mesh.shape["fsdp"] * mesh.shape["tensor"]}
    if config.model.depth >= 16:
        assert largest < 1.25 * whole / (mesh.shape["fsdp"] * mesh.shape["tensor"])


def test_the_claim_compares_equals(monkeypatch):
    """What is measured against what; the measuring itself is tested with the claims."""
    seen = {}

    def compare(systems, **kwargs):
        seen.update(systems=systems, **kwargs)
        return "comparison"

    def scaling(sizes, *, log):
        seen["sizes"] = sizes
        return "scaling"

    monkeypatch.setattr(claims, "compare_generators", compare)
    monkeypatch.setattr(claims, "scaling_law", scaling)
    assert VAR.claim("small", seeds=2, edits=["model.width=64"], log=print) == ["comparison", "scaling"]
    ours, baseline = seen["systems"].values()
    assert seen["seeds"] == 2 and ours.model.width == baseline.model.width == 64
    longer = ["tokenizer_train.steps=600", "model_train.steps=500"]
    assert ours == VAR.get_config("demo").override(["model.width=64", *longer]).config
    same = {field.name for field in dataclasses.fields(ours)} - {"tokenizer"}
    assert all(getattr(ours, name) == getattr(baseline, name) for name in same)
    assert dataclasses.replace(baseline.tokenizer, patch_nums=ours.tokenizer.patch_nums) == ours.tokenizer
    assert baseline.build_generator().order.steps == 16 and ours.build_generator().order.steps == 4
    sizes = []
    for config in (ours, baseline):
        c = config.tokenizer.width
        features = jax.ShapeDtypeStruct((1, 29, c), np.float32)
        tokens = jax.ShapeDtypeStruct((1, 16), np.int32)
        label = jax.ShapeDtypeStruct((1,), np.int32)
        inputs = features if config is ours else tokens
        shapes = jax.eval_shape(config.build_generator().init, jax.random.key(0), label, inputs)
        sizes.append(sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)))
    assert abs(sizes[0] / sizes[1] - 1) < 0.05
    counts = [sum(math.prod(x.shape) for x in jax.tree.leaves(generator_shapes(c))) for c in seen["sizes"].values()]
    assert len(counts) >= 4 and counts == sorted(counts) and counts[-1] > 20 * counts[0]
    with pytest.raises(ValueError, match="budget 'huge' is not one of smoke, small"):
        VAR.claim("huge")
