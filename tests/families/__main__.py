"""`python -m tests.families [FAMILY ...] [--json FILE]`: every MoE family of the installed transformers, as a table.

Each gets a tiny random model: loaded at EP = 2, outputs and gradients compared with plain transformers, exported and
compared bit for bit. Distances are ‖a−b‖/‖b‖ of the worst tensor, or the worst expert, in float32; above 2e-6 the
gradients are compared once more in float64, and that figure decides. `tensor` is the worst distance with blocks cut
over two ranks, empty where the family's plan does not allow that (`--json` says why). Exit status 1 below 90 %.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers

from tests.families.check import RANKS, Result, as_json, check
from tests.families.tiny import experts_classes
from tests.pool import RankPool

GOAL = 0.9


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.families", description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="only these (all)")
    parser.add_argument("--json", type=Path, help="also write the table there")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    # The same for the ranks, which import anew.
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "DS_ACCELERATOR": "cpu"}

    wanted = [pair for pair in experts_classes() if not args.families or pair[0] in args.families]
    results: list[Result] = []
    pool = RankPool(RANKS)
    print(f"transformers {transformers.__version__}: {len(wanted)} experts classes")
    print(f"{'family':22} {'model':42} {'output':>8} {'gradient':>8} {'float64':>8} {'tensor':>8}  result", flush=True)
    try:
        for family, experts in wanted:
            with tempfile.TemporaryDirectory() as folder:
                result = check(family, experts, Path(folder), pool.run)
            results.append(result)
            verdict = "ok" if result.stage is None else f"FAILED at {result.stage}: {result.reason}"
            double = "" if result.double is None else f"{result.double:.1e}"
            tensor = "" if result.tensor is None else f"{result.tensor:.1e}"
            figures = f"{result.output:8.1e} {result.gradient:8.1e} {double:>8} {tensor:>8}"
            print(f"{family:22} {result.model:42} {figures}  {verdict}", flush=True)
    finally:
        pool.close()
    passed = sum(result.stage is None for result in results)
    print(f"{sum(result.tensor is not None for result in results)} of them over the tensor axis, too")
    print(f"{passed} of {len(results)} pass ({passed / len(results):.0%}, goal {GOAL:.0%})")
    if args.json:
        args.json.write_text(as_json(results) + "\n")
    return 0 if passed >= GOAL * len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
