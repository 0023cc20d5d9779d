import subprocess
import sys


def test_metrics_never_import_flax():
    code = "import sys, jaxgen.metrics; sys.exit('flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
