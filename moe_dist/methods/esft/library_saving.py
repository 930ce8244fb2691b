"""Saving and resuming a model in its ESFT form, in the ways that other people's loops do it.

A Trainer saves by `model.save_pretrained(folder, state_dict=...)`, and resumes or loads its best checkpoint by
`model.load_state_dict(tensors of the folder, strict=False)`. Both are taught the adapter's names here. Without that,
resuming would load nothing and only warn.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_dist.config.expert_files import ExpertConfig
from moe_dist.errors import UserError
from moe_dist.methods.esft.adapter_folder import Base
from moe_dist.methods.esft.adapter_names import AdapterNames, ExpertTensor
from moe_dist.methods.esft.adapter_save import write_model
from moe_dist.models.families import our_name
from moe_dist.models.surgery import moe_layers

Tensors = Mapping[str, torch.Tensor]


@dataclass
class Applied:
    """What `apply_selection` has done to a model. record: how the selection was made. base: what was loaded.
    translated: whether the last `load_state_dict` was given an adapter."""

    config: ExpertConfig
    record: dict[str, Any] | None
    names: AdapterNames
    base: Base | None
    translated: bool = False


def attach(model: PreTrainedModel, applied: Applied) -> None:
    """Let `save_pretrained` write the adapter, and `load_state_dict` take the tensors of one."""
    model.esft = applied
    model.save_pretrained = MethodType(_save_pretrained, model)
    model.register_load_state_dict_pre_hook(_translate)
    model.register_load_state_dict_post_hook(_forget_frozen)


def _save_pretrained(
    model: PreTrainedModel,
    save_directory: str | Path,
    *,
    is_main_process: bool = True,
    state_dict: Tensors | None = None,
    push_to_hub: bool = False,
    **_: Any,
) -> None:
    """Write the adapter; tensors in the dtype in which they train.

    save_directory: may hold other files; an adapter in it is replaced. One process writes: the others give
    is_main_process=False. state_dict: where weights are taken from in place of the model, as an engine that has
    spread them gives it. Other options of transformers are without meaning here.
    """
    if not is_main_process:
        return
    if push_to_hub:
        raise UserError("save_pretrained of an adapter does not push: save it, then upload the folder")
    applied: Applied = model.esft
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state = parameters if state_dict is None else state_dict
    spread = [name for name, p in parameters.items() if p.requires_grad and _is_spread(state.get(name))]
    if spread:
        said = (
            f"no adapter was written to {save_directory}: {spread[0]} is spread over the processes by ZeRO 3. Save by "
            'the Trainer, with "stage3_gather_16bit_weights_on_model_save": true in the DeepSpeed configuration'
        )
        if state_dict is None:
            raise UserError(said)
        # A Trainer without that setting calls this on one process, and goes on to save the engine's state on all.
        print(f"warning: {said}", file=sys.stderr, flush=True)
        return
    by_id = {id(parameter): name for name, parameter in parameters.items()}
    try:
        write_model(
            model,
            Path(save_directory),
            applied.names,
            applied.config.experts,
            full_tensor=lambda parameter: state[by_id[id(parameter)]].to(parameter.dtype),
            base=applied.base,
            record={"selection": applied.record},
            into=True,
        )
    except UserError as error:
        if state_dict is None:
            raise
        # With DeepSpeed a Trainer takes any ValueError for the lack of that setting, and would wait for the others.
        raise RuntimeError(str(error)) from error


def _is_spread(tensor: torch.Tensor | None) -> bool:
    return tensor is None or (hasattr(tensor, "ds_id") and tensor.numel() != tensor.ds_numel)


def _translate(model: PreTrainedModel, state_dict: dict, prefix: str, *_: Any) -> None:
    """Before `load_state_dict`: tensors with an adapter's names become those of the model's own.

    A file of several may hold only some parts of an expert: the other parts stay as they are in the model.
    """
    names: AdapterNames = model.esft.names
    model.esft.translated = False
    found = {key[len(prefix) :]: key for key in state_dict if key.startswith(prefix)}
    own = model.state_dict(keep_vars=True)
    new: dict[str, torch.Tensor] = {}
    experts: dict[ExpertTensor, dict[int, torch.Tensor]] = defaultdict(dict)
    for key in found.keys() & names.places.keys():
        tensor, part = names.places[key]
        experts[tensor][part] = state_dict.pop(found[key])
    for path, layer in moe_layers(model):
        seats = {} if layer.trainable is None else {e: seat for seat, e in enumerate(layer.trainable.seat_ids)}
        for name in layer.spec.shapes():
            given = {t: parts for t, parts in experts.items() if t.name == layer.origin.stock_name(name)}
            frozen = sorted(tensor.expert for tensor in given if tensor.expert not in seats)
            if frozen:
                raise UserError(
                    f"{path}: the checkpoint holds the expert(s) {frozen}, which are frozen in this model: it was "
                    "saved with another selection"
                )
            if given:
                stack = own[f"{path}.trainable.{name}"].detach().clone()
                for tensor, parts in given.items():
                    row = stack[seats[tensor.expert]]
                    layout = names.layouts[tensor.name]
                    kept = layout.split(layer.origin.turn(row))
                    joined = layout.join([parts.get(i, part).to(part) for i, part in enumerate(kept)])
                    row.copy_(layer.origin.turn(joined))
                new[f"{path}.trainable.{name}"] = stack
    unknown = {key for key in found if key not in own and found[key] in state_dict}
    dense = {key: tuple(state_dict[found[key]].shape) for key in unknown & names.dense_shapes().keys()}
    for group in names.read_dense(dense) if dense else ():
        tensors = {key: state_dict.pop(found[key]) for key in group.names()}
        for name, tensor in group.convert(tensors, names.skeleton).items():
            new[our_name(name, names.descriptions)] = tensor
    state_dict.update({f"{prefix}{name}": tensor for name, tensor in new.items()})
    model.esft.translated = not any(name in found and not tensor.requires_grad for name, tensor in own.items())


def _forget_frozen(model: PreTrainedModel, result: Any) -> None:
    """After it: that an adapter lacks what is frozen is no news."""
    if model.esft.translated:
        trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        result.missing_keys[:] = [name for name in result.missing_keys if name in trains]
