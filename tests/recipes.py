"""Running a recipe as a user would, in a process of its own without a network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_recipe(recipe: Path) -> str:
    """What `moe-dist run` printed; it must have ended well."""
    done = subprocess.run(
        [sys.executable, "-m", "moe_dist", "run", str(recipe)],
        capture_output=True, text=True, timeout=900, cwd=recipe.parent,
        env={"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HF_HUB_OFFLINE": "1",
             "OMP_NUM_THREADS": "1", "HOME": str(recipe.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
