"""Generation in Self-MoE: writing the data against plain `model.generate`, and a mixture against its base.

python -m benchmarks.self_moe_generation [--json FILE] [--full]
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks._harness import run
from benchmarks._self_moe_data import data_generation
from benchmarks._self_moe_mixture import mixture_generation


def main() -> None:
    torch.set_num_threads(1)  # a rank's share, as when all cores generate
    run("self_moe_generation", collect, description=__doc__.splitlines()[0])


def collect(full: bool) -> Iterator[dict | str]:
    yield from data_generation(full)
    yield from mixture_generation(full)


if __name__ == "__main__":
    main()
