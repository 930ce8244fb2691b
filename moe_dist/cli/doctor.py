"""Check this machine and the installation. Exits with 0 where everything that is needed works.

A line is marked `ok`, `--` (works, but worth knowing) or `!!` (will not work).
"""

import argparse

from moe_dist.errors import EXIT_OK, EXIT_USER

MARKS = {"ok": "ok", "note": "--", "bad": "!!"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`doctor` has no arguments."""


def run(args: argparse.Namespace) -> int:
    from moe_dist.launch.doctor import examine

    bad = 0
    for finding in examine():
        bad += finding.state == "bad"
        print(f"{MARKS[finding.state]}  {finding.name:<13} {finding.text}", flush=True)
    print("this machine is ready" if not bad else f"{bad} thing{'s' * (bad > 1)} to repair, marked !!")
    return EXIT_USER if bad else EXIT_OK
