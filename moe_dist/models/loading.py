"""Loading: a Hugging Face folder becomes a transformers model with our experts, each rank reading only its share.

The model is built on the meta device, the experts modules are replaced, and every rank then reads the tensors that it
holds: peak memory is its share plus one tensor. Everything is checked on the headers of the files before any weight is
read, so all ranks raise the same error at the same place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from moe_dist.errors import UserError
from moe_dist.models.conversion import ReadPlan, TensorGroup, plan_reading, used_transforms
from moe_dist.models.cut import swap_and_cut
from moe_dist.models.families import ExpertsDescription, describe_experts, expert_counts, our_name, unknown_family
from moe_dist.models.folder import TensorInfo, WeightFiles, open_weights
from moe_dist.models.layout import ExpertTensorLayout
from moe_dist.models.mixse.loading import read_experts
from moe_dist.models.mixse.spec import read_spec
from moe_dist.models.skeleton import build_skeleton, read_config
from moe_dist.models.surgery import Seating, Trainable
from moe_dist.moe.layer import MoEExperts
from moe_dist.parallel.grid import Grid
from moe_dist.parallel.shard import shard_of

HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def load_model(
    folder: str | Path,
    grid: Grid | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    trainable: Trainable = None,
    placement: Seating = "contiguous",
    dense: bool = False,
) -> PreTrainedModel:
    """The transformers model in `folder` with a `moe_dist.moe` layer in every MoE block, this rank's share of it; of a
    MiXSE folder, the dense model with its LoRA experts and their router.

    folder: a local folder or the name of a model on the Hugging Face hub. grid: None is one process. dtype: of the
    model, None as stored; tensors that transformers keeps in fp32 whatever the model's dtype stay in fp32.
    trainable: layer path -> ids of the experts that train; None trains all. placement, dense: see `surgery.swap`.

    Every rank of the grid calls it with the same arguments; nothing is communicated. The model is in eval mode, as
    `from_pretrained` leaves it. Raises UserError naming the tensors where folder and model do not match exactly, and
    for everything else that is wrong with the folder.
    """
    grid = grid or Grid.single()
    folder = resolve_folder(folder)
    config = read_config(folder)
    files = open_weights(folder)
    dtype = files.main_dtype() if dtype is None else parse_dtype(dtype)
    model = build_skeleton(config, dtype)
    descriptions = describe_experts(model)
    mixture = read_spec(config)
    if not descriptions and not dense and mixture is None:
        raise unknown_family(config.model_type)
    shapes = {key: info.shape for key, info in files.tensors.items()}
    plan = plan_reading(model, shapes, expert_counts(descriptions))
    absent, targets = _check(model, plan, descriptions, files.tensors)

    materialise_buffers(model, absent, grid.device)
    tied, dtypes = dict(model.all_tied_weights_keys), DtypePlan(model, dtype)
    layers = swap_and_cut(model, grid, trainable=trainable, placement=placement, dense=dense)
    homes = _homes(model, targets, descriptions, tied if grid.pipeline > 1 else {})
    with files, torch.no_grad():
        if grid.pipeline > 1:
            _check_tied(tied, plan, files)
        for _, layer in layers:
            _read_experts(layer, plan.experts, files, dtypes)
        for group in plan.dense:
            if any(homes[name] for name in targets[group.first_target]):
                _read_dense(model, group, files, dtypes, homes, grid.device)
    if mixture is not None:
        read_experts(model, mixture, folder)
    model.tie_weights(missing_keys=absent, recompute_mapping=False)
    # transformers' own save_pretrained and our export both undo what was needed to read the folder.
    model._weight_conversions = used_transforms(plan)
    model.source_folder = folder
    _read_generation_config(model, folder)
    return model.eval()


def resolve_folder(folder: str | Path) -> Path:
    """A local folder as it is; anything that looks like a hub name is downloaded (or found in the hub's cache)."""
    path = Path(folder).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{folder} is a file; expected a model folder")
    name = str(folder)
    if not re.fullmatch(r"[\w\-.]+(/[\w\-.]+)?", name) or name.startswith(".") or isinstance(folder, Path):
        raise UserError(f"no model folder {folder}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the hub client has many exception types, network ones included
        raise UserError(
            f"{name} is neither a local folder nor a model that the Hugging Face hub gives: {error}"
        ) from error


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A floating torch dtype from itself or its name, such as "bfloat16"."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"dtype {dtype!r} is not a floating-point dtype of torch; try 'bfloat16' or 'float32'")
    return found


class DtypePlan:
    """Which tensors transformers keeps in fp32 whatever the model's dtype, by their stock names."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype):
        plan = model._get_dtype_plan(dtype)
        self.kept = [(re.compile(pattern.replace("*", ".*")), kept) for pattern, kept in plan.items()]

    def get(self, name: str, default: torch.dtype) -> torch.dtype:
        return next((kept for pattern, kept in self.kept if pattern.search(name)), default)


def materialise_buffers(model: PreTrainedModel, absent: set[str], device: torch.device) -> None:
    """Give values to everything that no folder stores: buffers such as rotary frequencies, and `absent` tensors.

    Uses the model's own initialisation, which leaves alone what is marked as initialised; the marked tensors stay on
    the meta device. Random values, if any, are the same on every rank.
    """
    unstored = {name for name, _ in model.named_non_persistent_buffers()} | absent
    for name in unstored - model.all_tied_weights_keys.keys():
        parent, _, child = name.rpartition(".")
        module = model.get_submodule(parent)
        empty = torch.empty_like(getattr(module, child), device=device)
        if child in module._buffers:
            module._buffers[child] = empty
        else:
            setattr(module, child, nn.Parameter(empty))
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor._is_hf_initialized = name not in absent or name in model.all_tied_weights_keys
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.initialize_weights()


def _check(
    model: PreTrainedModel, plan: ReadPlan, descriptions: list[ExpertsDescription], tensors: Mapping[str, TensorInfo]
) -> tuple[set[str], dict[str, list[str]]]:
    """Compare the folder with the model, name for name and shape for shape.

    Returns the names of stock tensors that the folder may lack: tied ones, and those the model class allows. And the
    names of those that each dense group of the plan gives, by its first target.
    """
    unexpected = [key for key in plan.unexpected if not _may_ignore(model, key)]
    if unexpected:
        raise UserError(f"the folder holds tensors that the model has no place for: {', '.join(sorted(unexpected))}")
    state = model.state_dict()
    filled: set[str] = set(plan.experts)
    wrong, targets = [], {}
    for group in plan.dense:
        metas = {name: torch.empty(tensors[name].shape, device="meta") for name in group.names()}
        converted = _convert(group, metas, model)
        targets[group.first_target] = list(converted)
        filled |= converted.keys()
        for name, made in converted.items():
            if name not in state:
                raise UserError(f"{' + '.join(group.names())} gives {name}, which the model does not have")
            if made.shape != state[name].shape:
                wrong.append(f"{' + '.join(group.names())} gives {name} {_by(made)}, expected {_by(state[name])}")
    for description in descriptions:
        for parameter in description.spec.shapes():
            layout = plan.experts.get(description.stock_name(parameter))
            if layout is None:
                continue
            for key, shape in layout.disk_shapes(description.stock_shape(parameter)).items():
                if tensors[key].shape != shape:
                    wrong.append(f"{key} is {_by(tensors[key])}, expected {list(shape)}")
    if wrong:
        raise UserError(f"tensors of a wrong shape: {'; '.join(wrong)}")
    absent = set(state) - filled
    tied = model.all_tied_weights_keys
    given = {name for pair in tied.items() if any(part in filled for part in pair) for name in pair}
    allowed = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    lost = [n for n in absent if n not in given and not any(pattern.search(n) for pattern in allowed)]
    if lost:
        raise UserError(f"the folder lacks tensors that the model needs: {', '.join(sorted(lost))}")
    return absent, targets


def _homes(
    model: PreTrainedModel,
    targets: Mapping[str, list[str]],
    descriptions: list[ExpertsDescription],
    tied: Mapping[str, str],
) -> dict[str, list[str]]:
    """Each dense tensor of a folder, by its stock name -> its names in this rank's model, none where another stage has
    it. tied: what the whole model ties; where its two ends are on two stages, the folder's one tensor fills both."""
    here = set(model.state_dict())
    given = {name for names in targets.values() for name in names}
    homes = {name: [name] for name in given}
    for pair in tied.items():
        for name, other in (pair, pair[::-1]):
            if name in given and other not in given:
                homes[name].append(other)
    ours = {name: [our_name(home, descriptions) for home in found] for name, found in homes.items()}
    return {name: [home for home in found if home in here] for name, found in ours.items()}


def _check_tied(tied: Mapping[str, str], plan: ReadPlan, files: WeightFiles) -> None:
    """UserError where a folder holds both ends of a tie with different values. One process would see that and not tie
    them; stages that each hold one end would go on as if they were one tensor."""
    keys = {group.first_target: group.names()[0] for group in plan.dense if group.converter is None}
    for pair in tied.items():
        if all(name in keys for name in pair) and not torch.equal(*(files.read(keys[name]) for name in pair)):
            raise UserError(
                f"the configuration ties {' and '.join(pair)}, but the folder holds different values for them; set "
                "tie_word_embeddings to false in its config.json, or parallel.pipeline=1"
            )


def _convert(group: TensorGroup, tensors: dict[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    try:
        return group.convert(tensors, model)
    except (RuntimeError, ValueError, IndexError, KeyError) as error:
        raise UserError(f"{', '.join(group.names())} cannot become {group.first_target}: {error}") from error


def _may_ignore(model: PreTrainedModel, key: str) -> bool:
    """Whether transformers leaves such a tensor of a folder aside: old buffers, and what the class declares."""
    if re.search(r"rotary_emb\.inv_freq$|(^|\.)position_ids$", key):
        return True
    return any(re.search(pattern, key) for pattern in model._keys_to_ignore_on_load_unexpected or ())


def _by(tensor: torch.Tensor | TensorInfo) -> list[int]:
    return list(tensor.shape)


def _read_experts(
    layer: MoEExperts, layouts: Mapping[str, ExpertTensorLayout], files: WeightFiles, dtypes: DtypePlan
) -> None:
    """Fill the seats of one layer; only the experts seated on this rank are read."""
    origin = layer.origin
    for parameter_name, parameter, seat_ids in layer.expert_parameters():
        stock = origin.stock_name(parameter_name)
        layout = layouts[stock]
        dtype = dtypes.get(stock, parameter.dtype)
        if parameter.dtype != dtype:
            parameter.data = torch.zeros_like(parameter, dtype=dtype)
        for seat, expert in enumerate(seat_ids):
            if expert is None:
                continue
            keys = layout.keys[expert]
            parts = [files.read_row(key, expert) if layout.stacked else files.read(key) for key in keys]
            parameter.data[seat].copy_(origin.turn(layout.join(parts)))


def _read_dense(
    model: PreTrainedModel,
    group: TensorGroup,
    files: WeightFiles,
    dtypes: DtypePlan,
    homes: Mapping[str, list[str]],
    device: torch.device,
) -> None:
    """Fill what `group` gives; of a tensor that is cut, this rank's part."""
    made = _convert(group, {name: files.read(name) for name in group.names()}, model)
    for name, tensor in made.items():
        for home in homes[name]:
            parent, _, child = home.rpartition(".")
            module = model.get_submodule(parent)
            place = getattr(module, child)
            shard = shard_of(place)
            value = torch.empty(place.shape, dtype=dtypes.get(name, place.dtype), device=device)
            value.copy_(tensor if shard is None else shard.cut(tensor))
            if child in module._buffers:
                module._buffers[child] = value
                continue
            filled = nn.Parameter(value, requires_grad=place.requires_grad)
            if shard is not None:
                filled.shard = shard
            setattr(module, child, filled)


def _read_generation_config(model: PreTrainedModel, folder: Path) -> None:
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
