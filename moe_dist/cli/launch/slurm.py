"""Render the batch script that trains CONFIG.yaml under SLURM: show it, write it into the run folder, submit it.

examples:
  moe-dist launch slurm my.yaml --nodes 2 --gpus-per-node 8 --time 24:00:00 --requeue --dry-run
  moe-dist launch slurm my.yaml train.lr=1e-5 --nodes 2 --gpus-per-node 8 --account me --submit
  moe-dist launch slurm configs/debug/tiny.yaml --nodes 2 --gpus-per-node 0 --ranks-per-node 2 --dry-run     on CPUs
"""

import argparse
import sys

from moe_dist.errors import EXIT_OK, UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from moe_dist.launch.slurm import LAUNCHERS

    parser.add_argument("config", metavar="CONFIG.yaml", help="configuration of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values over those of the file")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (1)")
    parser.add_argument("--gpus-per-node", type=int, required=True, metavar="N", help="GPUs of a node; 0 = CPUs only")
    parser.add_argument("--ranks-per-node", type=int, metavar="N", help="ranks of a node; one a GPU when absent")
    parser.add_argument("--cpus-per-node", type=int, metavar="N", help="cores of a node; whole nodes when absent")
    parser.add_argument("--account", help="account that pays")
    parser.add_argument("--partition", help="partition; the cluster's default when absent")
    parser.add_argument("--time", metavar="LIMIT", help="time limit, as SLURM writes it: 24:00:00, 2-00:00:00")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--container", metavar="IMAGE", help="image in which the ranks run (Pyxis)")
    place.add_argument("--venv", metavar="DIR", help="virtual environment on the nodes; the one of this when absent")
    parser.add_argument("--container-mounts", metavar="A:B,...", help="mounts besides the working and the run folder")
    parser.add_argument("--requeue", action="store_true", help="start again after a preemption or a passing failure")
    parser.add_argument(
        "--signal-lead", type=int, default=300, metavar="S", help="seconds before the limit to save and stop (300)"
    )
    parser.add_argument("--launcher", default="torchrun", choices=LAUNCHERS, help="what starts the ranks of a node")
    parser.add_argument("--dry-run", action="store_true", help="show the script; write and submit nothing")
    parser.add_argument("--submit", action="store_true", help="hand the script to sbatch")


def run(args: argparse.Namespace) -> int:
    from moe_dist.config.checks import check_layout, check_world
    from moe_dist.config.load import load
    from moe_dist.launch import slurm

    if args.dry_run and args.submit:
        raise UserError("--dry-run submits nothing: leave out one of --dry-run and --submit")
    if not (args.ranks_per_node or args.gpus_per_node):
        raise UserError("--gpus-per-node 0 needs --ranks-per-node: how many ranks share a node's cores")
    job = slurm.SlurmJob(
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        ranks_per_node=args.gpus_per_node if args.ranks_per_node is None else args.ranks_per_node,
        python=slurm.interpreter(venv=args.venv, container=args.container),
        account=args.account,
        partition=args.partition,
        time=args.time,
        cpus_per_node=args.cpus_per_node,
        container=args.container,
        mounts=tuple(args.container_mounts.split(",")) if args.container_mounts else (),
        requeue=args.requeue,
        signal_lead=args.signal_lead,
        launcher=args.launcher,
    )
    config = load(args.config, args.overrides)
    script = slurm.render(
        job, name=config.run.name, run_dir=config.run.dir, config=args.config, overrides=args.overrides
    )
    # What the ranks would find wrong is said here, not after hours in the queue.
    check_world(config, job.world_size)
    check_layout(config, job.world_size)
    print(script, end="", flush=True)
    if args.dry_run:
        return EXIT_OK
    path = slurm.write(script, config.run.dir)
    answer = slurm.submit(path) if args.submit else f"submit it with: sbatch {path}"
    print(f"moe-dist: wrote {path}; {answer}", file=sys.stderr)
    return EXIT_OK
