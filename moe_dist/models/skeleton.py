"""Skeletons: a stock transformers model on the meta device, built from a folder's or an inline configuration."""

from __future__ import annotations

import json
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from moe_dist.errors import UserError
from moe_dist.models.families import unknown_family
from moe_dist.models.nexus import modeling_nexus as _registers_nexus  # noqa: F401


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a model folder. No code of the folder is ever run.

    Raises UserError for a missing or broken config.json, an unknown model type, and quantised weights.
    """
    path = folder / "config.json"
    if not path.is_file():
        run = (folder / "checkpoints").is_dir()
        hint = f". It is a run; `moe-dist export {folder} OUT` writes its model" if run else ""
        raise UserError(f"{folder} is not a model folder: it has no config.json{hint}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(values, dict)
    except (ValueError, AssertionError):
        raise UserError(f"{path} is not a JSON object") from None
    return make_config(values, where=str(path), folder=folder)


def make_config(values: dict, *, where: str, folder: Path | None = None) -> PreTrainedConfig:
    """A configuration from its JSON values (`model_type` says which); `where` is named in errors."""
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise unknown_family(model_type)
    quantised = values.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise UserError(
            f"{where}: the weights are quantised ({method}), which cannot be trained. Load the model once with "
            "transformers and its dequantize option, save_pretrained it in bfloat16, and use that folder"
        )
    try:
        if folder is not None:
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return AutoConfig.for_model(**values)
    except Exception as error:  # transformers validates with many exception types of its own
        raise UserError(f"{where}: transformers does not accept this configuration: {error}") from error


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The transformers class that a configuration names, else its causal language model, else its base model."""
    code = import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    for name in config.architectures or ():
        found = getattr(transformers, name, None) or getattr(code, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            found = auto._model_mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise unknown_family(config.model_type)


def build_skeleton(
    config: PreTrainedConfig, dtype: torch.dtype, cls: type[PreTrainedModel] | None = None
) -> PreTrainedModel:
    """The stock model on the meta device, with no weights, of class `cls` or of the one that the configuration names.

    `config.dtype` becomes `dtype`.
    """
    config.dtype = dtype
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            getattr(config, name).dtype = dtype
    cls = cls or model_class(config)
    with ExitStack() as contexts:
        # What from_pretrained builds under: meta device, default dtype, tensors not tied yet. Where a Trainer's
        # settings ask for ZeRO 3, it would partition instead: hence the True, and the device once more.
        for context in (*cls.get_init_context(dtype, False, True, None), torch.device("meta")):
            contexts.enter_context(context)
        return cls(config)
