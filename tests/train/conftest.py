import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# So that tests, and the processes that they start, find `toy_recipe`.
sys.path.insert(0, str(HERE))


@pytest.fixture(scope="session")
def run_with_four_devices(compile_cache):
    """Runs a script of this folder in a process whose CPU pretends to be four devices; the JSON that it prints."""

    def run(script: str) -> dict:
        flags = "--xla_force_host_platform_device_count=4"
        env = os.environ | compile_cache
        env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(HERE.parents[1])}
        done = subprocess.run([sys.executable, HERE / script], env=env, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout)

    return run
