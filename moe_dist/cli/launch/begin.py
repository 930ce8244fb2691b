"""For batch scripts, before the ranks start: note where the run stands, and clear a request to stop."""

import argparse

from moe_dist.errors import EXIT_OK
from moe_dist.launch.chain import begin


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder")


def run(args: argparse.Namespace) -> int:
    begin(args.run)
    return EXIT_OK
