"""Says whether a training fits devices that need not be attached: memory, work and traffic of one update of each stage.

python scripts/plan.py --config configs/var.py --variant d30 --device v5e-64 --mesh data=8,fsdp=8
python scripts/plan.py --config configs/llamagen.py --variant 3b --device v5p-128 --propose      # settings that fit
python scripts/plan.py --config configs/var.py --variant d16 --device h100-8 --mesh fsdp=8

TPUs are compiled for by libtpu, which has to be installed (`pip install 'jaxgen[tpu]'`) but needs no TPU. For GPUs the program is
compiled for as many CPU devices: parameters and traffic are theirs, temporaries an estimate. Data are read for the shapes of a
batch; `--set data.path=world` draws pictures instead.
"""

import argparse
import os

import jax

from jaxgen import cli
from jaxgen.plan import parse_devices, plan_updates, proposals
from jaxgen.tables import markdown_table, text_table

# No device is used, and libtpu must not look for one.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a file with get_config(variant)")
    parser.add_argument("--variant", required=True)
    parser.add_argument("--device", required=True, help="such as v5e-64, v5p-128, v6e-256, h100-8")
    parser.add_argument("--mesh", help="axes and sizes, such as data=8,fsdp=8; all devices on data if left out")
    parser.add_argument("--only", default="", help="stages whose name contains this")
    parser.add_argument("--propose", action="store_true", help="tries meshes, recomputation and smaller batches until one fits")
    parser.add_argument("--set", nargs="*", default=[], action="extend", metavar="KEY=VALUE", help="edits of the configuration")
    parser.add_argument("--markdown", action="store_true", help="prints the table for a page")
    args = parser.parse_args()
    if args.propose and args.mesh:
        raise ValueError(f"--mesh {args.mesh}: --propose chooses the mesh")
    devices = parse_devices(args.device)
    jax.config.update("jax_platforms", "cpu")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not devices.chip.topologies:
        jax.config.update("jax_num_cpu_devices", devices.count)
    recipe = cli.load_config_file(args.config).get_config(args.variant).override(args.set)
    if hasattr(recipe.config.data, "workers"):
        recipe = recipe.override(["data.workers=0"])  # one batch is not worth a process
    recipe = recipe.config.resolve().recipe()
    table = markdown_table if args.markdown else text_table
    if not args.propose:
        rows = list(plan_updates(recipe, devices, args.mesh, only=args.only))
        if not rows:
            raise ValueError(f"--only {args.only!r} fits none of the stages that are trained")
        print(table(rows))
        return
    fits = False
    for mesh, edits, rows in proposals(recipe, devices, only=args.only or "generator"):
        fits = all(row["fits"] for row in rows)
        print(f"\n{'fits' if fits else 'does not fit'}: --mesh {mesh} {'--set ' + ' '.join(edits) if edits else ''}".rstrip())
        print(table(rows), flush=True)
    if not fits:
        raise ValueError(f"--device {args.device}: nothing that was tried fits; more devices are needed")


if __name__ == "__main__":
    cli.run(main)
