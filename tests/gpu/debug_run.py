"""`python -m tests.gpu.debug_run RUN CACHE`: the debug config by the training loop, on the device that the loop finds.

A process of its own, so that MOE_DIST_DEVICE=cpu gives the CPU's run beside the GPU's. Needs torch and transformers
only: neither deepspeed nor what reads configurations and data sets for users.
"""

from __future__ import annotations

import sys
from pathlib import Path

from moe_dist.config.load import read_mapping
from moe_dist.config.schema import RunConfig, Source
from moe_dist.train.loop import train

CONFIG = Path(__file__).parents[2] / "configs" / "debug" / "tiny.yaml"


def debug_config(run: Path, cache: Path) -> RunConfig:
    """configs/debug/tiny.yaml, key by key."""
    config = RunConfig()
    for section, values in read_mapping(CONFIG).items():
        for key, value in values.items():
            if section == "data" and key in ("train", "eval"):
                value = [Source(name=name, **source) for name, source in value.items()]
            setattr(getattr(config, section), key, value)
    config.run.name, config.run.dir = "debug", str(run)
    config.data.cache_dir = str(cache)
    return config


if __name__ == "__main__":
    sys.exit(train(debug_config(Path(sys.argv[1]), Path(sys.argv[2]))))
