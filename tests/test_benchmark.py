import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import benchmark


def test_a_report_of_a_product_of_matrices():
    n = 1024
    matrix = jax.ShapeDtypeStruct((n, n), jnp.float32)
    compiled, report = benchmark.compile_report(lambda a, b: a @ b, matrix, matrix)
    assert report["compiled_TFLOP"] == pytest.approx(2 * n**3 / 1e12, abs=5e-5)
    assert report["argument_MB"] == pytest.approx(2 * 4 * n * n / 1e6, abs=0.05)
    assert report["output_MB"] == pytest.approx(4 * n * n / 1e6, abs=0.05)
    assert 0 <= report["compile_s"] < 60 and report["temp_MB"] >= 0
    half = jnp.full((n, n), 0.5)
    np.testing.assert_array_equal(compiled(half, half)[0, :2], [n / 4, n / 4])


def test_jitted_functions_keep_their_options():
    jitted = jax.jit(lambda n, x: x[:n], static_argnums=0)
    compiled, _ = benchmark.compile_report(jitted, 2, jax.ShapeDtypeStruct((5,), jnp.float32))
    assert compiled(jnp.arange(5.0)).shape == (2,)
    compiled, _ = benchmark.compile_report(lambda n, x: x[:n], 3, jax.ShapeDtypeStruct((5,), jnp.float32), static_argnums=0)
    assert compiled(jnp.arange(5.0)).shape == (3,)


def test_the_median_of_warm_calls(monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr(benchmark, "time", types.SimpleNamespace(perf_counter=lambda: clock["now"]))
    waits = iter([7.0, 1.0, 5.0, 2.0])

    def fn(x):
        clock["now"] += next(waits)
        return x + 1

    times = benchmark.measure(fn, jnp.zeros(3), repeats=3)
    assert next(waits, None) is None  # one call more than repeats, which is not counted
    assert (times["seconds"], times["seconds_min"], times["repeats"]) == (2.0, 1.0, 3)
    assert times["peak_MB"] > 10 and times["device"] == jax.devices()[0].device_kind


def test_an_unknown_topology():
    with pytest.raises(ValueError, match=r"topology 'nonsense:9x9': .*is libtpu installed"):
        benchmark.topology_devices("nonsense:9x9")
