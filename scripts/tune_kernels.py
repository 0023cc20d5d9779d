"""Measures block sizes of the kernels on the accelerator at hand and adds the fastest to kernels_pallas/tuning.json.

python scripts/tune_kernels.py
python scripts/tune_kernels.py --only attention --out my_table.json     # use it: KERNELS_PALLAS_TUNING=my_table.json
"""

import argparse
import datetime
from pathlib import Path

import jax

from jaxgen import cli, kernel_benchmark, kernel_cases, kernel_tuning
from kernels_pallas import current_device, tuning


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="problems whose name contains this")
    parser.add_argument("--out", type=Path, default=tuning.TABLE, help="table to add to")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    device = current_device()
    cases = [case for case in kernel_cases.measured("full") if args.only in case.name]
    if not any(kernel_tuning.candidates(case, device)[1] for case in cases):
        raise ValueError(f"--only {args.only!r}: no kernel with block sizes to choose runs on {device}")

    def measure(case):
        return kernel_benchmark.seconds(jax.jit(case.build()[0]), case.inputs(), args.repeats)

    versions = f"jax {jax.__version__}, {datetime.date.today()}"
    for entry in kernel_tuning.tune(cases, device, measure, versions):
        # One at a time, so that an interruption loses nothing.
        with cli.output_file("--out", str(args.out)) as path:
            tuning.write([*(tuning.read(path) if path.exists() else []), entry], path)


if __name__ == "__main__":
    cli.run(main)
