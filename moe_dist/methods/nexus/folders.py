"""Model folders that others are made of: opened, and checked to fit together before anything is written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from moe_dist.checkpoint import fingerprint
from moe_dist.errors import UserError
from moe_dist.methods.nexus.vocabulary import check_same_tokens
from moe_dist.models.folder import TensorInfo, WeightFiles, open_weights
from moe_dist.models.loading import resolve_folder
from moe_dist.models.nexus.configuration_nexus import CONFIGS, MODEL_TYPES
from moe_dist.models.skeleton import read_config

# What may differ between the configurations of models that fit together.
FREE_KEYS = (
    "_name_or_path", "architectures", "dtype", "transformers_version", "use_cache", "attention_dropout",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
_DERIVED = re.compile(r"rotary_emb\.inv_freq$")
_MLP = re.compile(r"^(model\.layers\.(\d+)\.mlp)\.(gate_proj|up_proj|down_proj)\.weight$")


@dataclass(frozen=True)
class ModelFolder:
    """A dense or Nexus model on disk. name: what it is called in messages and receipts."""

    name: str
    folder: Path
    config: PreTrainedConfig
    files: WeightFiles
    tensors: dict[str, TensorInfo]

    def read(self, key: str) -> torch.Tensor:
        """A tensor, mapped from the file where that is possible: not to be written to."""
        return self.files.read(key)

    @property
    def identity(self) -> dict:
        return {"name": self.name, "folder": str(self.folder), "fingerprint": fingerprint(self.folder)}


def open_dense(name: str, folder: str | Path) -> ModelFolder:
    """Open a dense model of a family that can be upcycled. Raises UserError for anything else."""
    return _open(name, folder, tuple(CONFIGS), "a dense model of the families")


def open_nexus(name: str, folder: str | Path) -> ModelFolder:
    """Open a Nexus model. Raises UserError for anything else."""
    return _open(name, folder, MODEL_TYPES, "a Nexus model; these are")


def _open(name: str, folder: str | Path, types: tuple[str, ...], wanted: str) -> ModelFolder:
    place = resolve_folder(folder)
    config = read_config(place)
    if config.model_type not in types:
        raise UserError(f"{name} ({folder}) is a {config.model_type}, not {wanted} {', '.join(types)}")
    if getattr(config, "mlp_bias", False):
        raise UserError(f"{name} ({folder}) has biases in its MLPs (mlp_bias=true), which routed experts do not have")
    files = open_weights(place)
    tensors = {key: info for key, info in files.tensors.items() if not _DERIVED.search(key)}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)  # some trainers store the tied copy too
    return ModelFolder(name, place, config, files, tensors)


def check_alike(models: Sequence[ModelFolder]) -> None:
    """Raise UserError where a model differs from the first in configuration, vocabulary, tensors, shapes or dtypes."""
    first = models[0]
    known = _comparable(first.config)
    for other in models[1:]:
        what = f"{other.name} ({other.folder}) and {first.name} ({first.folder})"
        if other.config.model_type != first.config.model_type:
            raise UserError(
                f"{what} are of different families: {other.config.model_type} and {first.config.model_type}"
            )
        if other.config.vocab_size != first.config.vocab_size:
            raise UserError(
                f"{what} have different vocabularies: {other.config.vocab_size} and {first.config.vocab_size} tokens; "
                "experts have to be trained from the seed with its tokenizer"
            )
        check_same_tokens(what, other.folder, first.folder)
        theirs = _comparable(other.config)
        differing = sorted(key for key in known.keys() | theirs.keys() if known.get(key) != theirs.get(key))
        if differing:
            shown = ", ".join(f"{key} ({theirs.get(key)} and {known.get(key)})" for key in differing[:6])
            raise UserError(f"{what} have different configurations: {shown}")
        extra, missing = sorted(other.tensors.keys() - first.tensors), sorted(first.tensors.keys() - other.tensors)
        if extra or missing:
            side = f"{other.name} alone has {extra[0]}" if extra else f"{other.name} lacks {missing[0]}"
            raise UserError(f"{what} hold different tensors: {side}, and {len(extra) + len(missing) - 1} more differ")
        for key, info in first.tensors.items():
            found = other.tensors[key]
            if found.shape != info.shape:
                raise UserError(f"{what}: {key} has different shapes, {list(found.shape)} and {list(info.shape)}")
            if found.dtype != info.dtype:
                raise UserError(
                    f"{what}: {key} has different dtypes, {_plain(found.dtype)} and {_plain(info.dtype)}; convert one "
                    "of the models first, so that nothing is rounded unasked"
                )


def mlp_part(key: str) -> tuple[str, str] | None:
    """(path of the MLP, `gate_proj` and so on) of a dense model's MLP weight; None for any other tensor."""
    found = _MLP.match(key)
    return (found[1], found[3]) if found else None


def check_can_join(new: ModelFolder, model: ModelFolder) -> None:
    """Raise UserError where a dense model cannot become an expert of a Nexus model: another shape, or other dtypes."""
    what = f"{new.name} ({new.folder}) cannot join {model.name} ({model.folder})"
    family = model.config.model_type.removeprefix("nexus_")
    if new.config.model_type != family:
        raise UserError(f"{what}: it is a {new.config.model_type}, not a {family}")
    mine, theirs = _comparable(model.config), _comparable(new.config)
    differing = sorted(key for key in theirs if key != "model_type" and mine.get(key) != theirs[key])
    if differing:
        shown = ", ".join(f"{key} ({theirs[key]} and {mine.get(key)})" for key in differing[:6])
        raise UserError(f"{what}: different configurations: {shown}")
    check_same_tokens(f"{new.name} ({new.folder}) and {model.name} ({model.folder})", new.folder, model.folder)
    lacking = sorted(key for key in model.tensors if ".mlp." not in key and key not in new.tensors)
    if lacking:
        raise UserError(f"{what}: it has no {lacking[0]}")
    for key, info in new.tensors.items():
        mlp = mlp_part(key)
        place = key if mlp is None else f"{mlp[0]}.experts.0.{mlp[1]}.weight"
        found = model.tensors.get(place)
        if found is None or (found.shape, found.dtype) != (info.shape, info.dtype):
            theirs = "is missing" if found is None else f"is {_plain(found.dtype)} {list(found.shape)}"
            raise UserError(f"{what}: {key} is {_plain(info.dtype)} {list(info.shape)}, but {place} {theirs} there")


def _comparable(config: PreTrainedConfig) -> dict:
    return {key: value for key, value in config.to_dict().items() if key not in FREE_KEYS}


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
