"""What lies beside the weights in a model folder that a Nexus verb writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

from transformers import PreTrainedConfig

from moe_dist.data.atomic import write_durably
from moe_dist.methods.nexus.receipt import Receipt
from moe_dist.models.export import TOKENIZER_FILES
from moe_dist.models.folder import open_weights
from moe_dist.models.nexus.modeling_nexus import MODELS

RECEIPT = "nexus_receipt.json"


def finish(config: PreTrainedConfig, beside: Path, folder: Path, receipt: Receipt, files: Sequence[Path] = ()) -> None:
    """Write what `beside` has of tokenizer and generation config, `files`, the receipt, and config.json last.

    A folder with a config.json is complete.
    """
    found = [file for pattern in (*TOKENIZER_FILES, "generation_config.json") for file in beside.glob(pattern)]
    for file in (*found, *files):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    write_durably(folder / RECEIPT, (json.dumps(receipt.to_dict(), indent=1) + "\n").encode())
    config = deepcopy(config)
    config.dtype = str(open_weights(folder).main_dtype()).removeprefix("torch.")
    if config.model_type.startswith("nexus_"):
        config.architectures = [MODELS[config.model_type.removeprefix("nexus_")][1].__name__]
    write_durably(folder / "config.json", config.to_json_string(use_diff=False).encode())
