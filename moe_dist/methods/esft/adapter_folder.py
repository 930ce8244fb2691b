"""An adapter on disk: the files of the ESFT repository, and a manifest of ours beside them.

    model.safetensors      full weights of the selected experts (several files and an index where there are many)
    expert_cfg.json        which experts, as `esft select` writes it
    adapter_manifest.json  fingerprint of the base model, sizes and sha256 of the files, how the experts were chosen

An adapter of the official code has no manifest. It is read all the same; its base is then not checked.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_dist.checkpoint import fingerprint
from moe_dist.config.expert_files import ExpertConfig, read_expert_config
from moe_dist.config.strict_json import as_mapping, read_json
from moe_dist.errors import UserError
from moe_dist.methods.esft.adapter_names import AdapterNames, ExpertTensor
from moe_dist.models.conversion import TensorGroup
from moe_dist.models.folder import INDEX, TensorInfo, WeightFiles, describe_file, open_weights
from moe_dist.train.trainable import is_shared_expert

EXPERTS, MANIFEST = "expert_cfg.json", "adapter_manifest.json"
FORMAT = 1
_SHOWN = 4


@dataclass(frozen=True)
class Base:
    """A model folder that adapters are made for."""

    folder: Path

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.folder)


@dataclass
class Adapter:
    """An adapter that fits a model, with every tensor's place in it. Reads tensors only when asked.

    experts: each expert's tensor -> the keys of its parts. dense: groups of other tensors, by keys.
    """

    folder: Path
    config: ExpertConfig
    manifest: dict[str, Any] | None
    names: AdapterNames
    files: WeightFiles
    experts: dict[ExpertTensor, tuple[str, ...]] = field(default_factory=dict)
    dense: list[TensorGroup] = field(default_factory=list)

    def expert(self, tensor: ExpertTensor) -> torch.Tensor:
        """An expert's tensor as the stock model has it, in the dtype that is stored."""
        return self.names.layouts[tensor.name].join([self._read(key) for key in self.experts[tensor]])

    def others(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(stock name, tensor) of everything outside the routed experts."""
        for group in self.dense:
            yield from group.convert({key: self._read(key) for key in group.names()}, self.names.skeleton).items()

    def dense_names(self) -> set[str]:
        """The stock names of `others`."""
        metas = {key: torch.empty(info.shape, device="meta") for key, info in self.files.tensors.items()}
        return {name for group in self.dense for name in group.convert(metas, self.names.skeleton)}

    def check_base(self, base: Base | None) -> None:
        """UserError unless `base` is the very model that the adapter was trained on.

        Says in one line where that cannot be known, as for an adapter of the official code.
        """
        made_for = {} if self.manifest is None else self.manifest["base"]
        wanted, name = made_for.get("fingerprint"), made_for.get("model")
        if wanted is None:
            why = "no manifest" if self.manifest is None else "no base model in its manifest"
            print(
                f"warning: {self.folder}: {why}, so names and shapes are checked but not the base model",
                file=sys.stderr,
                flush=True,
            )
        elif base is None:
            raise UserError(
                f"{self.folder}: whether it belongs to this model cannot be told, since the model does not say which "
                f"folder it was loaded from; name that folder with base=... (the adapter was made for {name})"
            )
        elif base.fingerprint != wanted:
            raise UserError(
                f"{self.folder}: made for another base model. {base.folder} has the fingerprint {base.fingerprint}, "
                f"the adapter belongs to {name} with {wanted}"
            )

    def _read(self, key: str) -> torch.Tensor:
        return self.files.read(key if key in self.files.tensors else _legacy(key))


def open_adapter(folder: str | Path, names: AdapterNames) -> Adapter:
    """Open an adapter for a model of these names, and check it as a whole before anything of it is used.

    Every file of the manifest is read and compared; every tensor that the expert config asks for has to be there in
    its shape, and no other. Keys that begin with "layers.", as old adapters have them, mean "model.layers.".
    Raises UserError that names the file or the tensors.
    """
    folder = Path(folder)
    if not (folder / EXPERTS).is_file():
        raise UserError(f"{folder} is no complete adapter: there is no {EXPERTS} in it")
    manifest = _checked_manifest(folder)
    config = read_expert_config(folder / EXPERTS)
    files = open_weights(folder)
    adapter = Adapter(folder, config, manifest, names, files)
    stored = _by_new_key(files, folder)
    try:
        wanted = names.expert_tensors(config.experts)
    except UserError as error:
        raise UserError(f"{folder / EXPERTS}: {error}") from None
    wrong: list[str] = []
    for tensor in wanted:
        adapter.experts[tensor] = names.keys(tensor)
        for key, shape in zip(names.keys(tensor), names.part_shapes(tensor), strict=True):
            _compare(key, stored.pop(key, None), shape, wrong)
    dense = names.dense_shapes()
    rest = {key: info for key, info in stored.items() if key in dense}
    for key, info in rest.items():
        del stored[key]
        _compare(key, info, dense[key], wrong)
    for key in stored:
        where = names.places.get(key)
        wrong.append(f"{key} is of an expert that {EXPERTS} does not name" if where else f"{key} is unknown")
    if not wrong:
        adapter.dense = names.read_dense({key: info.shape for key, info in rest.items()}) if rest else []
        wrong = _against_flags(config, adapter.dense_names())
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UserError(f"{folder} does not fit this model: {'; '.join(wrong[:_SHOWN])}{more}")
    return adapter


def find_base(model: PreTrainedModel) -> Base | None:
    """What a model was loaded from, without asking the network; None where nothing says it."""
    if getattr(model, "source_folder", None) is not None:
        return Base(model.source_folder)
    name = getattr(model, "name_or_path", None) or getattr(model.config, "name_or_path", None)
    if not name or Path(name).is_dir():
        return Base(Path(name)) if name else None
    from huggingface_hub import snapshot_download

    try:
        return Base(Path(snapshot_download(name, local_files_only=True)))
    except Exception:  # no name of the hub, or not in its cache: the client has many exception types
        return None


def weight_files(folder: Path) -> list[Path]:
    """The files of an adapter that the manifest vouches for."""
    return sorted([*folder.glob("model*.safetensors"), *folder.glob(INDEX), folder / EXPERTS])


def _checked_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path}: format {manifest.get('format')!r}; this version reads {FORMAT}")
    as_mapping(manifest.get("base"), f"{path}: base")
    for name, record in as_mapping(manifest.get("files"), f"{path}: files").items():
        file = folder / name
        if file.parent != folder or not file.is_file():
            raise UserError(f"{folder}: {name} is missing")
        if describe_file(file) != record:
            raise UserError(f"{file} is damaged: size or sha256 differ from {MANIFEST}; copy the adapter again")
    unknown = [file.name for file in weight_files(folder) if file.name not in manifest["files"]]
    if unknown:
        raise UserError(f"{folder}: {', '.join(unknown)} is not in {MANIFEST}: two adapters in one folder?")
    return manifest


def _by_new_key(files: WeightFiles, folder: Path) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    for key, info in files.tensors.items():
        new = f"model.{key}" if key.startswith("layers.") else key
        if new in found:
            raise UserError(f"{folder}: {new} is there twice, once under its old name {_legacy(new)}")
        found[new] = info
    return found


def _legacy(key: str) -> str:
    return key.removeprefix("model.")


def _compare(key: str, info: TensorInfo | None, shape: tuple[int, ...], wrong: list[str]) -> None:
    if info is None:
        wrong.append(f"{key} is missing")
    elif info.shape != shape:
        wrong.append(f"{key} is {list(info.shape)}, expected {list(shape)}")
    elif not info.dtype.is_floating_point:
        wrong.append(f"{key} is {info.dtype}, expected floating point")


def _against_flags(config: ExpertConfig, dense: set[str]) -> list[str]:
    """What is wrong with the tensors outside the routed experts, by the two flags of the expert config."""
    wrong = []
    for flag, says, there in (
        ("shared_experts", config.shared_experts, {name for name in dense if is_shared_expert(name)}),
        ("non_expert_modules", config.non_expert_modules, {name for name in dense if not is_shared_expert(name)}),
    ):
        if says and not there:
            wrong.append(f"{EXPERTS} has {flag}: true, but there is no tensor of them")
        if there and not says:
            wrong.append(f"{min(there)} is there, but {EXPERTS} has {flag}: false")
    return wrong
