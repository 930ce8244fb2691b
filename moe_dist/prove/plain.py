"""The judge of a proof: transformers' own model with eager experts in one process, document after document, and torch's
AdamW with a leaf of its own for each expert. Nothing of the code that trains is called.

What it finds goes to files, tensor by tensor, of which each rank reads the parts that it has to compare.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from moe_dist.models.families import ExpertsDescription, describe_experts, our_name
from moe_dist.models.skeleton import model_class, read_config
from moe_dist.prove.balance import Routed, routing_loss
from moe_dist.prove.cut import without_progress_bars
from moe_dist.prove.problem import IGNORE, RATES, Problem
from moe_dist.train.trainable import Selection

Key = tuple[str, int]  # (name of the tensor in the canonical layout, expert id or -1)
GRADIENTS, WEIGHTS, FROZEN, ROWS = (f"plain-{name}.safetensors" for name in ("gradients", "weights", "frozen", "rows"))
FIGURES = "plain.json"
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
        self.device = device
        self.layers = describe_experts(self.model)
        self.leaves = self._leaves(selection)
        self.seen: dict[str, list] = {}
        self._listen()

    def run(self) -> dict:
        """Three steps. Returns the figures, as they are written, and leaves the tensors in the folder of the proof."""
        settings = self.settings.train
        save_file(self._frozen(), self.problem.work / FROZEN)
        groups = [
            {"params": [leaf.tensor], "weight_decay": settings.weight_decay if leaf.tensor.dim() >= 2 else 0.0}
            for leaf in self.leaves.values()
        ]
        optimizer = torch.optim.AdamW(groups, betas=tuple(settings.betas), eps=settings.eps)
        figures: dict = {"norms": [], "losses": [], "clip_norm": settings.clip_norm}
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
        figures["buffers"] = {name: buffer.tolist() for name, buffer in self._biases()}
        (self.problem.work / FIGURES).write_text(json.dumps(figures))
        return figures

    def _backward(self, step: int) -> float:
        """Gradients of a step's loss; the mean loss of a label token."""
        problem, settings = self.problem, self.settings
        rows = problem.documents(step)
        labels = problem.labels(step)
        found = [[self._forward(ids) for ids, _ in row] for row in rows]
        loss = sum(
            F.cross_entropy(logits[:-1].float(), labels.to(self.device)[1:], ignore_index=IGNORE, reduction="sum")
            for documents, row in zip(found, rows, strict=True)
            for (logits, _), (_, labels) in zip(documents, row, strict=True)
        )
        size = settings.train.micro_batch_size
        ranks = [[routed for row in found[at : at + size] for _, routed in row] for at in range(0, len(rows), size)]
        data = len(ranks) // problem.micro_batches
        passes = [ranks[at : at + data] for at in range(0, len(ranks), data)]
        self._loads = [torch.cat([routed.ids[place].flatten() for rank in ranks for routed in rank])
                       for place in range(len(self.layers))]  # fmt: skip
        scores = [layer.router[1].score if layer.router else "softmax" for layer in self.layers]
        total = loss / labels + routing_loss(passes, settings.moe, scores)
        total.backward()
        if step == 0:
            self._save_rows(found)
        return loss.item() / labels

    def _forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, Routed]:
        """Logits `[length, V]` of one document, and what its routers said."""
        self.seen = {"logits": [], "ids": []}
        logits = self.model(input_ids=ids.unsqueeze(0).to(self.device), use_cache=False).logits[0]
        return logits, Routed(self.seen["logits"], self.seen["ids"])

    def _listen(self) -> None:
        for layer in self.layers:
            experts = self.model.get_submodule(layer.name)
            experts.register_forward_pre_hook(lambda _, inputs: self.seen["ids"].append(inputs[1].flatten(0, -2)))
            if layer.router is not None:
                path, family = layer.router
                at = family.outputs.index("logits")
                self.model.get_submodule(path).register_forward_hook(
                    lambda _, __, out, at=at: self.seen["logits"].append(out[at].flatten(0, -2))
                )

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


def _part(parameter: torch.Tensor, row: int | None, layer: ExpertsDescription | None) -> torch.Tensor:
    """A view in the canonical layout."""
    return parameter if layer is None else layer.turn(parameter[row])


def _gradient(parameter: nn.Parameter, row: int | None, layer: ExpertsDescription | None):
    def gradient() -> torch.Tensor:
        if parameter.grad is None:
            return torch.zeros_like(_part(parameter.detach(), row, layer))
        return _part(parameter.grad, row, layer).clone()

    return gradient
