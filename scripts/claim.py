"""Measures a system's claim again, prints the table and appends it to scripts/claims/RESULTS.md.

python scripts/claim.py S047 --budget small --seeds 3
"""

import argparse
import datetime
import os
import platform
from pathlib import Path

import jax

from jaxgen import cli
from jaxgen.recipes.claims import reuse
from jaxgen.tables import markdown_table, text_table

HERE = Path(__file__).parent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", help="its number, such as S047; with its name, such as 'S016 AVC-LM', where that has several")
    parser.add_argument("--budget", default="small")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], action="extend", metavar="KEY=VALUE")
    parser.add_argument("--reuse", metavar="DIR", help="keeps base models and tokenizers here, and takes them from here")
    parser.add_argument("--results", default=str(HERE / "claims" / "RESULTS.md"))
    args = parser.parse_args()
    module = find(args.system)
    heading = module.__doc__.strip().splitlines()[0].rstrip(".")
    with reuse(args.reuse):
        claims = module.claim(args.budget, seeds=args.seeds, edits=args.set)
    setting = ", ".join([f"{datetime.date.today()}", machine(), f"budget {args.budget}", *args.set])
    lines = [f"\n## {heading}\n", f"{setting}\n"]
    for claim in claims:
        print(f"\n{claim.title}\n{text_table(claim.rows)}\n{claim.notes}")
        lines += [f"**{claim.title}**\n", markdown_table(claim.rows), f"\n{claim.notes}\n"]
    path = Path(args.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("\n".join(lines))
    print(f"\nappended to {path}")


def find(system: str):
    """The configuration module whose docstring opens with the system's number, or with that and its name.

    Raises:
      ValueError: there is none, or there are several.
    """
    found = {}
    for path in sorted((HERE.parent / "configs").glob("*.py")):
        if path.stem == "__init__":
            continue
        module = cli.load_config_file(str(path))
        name = (module.__doc__ or "").partition(":")[0]
        if f"{name} ".startswith(f"{system} ") and hasattr(module, "claim"):
            found[name] = module
    if system in found:
        return found[system]
    if not found:
        raise ValueError(f"system {system!r}: no file in configs/ opens with it and has a claim")
    if len(found) > 1:
        raise ValueError(f"system {system!r}: there are {', '.join(map(repr, found))}")
    return found.popitem()[1]


def machine() -> str:
    """The kind of machine and the versions."""
    device = jax.local_devices()[0].device_kind
    return f"{device} x{jax.device_count()} ({platform.machine()}, {os.cpu_count()} cores), jax {jax.__version__}"


if __name__ == "__main__":
    cli.run(main)
