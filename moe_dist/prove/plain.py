"""The judge of a proof: transformers' own model with eager experts in one process, document after document, and torch's
AdamW with a leaf of its own for each expert. Nothing of the code that trains is called.

What it finds goes to files, tensor by tensor, of which each rank reads the parts that it has to compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from moe_dist.models.families import ExpertsDescription, describe_experts, our_name
from moe_dist.models.skeleton import model_class, read_config
from moe_dist.prove.balance import Routed, routing_loss
from moe_dist.prove.cut import without_progress_bars
from moe_dist.prove.nexus import take_formulas
from moe_dist.prove.problem import IGNORE, RATES, Problem
from moe_dist.train.trainable import Selection

Key = tuple[str, int]  # (name of the tensor in the canonical layout, expert id or -1)
GRADIENTS, WEIGHTS, FROZEN, ROWS = (f"plain-{name}.safetensors" for name in ("gradients", "weights", "frozen", "rows"))
FIGURES = "plain.json"
MOST_ROUNDING = 1e-3  # beyond it a gradient says nothing about a layout
BYTES_A_PARAMETER = 28  # weight, gradient, leaf and its gradient, two moments, what is being written


def label(key: Key) -> str:
    """What a tensor is called in the files and in the certificate."""
    name, expert = key
    return name if expert < 0 else f"{name}[{expert}]"


@dataclass
class Leaf:
    """A tensor that trains: its own copy, and the gradient that the model has for it."""

    tensor: torch.Tensor
    gradient: Callable[[], torch.Tensor]


class Plain:
    """The model in the folder of `problem`, with leaves for what `selection` says that trains."""

    def __init__(self, problem: Problem, selection: Selection, device: torch.device, dtype=torch.float32):
        self.problem, self.settings = problem, problem.config
        folder = Path(self.settings.model.path)
        cls = model_class(read_config(folder))
        options = {"experts_implementation": "eager", "attn_implementation": "eager"}
        with without_progress_bars():
            self.model = cls.from_pretrained(folder, dtype=dtype, **options)
        self.model.to(device).train()
        take_formulas(self.model)
        self.device = device
        self.layers = describe_experts(self.model)
        self.leaves = self._leaves(selection)
        self.seen: dict[str, list] = {}
        self.reached: dict[str, bool] = {}  # of each layer of experts, whether the backward comes to it
        self._listen()

    def run(self) -> dict:
        """Three steps. Returns the figures, and leaves the tensors in the folder of the proof."""
        settings = self.settings.train
        save_file(self._frozen(), self.problem.work / FROZEN)
        groups = [
            {"params": [leaf.tensor], "weight_decay": settings.weight_decay if leaf.tensor.dim() >= 2 else 0.0}
            for leaf in self.leaves.values()
        ]
        optimizer = torch.optim.AdamW(groups, betas=tuple(settings.betas), eps=settings.eps)
        figures: dict = {"norms": [], "losses": [], "clip_norm": settings.clip_norm, "held_out": [self._held_out()]}
        figures["buffers_at_start"] = {name: buffer.tolist() for name, buffer in self._biases()}
        for step, rate in enumerate(RATES):
            self.model.zero_grad()
            figures["losses"].append(self._backward(step))
            for leaf in self.leaves.values():
                leaf.tensor.grad = leaf.gradient()
            if step == 0:
                self._save(GRADIENTS, {key: leaf.tensor.grad for key, leaf in self.leaves.items()})
            parameters = [leaf.tensor for leaf in self.leaves.values()]
            squares = (torch.linalg.vector_norm(leaf.grad, dtype=torch.float64) ** 2 for leaf in parameters)
            norm = math.sqrt(sum(squares).item())
            figures["norms"].append(norm)
            if settings.clip_norm is not None:
                if step == 0:  # it has to bite, or nobody sees whether it is there
                    figures["clip_norm"] = min(settings.clip_norm, norm / 2)
                torch.nn.utils.clip_grads_with_norm_(parameters, figures["clip_norm"], torch.tensor(norm))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            self._write_back()
            self._move_biases()
        self._save(WEIGHTS, {key: leaf.tensor.detach() for key, leaf in self.leaves.items()})
        figures["held_out"].append(self._held_out())
        figures["reached"] = self.reached
        figures["buffers"] = {name: buffer.tolist() for name, buffer in self._biases()}
        return figures

    def first_gradients(self) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """Those of the first step by name, flat, and the experts that were chosen on the way."""
        found = self._pass(0)
        self._total(0, found)[0].backward()
        gradients = {label(key): leaf.gradient().flatten() for key, leaf in self.leaves.items()}
        return gradients, [ids_TK for documents in found for _, routed in documents for ids_TK in routed.ids]

    @torch.no_grad()
    def _held_out(self) -> float:
        """The mean loss of a label token of the first step's rows, in evaluation."""
        self.model.eval()
        loss = self._loss(0, self._pass(0)).item() / self.problem.labels(0)
        self.model.train()
        return loss

    def _backward(self, step: int) -> float:
        """Gradients of a step's loss; the mean loss of a label token."""
        found = self._pass(step)
        total, loss = self._total(step, found)
        total.backward()
        if step == 0:
            self._save_rows(found)
        return loss.item() / self.problem.labels(step)

    def _pass(self, step: int) -> list:
        return [[self._forward(ids) for ids, _ in row] for row in self.problem.documents(step)]

    def _loss(self, step: int, found: list) -> torch.Tensor:
        return sum(
            F.cross_entropy(wide(logits[:-1]), labels.to(self.device)[1:], ignore_index=IGNORE, reduction="sum")
            for documents, row in zip(found, self.problem.documents(step), strict=True)
            for (logits, _), (_, labels) in zip(documents, row, strict=True)
        )

    def _total(self, step: int, found: list) -> tuple[torch.Tensor, torch.Tensor]:
        """(all losses of a step as they are trained on, the language model's summed over label tokens)."""
        problem, settings = self.problem, self.settings
        loss = self._loss(step, found)
        size = settings.train.micro_batch_size
        ranks = [[routed for row in found[at : at + size] for _, routed in row] for at in range(0, len(found), size)]
        data = len(ranks) // problem.micro_batches
        passes = [ranks[at : at + data] for at in range(0, len(ranks), data)]
        self._loads = [torch.cat([routed.ids[place].flatten() for rank in ranks for routed in rank])
                       for place in range(len(self.layers))]  # fmt: skip
        scores = [layer.router[1].score if layer.router else "softmax" for layer in self.layers]
        return loss / problem.labels(step) + routing_loss(passes, settings.moe, scores), loss

    def _forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, Routed]:
        """Logits `[length, V]` of one document, and what its routers said."""
        self.seen = {"logits": [], "ids": []}
        logits = self.model(input_ids=ids.unsqueeze(0).to(self.device), use_cache=False).logits[0]
        return logits, Routed(self.seen["logits"], self.seen["ids"])

    def _listen(self) -> None:
        for layer in self.layers:
            experts = self.model.get_submodule(layer.name)
            experts.register_forward_hook(partial(self._hear_experts, layer.name))
            if layer.router is not None:
                path, family = layer.router
                at = family.outputs.index("logits")
                self.model.get_submodule(path).register_forward_hook(
                    lambda _, __, out, at=at: self.seen["logits"].append(out[at].flatten(0, -2))
                )

    def _hear_experts(self, name: str, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self.seen["ids"].append(inputs[1].flatten(0, -2))
        if torch.is_grad_enabled():
            self.reached[name] = output.requires_grad

    # What trains

    def _tensors(self) -> Iterator[tuple[Key, nn.Parameter, int | None, ExpertsDescription | None]]:
        """Every tensor under its canonical name: (key, the model's parameter, its row there, the experts' module)."""
        stacked = {layer.stock_name(name): (layer, name) for layer in self.layers for name in layer.spec.shapes()}
        for stock, parameter in self.model.named_parameters():
            if stock not in stacked:
                yield (our_name(stock, self.layers), -1), parameter, None, None
                continue
            layer, name = stacked[stock]
            for expert in range(layer.spec.num_experts):
                yield (f"{layer.name}.{name}", expert), parameter, expert, layer

    def _leaves(self, selection: Selection) -> dict[Key, Leaf]:
        leaves = {}
        for key, parameter, row, layer in self._tensors():
            path = key[0].rpartition(".")[0]
            trains = key[0] in selection.names if layer is None else row in selection.experts[path]
            if trains:
                tensor = _part(parameter.detach(), row, layer).clone().requires_grad_()
                leaves[key] = Leaf(tensor, _gradient(parameter, row, layer))
        wanted = {parameter for key, parameter, *_ in self._tensors() if key in leaves}
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter in wanted)
        return leaves

    @torch.no_grad()
    def _write_back(self) -> None:
        for key, parameter, row, layer in self._tensors():
            if key in self.leaves:
                _part(parameter, row, layer).copy_(self.leaves[key].tensor)

    def _frozen(self) -> dict[str, torch.Tensor]:
        return {
            label(key): _part(parameter.detach(), row, layer).clone(memory_format=torch.contiguous_format).cpu()
            for key, parameter, row, layer in self._tensors()
            if key not in self.leaves
        }

    # The expert bias, which moves by the load

    def _biases(self) -> Iterator[tuple[str, torch.Tensor]]:
        transient = {name for name, _ in self.model.named_non_persistent_buffers()}
        for name, buffer in self.model.named_buffers():
            if name not in transient:
                yield name, buffer

    @torch.no_grad()
    def _move_biases(self) -> None:
        rate = self.settings.moe.expert_bias_rate
        for layer, ids_N in zip(self.layers, self._loads, strict=True):
            if not rate or layer.router is None or layer.router[1].correction_bias is None:
                continue
            router = self.model.get_submodule(layer.router[0])
            if any(parameter.requires_grad for parameter in router.parameters()):
                load_E = torch.bincount(ids_N, minlength=layer.spec.num_experts).double()
                bias = router.get_buffer(layer.router[1].correction_bias)
                bias += rate * torch.sign(load_E.mean() - load_E).to(bias.dtype)

    # Files

    def _save(self, name: str, tensors: dict[Key, torch.Tensor]) -> None:
        save_file(
            {label(key): tensor.flatten().float().cpu() for key, tensor in tensors.items()}, self.problem.work / name
        )

    def _save_rows(self, found: list) -> None:
        tensors = {}
        for row, documents in enumerate(found):
            tensors[f"logits.{row}"] = torch.cat([logits.detach().float() for logits, _ in documents]).cpu()
            for place, layer in enumerate(self.layers):
                tensors[f"ids.{row}.{layer.name}"] = torch.cat([routed.ids[place] for _, routed in documents]).cpu()
        save_file(tensors, self.problem.work / ROWS)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float32, or in its own dtype where that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def rounding(problem: Problem, selection: Selection, device: torch.device) -> dict[str, float]:
    """How far the plain process' own gradients are from those in float64, relatively, by tensor: of a gradient that is
    a sum of which most cancels, that is much. Nothing where other experts are chosen in float64."""
    exact, chosen = Plain(problem, selection, device, torch.float64).first_gradients()
    rounded, as_before = Plain(problem, selection, device).first_gradients()
    if not all(map(torch.equal, chosen, as_before)):
        return {}
    floors = {name: ((rounded[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact}
    return {name: floor for name, floor in floors.items() if floor < MOST_ROUNDING}


def _part(parameter: torch.Tensor, row: int | None, layer: ExpertsDescription | None) -> torch.Tensor:
    """A view in the canonical layout."""
    return parameter if layer is None else layer.turn(parameter[row])


def _gradient(parameter: nn.Parameter, row: int | None, layer: ExpertsDescription | None):
    def gradient() -> torch.Tensor:
        if parameter.grad is None:
            return torch.zeros_like(_part(parameter.detach(), row, layer))
        return _part(parameter.grad, row, layer).clone()

    return gradient
