"""Compiles every kernel to machine code for TPUs and Hopper GPUs that are not attached, and checks what the compilers report.

python scripts/compile_kernels.py                       # all targets; their compilers are installed under .cache/compilers
python scripts/compile_kernels.py --targets v5e --only attention
python scripts/compile_kernels.py --update              # writes kernels_pallas/COMPILED.md anew

Fails if a kernel does not compile, spills registers, or has over 10 % more bundles than COMPILED.md records for this jax.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

from jaxgen import cli, kernel_cases
from jaxgen.kernel_compile import TARGETS, compile_case, device_sharding, environment, packages
from jaxgen.tables import markdown_table, text_table
from kernels_pallas import explain
from kernels_pallas import target as kernels_for

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "kernels_pallas" / "COMPILED.md"
GROWTH = 1.1
HEADER = """# What the compilers say of the kernels

Written by `python scripts/compile_kernels.py --update` on a machine without a TPU or a GPU: static facts of machine code, not
times. *bundles*: instruction bundles of a TPU kernel (all code paths once). *registers*, *spills*: a thread of an sm_90a kernel,
and bytes that went to memory because registers ran out. *temp_MB*: what the whole program needs beside arguments and results.

"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS), help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--packages", type=Path, default=ROOT / ".cache" / "compilers", help="where the compilers are installed")
    parser.add_argument("--update", action="store_true", help=f"write {RECORD.name}; with --only or --targets, those rows of it")
    parser.add_argument("--install", action="store_true", help="only install the compilers")
    parser.add_argument("--child", metavar="DUMP", help=argparse.SUPPRESS)
    args = parser.parse_args()
    targets = args.targets.split(",")
    for name in targets:
        if name not in TARGETS:
            raise ValueError(f"--targets {name!r} is not one of {', '.join(TARGETS)}")
    cases = [case.name for case in kernel_cases.compiled() if args.only in case.name]
    if not cases:
        raise ValueError(f"--only {args.only!r} fits none of {', '.join(case.name for case in kernel_cases.compiled())}")
    if args.child:
        return child(targets[0], cases, args.child)
    sites = {name: install(TARGETS[name], args.packages) for name in targets}
    if args.install:
        return 0
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        rows = [row for found in pool.map(lambda name: parent(name, cases, sites[name]), targets) for row in found]
    print(text_table(rows))
    recorded = read_record()
    if args.update:
        done = {(row["target"], row["case"]) for row in rows}
        kept = [row for row in recorded if (row["target"], row["case"]) not in done]
        RECORD.write_text(HEADER + markdown_table(sorted(kept + rows, key=order)) + "\n")
        recorded = []
    problems = check(rows, recorded)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return int(bool(problems))


def order(row: dict) -> tuple:
    """Rows by case, then target."""
    return row["case"].split("/")[0], row["case"], row["target"], row["kernel"]


def parent(name: str, cases: list[str], site: Path) -> list[dict]:
    """Rows of a target, from child processes: compilers of GPUs may abort the process that they run in."""
    target, left, rows = TARGETS[name], list(cases), []
    while left:
        with tempfile.TemporaryDirectory() as dump:
            variables = os.environ | environment(target, site, dump)
            variables["PYTHONPATH"] = os.pathsep.join([variables["PYTHONPATH"], str(ROOT)])
            command = [sys.executable, __file__, "--child", dump, "--targets", name]
            process = subprocess.Popen(
                command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            out, error = process.communicate(json.dumps(left))
        finished = [json.loads(line) for line in out.splitlines() if line.startswith('{"case"')]
        rows += [row for case in finished for row in case["rows"]]
        done = len({case["case"] for case in finished})
        if done < len(left):
            reason = (error.strip().splitlines() or ["no message"])[-1][:300]
            rows.append({"case": left[done], "target": name, "kernel": f"FAILED: the compiler stopped: {reason}"})
        left = left[done + 1 :]
    return rows


def install(target, folder: Path) -> Path:
    """The folder with the target's compilers."""
    site = folder / f"{target.platform}-jax{jax.__version__}"
    if not (site / ".installed").exists():
        print(f"installing {', '.join(packages(target))} in {site}", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), *packages(target)]
        subprocess.run(command, check=True)
        (site / ".installed").touch()
    return site


def child(name: str, _: list[str], dump: str) -> None:
    """Compiles the cases named on standard input and prints a line of JSON for each."""
    target = TARGETS[name]
    placed = device_sharding(target)
    with kernels_for(target.kind):  # weights are packed in the layout of the device
        by_name = {case.name: case for case in kernel_cases.compiled()}
    for case_name in json.loads(sys.stdin.read()):
        common = {"case": case_name, "target": name}
        fn, args = by_name[case_name].build()
        try:
            reports, facts = compile_case(fn, args, target, placed, dump)
        except Exception as error:  # compilers have many error types; the row says which and the check fails
            rows = [common | {"kernel": f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}"}]
        else:
            facts = {"temp_MB": round(facts["temp_MB"] or 0.0, 1), "jax": jax.__version__}
            rows = [common | {k: "" if v is None else v for k, v in dataclasses.asdict(r).items()} | facts for r in reports]
            rows = rows or [common | {"kernel": no_kernel(fn, args, target)}]
        print(json.dumps({"case": case_name, "rows": rows}), flush=True)


def no_kernel(fn, args, target) -> str:
    """What to say of a program without a kernel: which composition serves, or that one is missing."""
    with kernels_for(target.kind):
        choices = {choice.implementation for choice in explain(fn, *args)}
    return f"none, {' and '.join(sorted(choices))}" if choices <= {"xla", "split"} else "FAILED: no kernel in the program"


def read_record() -> list[dict]:
    """Rows of COMPILED.md."""
    if not RECORD.exists():
        return []
    lines = [line.split("|")[1:-1] for line in RECORD.read_text().splitlines() if line.startswith("|")]
    head, _, *body = ([cell.strip() for cell in line] for line in lines)
    return [{name: int(cell) if cell.isdigit() else cell for name, cell in zip(head, row)} for row in body]


def check(rows: list[dict], recorded: list[dict]) -> list[str]:
    """What is wrong with `rows`, given those recorded."""
    before = {(row["case"], row["target"], row["kernel"], row["jax"]): row for row in recorded}
    problems = []
    for row in rows:
        what = f"{row['case']} on {row['target']}, {row['kernel']}"
        if row["kernel"].startswith("FAILED"):
            problems.append(what)
            continue
        if row.get("spills"):
            problems.append(f"{what}: {row['spills']} bytes of spilled registers")
        old = before.get((row["case"], row["target"], row["kernel"], row.get("jax")))
        if old and row.get("bundles") and row["bundles"] > GROWTH * old["bundles"]:
            problems.append(f"{what}: {row['bundles']} bundles, {old['bundles']} are recorded")
    return problems


if __name__ == "__main__":
    cli.run(main)
