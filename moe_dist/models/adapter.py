"""A LoRA adapter on disk: PEFT's two files, and a manifest of ours beside them.

    adapter_config.json        rank, alpha, targets: `PeftModel.from_pretrained` reads it
    adapter_model.safetensors  base_model.model.<linear layer>.lora_A.weight [rank, in] and .lora_B.weight [out, rank]
    adapter_manifest.json      name and fingerprint of the base model, how the adapter came about, sha256 of the files

An adapter that someone else has made has no manifest, and is read all the same. Only plain LoRA is understood: a folder
that asks for more (DoRA, biases, whole modules, another scale) is refused, never read in part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_dist.config.strict_json import as_mapping, read_json, write_json
from moe_dist.data.atomic import new_folder, write_durably
from moe_dist.errors import UserError
from moe_dist.models.folder import WeightFiles, describe_file, open_file

if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG, WEIGHTS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "adapter_manifest.json"
FORMAT = 1
PREFIX = "base_model.model."
# What a plain LoRA leaves alone; PEFT writes many more keys, which change nothing or only how A and B began.
PLAIN = {
    "bias": ("none",),
    "use_dora": (False,),
    "use_rslora": (False,),
    "use_qalora": (False,),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "init_lora_weights": (True, False, "gaussian"),  # some of the others change the base model too
}


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter whose files are sound. Tensors are read when asked for.

    targets: the linear layers that it changes, by their names in the model, in order of name. base_model,
    base_fingerprint: what the manifest says of the model that it was trained on; None where there is none.
    """

    folder: Path
    rank: int
    alpha: float
    targets: tuple[str, ...]
    files: WeightFiles
    manifest: dict[str, Any] | None

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @cached_property
    def base_model(self) -> str | None:
        return None if self.manifest is None else self.manifest["base"].get("model")

    @cached_property
    def base_fingerprint(self) -> str | None:
        return None if self.manifest is None else self.manifest["base"].get("fingerprint")

    def shape(self, target: str) -> tuple[int, int]:
        """(out, in) of the linear layer that A and B are for."""
        return self.files.tensors[_key(target, "B")].shape[0], self.files.tensors[_key(target, "A")].shape[1]

    def pair(self, target: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A `[rank, in]` and B `[out, rank]` of a linear layer, in the dtype that is stored."""
        return self.files.read(_key(target, "A")), self.files.read(_key(target, "B"))

    def check_base(self, folder: str | Path, fingerprint: str) -> None:
        """UserError where the adapter is known to be for another model than that in `folder`."""
        if self.base_fingerprint not in (None, fingerprint):
            raise UserError(
                f"{self.folder}: made for another base model. {folder} has the fingerprint {fingerprint}, the adapter "
                f"belongs to {self.base_model} with {self.base_fingerprint}"
            )

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """UserError unless a model has all targets. shapes: of the weights of its linear layers, by layer name."""
        for target in self.targets:
            if target not in shapes:
                raise UserError(f"{self.folder}: {target} is no linear layer of this model")
            if self.shape(target) != tuple(shapes[target]):
                raise UserError(
                    f"{self.folder}: {target} is for a weight {list(self.shape(target))}, "
                    f"but this model's is {list(shapes[target])}"
                )


def open_lora(folder: str | Path) -> LoraAdapter:
    """Open an adapter and check it by itself: configuration, tensors, and the manifest's sizes and hashes.

    Raises UserError that names the file, and the key or tensor in it.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is no LoRA adapter of PEFT: there is no {name} in it")
    manifest = _checked_manifest(folder)
    rank, alpha = _plain_lora(folder / CONFIG)
    files = open_file(folder / WEIGHTS)
    targets = sorted({key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in files.tensors if ".lora_" in key})
    expected = {_key(target, part) for target in targets for part in "AB"}
    wrong = sorted(expected ^ files.tensors.keys())
    if wrong:
        what = "is missing" if wrong[0] in expected else "is no tensor of a plain LoRA"
        raise UserError(f"{folder / WEIGHTS}: {wrong[0]} {what}")
    for target in targets:
        shapes = [files.tensors[_key(target, part)].shape for part in "AB"]
        if any(len(shape) != 2 for shape in shapes) or shapes[0][0] != rank or shapes[1][1] != rank:
            found = " and ".join(str(list(shape)) for shape in shapes)
            raise UserError(f"{folder / WEIGHTS}: {target}: A and B are {found}, which is not of rank {rank}")
    return LoraAdapter(folder, rank, alpha, tuple(targets), files, manifest)


def write_lora(
    folder: str | Path, config: LoraConfig, tensors: Mapping[str, torch.Tensor], manifest: Mapping[str, Any]
) -> Path:
    """Write an adapter that appears whole or not at all. One process.

    folder: new or empty. config: PEFT's, see `models.lora.injected_config`. tensors: by their names in the model with
    LoRA in it. manifest: what it says, `base` (model, fingerprint) among it; format and hashes come along.
    """
    from safetensors.torch import save

    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} already exists and is not empty; write to a new folder or remove it first")
    fields = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    fields |= {"base_model_name_or_path": manifest["base"]["model"], "inference_mode": True}
    named = {PREFIX + name.replace(".default.", "."): tensor.contiguous() for name, tensor in tensors.items()}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder, marker=CONFIG) as partial:
            write_durably(partial / WEIGHTS, save(named, metadata={"format": "pt"}))
            write_json(partial / CONFIG, fields)
            files = {name: describe_file(partial / name) for name in (CONFIG, WEIGHTS)}
            write_json(partial / MANIFEST, {"format": FORMAT, **manifest, "files": files})
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
    return folder


def _key(target: str, part: str) -> str:
    return f"{PREFIX}{target}.lora_{part}.weight"


def _plain_lora(path: Path) -> tuple[int, float]:
    """(rank, alpha) of a configuration that asks for nothing but plain LoRA."""
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA is understood")
    for name, allowed in PLAIN.items():
        if name in config and config[name] not in allowed:
            raise UserError(f"{path}: {name} is {config[name]!r}, which is more than plain LoRA")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or alpha <= 0:
        raise UserError(f"{path}: r={rank!r} and lora_alpha={alpha!r} have to be numbers above 0")
    return rank, float(alpha)


def _checked_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path}: format {manifest.get('format')!r}; this version reads {FORMAT}")
    as_mapping(manifest.get("base"), f"{path}: base")
    files = as_mapping(manifest.get("files"), f"{path}: files")
    for name in (CONFIG, WEIGHTS):
        if files.get(name) != describe_file(folder / name):
            raise UserError(
                f"{folder / name} is damaged: size or sha256 differ from {MANIFEST}; copy the adapter again"
            )
    return manifest
