import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

HERE = Path(__file__).parent

# So that tests, and the processes that they start, find `toy_recipe`.
sys.path.insert(0, str(HERE))


@pytest.fixture(scope="session")
def run_with_four_devices():
    """Runs a script of this folder in a process whose CPU pretends to be four devices; the JSON that it prints."""

    def run(script: str) -> dict:
        flags = "--xla_force_host_platform_device_count=4"
        env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(HERE.parents[1])}
        if jax.config.jax_compilation_cache_dir:
            env["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
            env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = str(jax.config.jax_persistent_cache_min_compile_time_secs)
        done = subprocess.run([sys.executable, HERE / script], env=env, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout)

    return run
