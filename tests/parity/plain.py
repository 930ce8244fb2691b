"""The reference: transformers' own model and eager experts, row after row, in one process with torch's AdamW."""

from __future__ import annotations

from functools import cache

import torch
import transformers
from torch.nn import functional as F
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moe_dist.models.families import describe_experts
from moe_dist.train.trainable import layer_index
from tests.parity import problem
from tests.parity.cells import Cell

Key = tuple[str, int]  # (name of the tensor in the canonical layout, expert id or -1)


def train(cell: Cell, folder: str) -> dict:
    """All that a cell must reproduce. Cells that differ only in how they run share one result."""
    rows = cell.data if cell.balance != "none" else 0
    return _train(cell.family, cell.trainable, cell.balance, rows, folder)


@cache
def _train(family: str, trainable: str, balance: str, micro_batch: int, folder: str) -> dict:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", attn_implementation="eager"
    )
    model.train()
    descriptions = describe_experts(model)
    routers = [model.get_submodule(description.router[0]) for description in descriptions]
    leaves = _leaves(model, descriptions, family, trainable)
    optimizer = torch.optim.AdamW(
        [{"params": [leaf], "weight_decay": problem.DECAY if leaf.dim() >= 2 else 0.0} for leaf, _ in leaves.values()],
        betas=problem.BETAS,
        eps=problem.EPS,
    )
    result: dict = {"norms": [], "losses": []}
    for step, rate in enumerate(problem.RATES):
        model.zero_grad()
        rows = problem.rows(step)
        labels = sum(int((row["labels"][1:] != problem.IGNORE).sum()) for row in rows)
        outputs = [_forward(model, routers, row) for row in rows]
        loss = sum(
            F.cross_entropy(logits[:-1], row["labels"][1:], ignore_index=problem.IGNORE, reduction="sum")
            for (logits, _), row in zip(outputs, rows, strict=True)
        )
        result["losses"].append(loss.item() / labels)
        total = loss / labels + _balance_loss(outputs, balance, micro_batch, model.config)
        total.backward()
        for leaf, gradient in leaves.values():
            leaf.grad = gradient()
        if step == 0:
            result["logits"] = [logits.detach() for logits, _ in outputs]
            depths = [layer_index(description.name) for description in descriptions]
            result["ids"] = [dict(zip(depths, [ids for _, ids in seen], strict=True)) for _, seen in outputs]
            result["gradients"] = {key: leaf.grad.flatten().clone() for key, (leaf, _) in leaves.items()}
        parameters = [leaf for leaf, _ in leaves.values()]
        result["norms"].append(torch.nn.utils.clip_grad_norm_(parameters, problem.CLIP).item())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        _write_back(model, descriptions, leaves)
    result["weights"] = {key: leaf.detach().flatten() for key, (leaf, _) in leaves.items()}
    return result


def _forward(model, routers, row) -> tuple[torch.Tensor, list]:
    """Logits `[length, V]` and, of each router, (logits, ids)."""
    seen: list = []
    hooks = [router.register_forward_hook(lambda _, __, out: seen.append((out[0], out[2]))) for router in routers]
    logits = model(input_ids=row["input_ids"].unsqueeze(0), use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return logits, seen


def _balance_loss(outputs: list, balance: str, micro_batch: int, config) -> torch.Tensor | float:
    """transformers' own loss over each micro-batch (of so many rows, one a data rank), averaged over them."""
    if balance == "none":
        return 0.0
    losses = []
    for start in range(0, len(outputs), micro_batch):
        rows = [seen for _, seen in outputs[start : start + micro_batch]]
        by_layer = tuple(torch.cat([seen[layer][0].flatten(0, -2) for seen in rows]) for layer in range(len(rows[0])))
        losses.append(load_balancing_loss_func(by_layer, by_layer[0].shape[1], config.num_experts_per_tok))
    return problem.COEF * sum(losses) / len(losses)


def _leaves(model, descriptions, family: str, trainable: str) -> dict[Key, tuple[torch.Tensor, object]]:
    """A leaf tensor of its own for everything that trains, one for each expert, and how to get its gradient."""
    experts_train = {
        "all": lambda layer: range(layer.spec.num_experts),
        "some": lambda layer: (1, 3),
        "one rank": lambda layer: (0,),
        "one layer": lambda layer: (0, 2, 3) if layer is descriptions[0] else (),
    }[trainable]
    stacked, leaves = set(), {}
    parameters = dict(model.named_parameters())
    for layer in descriptions:
        for name in layer.spec.shapes():
            stock = layer.stock_name(name)
            stacked.add(stock)
            for expert in experts_train(layer):
                whole = parameters[stock]
                leaf = layer.turn(whole.detach()[expert]).clone().requires_grad_()
                leaves[f"{layer.name}.{name}", expert] = (leaf, _expert_gradient(layer, whole, expert))
    if trainable in ("all", "some"):
        for name, parameter in parameters.items():
            if name not in stacked:
                leaves[name, -1] = (parameter.detach().clone().requires_grad_(), _dense_gradient(parameter))
    return leaves


def _expert_gradient(layer, whole: torch.Tensor, expert: int):
    return lambda: layer.turn(whole.grad[expert]).clone()


def _dense_gradient(parameter: torch.Tensor):
    return lambda: parameter.grad.clone()


@torch.no_grad()
def _write_back(model, descriptions, leaves) -> None:
    parameters = dict(model.named_parameters())
    layers = {layer.name: layer for layer in descriptions}
    for (name, expert), (leaf, _) in leaves.items():
        if expert < 0:
            parameters[name].copy_(leaf)
        else:
            path, _, short = name.rpartition(".")
            layer = layers[path]
            parameters[layer.stock_name(short)][expert].copy_(layer.turn(leaf))
