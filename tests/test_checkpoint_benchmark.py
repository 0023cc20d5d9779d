import jax
import pytest

from jaxgen.checkpoint_benchmark import bench, make_state


def test_sizes():
    state = make_state(20_000)
    size = sum(x.size for x in jax.tree.leaves(state.params))
    assert size == pytest.approx(20_000, rel=0.02)
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == 2 * size + 1
    assert not jax.tree.leaves(make_state(20_000, moments=False).opt_state)


def test_rows(tmp_path):
    rows = list(bench(20_000, folder=tmp_path))
    assert [row["what"] for row in rows] == ["parameters", "parameters and moments", "the same, one still running"]
    assert all(0 < row["blocked_s"] <= row["complete_s"] and row["copy_s"] >= 0 for row in rows)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="parameters=0"):
        next(bench(0))
