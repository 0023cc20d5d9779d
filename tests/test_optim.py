import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen.optim import OptimConfig, adamw, decay_mask, lr_schedule, weight_decay_schedule


def published(kind, t, warmup, steps, start=0.005, end=0.01):
    """Learning rate over its peak, in Python floats, from the description of the published schedule."""
    if t < warmup:
        return start + (1 - start) * t / warmup
    passed = (t - warmup) / (steps - 1 - warmup)
    if kind == "cosine":
        return end + (1 - end) * (0.5 + 0.5 * math.cos(math.pi * passed))
    hold = {"lin0": 0.05, "lin": 0.15, "constant": 1.1}[kind]
    return 1.0 if passed < hold else end + (1 - end) * (1 - passed) / (1 - hold)


@pytest.mark.parametrize("kind", ["lin0", "lin", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 10])
def test_lr_schedule(kind, warmup):
    schedule = lr_schedule(OptimConfig(lr=3.0, schedule=kind, warmup_steps=warmup), 101)
    got = jax.vmap(schedule)(jnp.arange(101))
    np.testing.assert_allclose(got, [3.0 * published(kind, t, warmup, 101) for t in range(101)], rtol=2e-5)


def test_lr_schedule_by_hand():
    schedule = lr_schedule(OptimConfig(lr=2.0, warmup_steps=10, schedule="lin0"), 111)
    assert float(schedule(0)) == pytest.approx(2.0 * 0.005)
    assert float(schedule(5)) == pytest.approx(2.0 * (0.005 + 0.995 / 2))
    assert float(schedule(10)) == float(schedule(14)) == 2.0
    assert float(schedule(15)) == pytest.approx(2.0)  # the line starts where the plateau ends
    assert float(schedule(110)) == pytest.approx(2.0 * 0.01)
    assert float(schedule(10_000)) == float(schedule(110))
    assert float(lr_schedule(OptimConfig(lr=1.0, lr_start=0.5, warmup_steps=4), 9)(0)) == pytest.approx(0.5)
    assert float(lr_schedule(OptimConfig(lr=1.0, lr_end=0.25), 9)(8)) == pytest.approx(0.25)
    assert float(lr_schedule(OptimConfig(lr=1.0), 1)(0)) == 1.0


def test_weight_decay_schedule():
    constant = weight_decay_schedule(OptimConfig(weight_decay=0.3), 11)
    assert [float(constant(t)) for t in (0, 5, 10)] == pytest.approx([0.3] * 3)
    falling = weight_decay_schedule(OptimConfig(weight_decay=0.3, weight_decay_end=0.1), 11)
    assert [float(falling(t)) for t in (0, 5, 10, 99)] == pytest.approx([0.3, 0.2, 0.1, 0.1])


def params():
    return {
        "blocks": {
            "attn": {"qkv": {"kernel": jnp.ones((3, 2, 4)), "bias": jnp.ones((3, 4))}, "scale_mul": jnp.ones((3, 2, 1))},
            "norm": {"scale": jnp.ones((3, 4))},
        },
        "pos_embed": jnp.ones((5, 4)),
        "head": {"kernel": jnp.ones((4, 7)), "q_bias": jnp.ones((1, 4)), "gain": jnp.ones(7)},
    }


def test_decay_mask():
    mask = decay_mask(params(), ("scale_mul", "pos_embed"))
    flat = {jax.tree_util.keystr(p, simple=True, separator="/"): v for p, v in jax.tree_util.tree_leaves_with_path(mask)}
    assert {name for name, decayed in flat.items() if decayed} == {"blocks/attn/qkv/kernel", "head/kernel"}
    assert decay_mask(params())["pos_embed"] and decay_mask(params())["blocks"]["attn"]["scale_mul"]


def test_adamw_is_algorithm_2_with_schedules_and_clipping():
    """Against Adam with decoupled weight decay written out in numpy float64."""
    steps, rng = 12, np.random.default_rng(0)
    config = OptimConfig(
        lr=0.1, warmup_steps=3, schedule="lin", weight_decay=0.2, weight_decay_end=0.05, b1=0.8, b2=0.9, eps=1e-3,
        clip=1.5, no_decay=("embed",),
    )  # fmt: skip
    shapes = {"kernel": (3, 2), "embed": (2, 2), "bias": (2,)}
    p = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    m, v = ({name: np.zeros(shape) for name, shape in shapes.items()} for _ in range(2))
    ours = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), p)
    tx = adamw(config, steps)
    state = tx.init(ours)
    norms = []
    for t in range(steps):
        grads = {name: rng.normal(size=shape) * (0.2 if t % 2 else 2.0) for name, shape in shapes.items()}
        updates, state = tx.update(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grads), state, ours)
        ours = optax.apply_updates(ours, updates)

        norms.append(math.sqrt(sum((g**2).sum() for g in grads.values())))
        lr = 0.1 * published("lin", t, 3, steps)
        wd = 0.05 + 0.15 * (1 + math.cos(math.pi * t / (steps - 1))) / 2
        for name in shapes:
            g = grads[name] * min(1, 1.5 / norms[-1])
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.9 * v[name] + 0.1 * g**2
            adam = (m[name] / (1 - 0.8 ** (t + 1))) / (np.sqrt(v[name] / (1 - 0.9 ** (t + 1))) + 1e-3)
            p[name] = p[name] - lr * (adam + (wd * p[name] if name == "kernel" else 0))
    assert min(norms) < 1.5 < max(norms)  # both sides of the clipping were used
    for name in shapes:
        np.testing.assert_allclose(ours[name], p[name], atol=2e-5)


def test_adamw_without_decay_or_clipping():
    tx = adamw(OptimConfig(lr=0.1, weight_decay=0.0, clip=0.0, schedule="constant", eps=1e-12), 10)
    p = {"kernel": jnp.full((2, 2), 5.0)}
    updates, _ = tx.update({"kernel": jnp.full((2, 2), 1e6)}, tx.init(p), p)
    np.testing.assert_allclose(updates["kernel"], -0.1, rtol=1e-4)  # Adam's first step has the size of the learning rate


def test_adamw_matches_torch():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    rng = np.random.default_rng(1)
    start, grads = rng.normal(size=(4, 3)).astype(np.float32), rng.normal(size=(5, 4, 3)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.tensor(start))
    optimizer = torch.optim.AdamW([theirs], lr=0.05, betas=(0.9, 0.95), weight_decay=0.3)
    tx = adamw(OptimConfig(lr=0.05, weight_decay=0.3, clip=0.0, schedule="constant"), 5)
    ours = {"kernel": jnp.asarray(start)}
    state = tx.init(ours)
    for g in grads:
        theirs.grad = torch.tensor(g)
        optimizer.step()
        updates, state = tx.update({"kernel": jnp.asarray(g)}, state, ours)
        ours = optax.apply_updates(ours, updates)
    np.testing.assert_allclose(ours["kernel"], theirs.detach().numpy(), atol=1e-6)


@pytest.mark.parametrize(
    "field, value",
    [
        ("lr", 0.0), ("schedule", "lin1"), ("warmup_steps", -1), ("lr_start", 1.5), ("lr_end", -0.1), ("weight_decay", -1.0),
        ("weight_decay_end", -1.0), ("b1", 1.0), ("b2", 1.0), ("eps", 0.0), ("clip", -1.0), ("lr", float("nan")),
    ],
)  # fmt: skip
def test_bad_values_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r}"):
        OptimConfig(**{field: value})


def test_warmup_has_to_end():
    with pytest.raises(ValueError, match="warmup_steps=10 .* 10 steps"):
        lr_schedule(OptimConfig(warmup_steps=10), 10)
