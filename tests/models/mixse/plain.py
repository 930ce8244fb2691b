"""The reference: a stock transformers model, each linear layer's output plus the sum of its experts' branches, row by
row, in one process with torch's AdamW. It reads the files by itself and shares no code with `moe_dist.models.mixse`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional as F

from tests.parity import problem


class PlainMixture:
    """`leaves`: name as in our model -> leaf tensor of router and experts (A of all stacked, B side by side)."""

    def __init__(self, folder: str):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).train()
        self.settings = json.loads((Path(folder) / "config.json").read_text())["mixse"]
        self.leaves: dict[str, torch.Tensor] = {
            f"mixse_router.{name}": tensor for name, tensor in load_file(f"{folder}/mixse/router.safetensors").items()
        }
        files = [load_file(f"{folder}/mixse/{name}/adapter_model.safetensors") for name in self.settings["experts"]]
        for key in files[0]:
            if ".lora_A." in key:
                module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                self.leaves[f"{module}.experts_a"] = torch.cat([file[key] for file in files])
                b = [file[key.replace("lora_A", "lora_B")].T for file in files]
                self.leaves[f"{module}.experts_b"] = torch.cat(b)
                self.model.get_submodule(module).register_forward_hook(self._branches(module))
        for leaf in self.leaves.values():
            leaf.requires_grad_()
        self.alpha: torch.Tensor | None = None
        if self.settings["router_input"] == "block_input":
            for block in self.model.model.layers:
                block.register_forward_pre_hook(lambda _, args: self._route(args[0]))

    def _branches(self, module: str):
        def add(_, inputs, output):
            if self.alpha is None:
                return output
            (x,), start = inputs, 0
            for expert, (rank, scale) in enumerate(zip(self.settings["ranks"], self.settings["scales"], strict=True)):
                a = self.leaves[f"{module}.experts_a"][start : start + rank]
                b = self.leaves[f"{module}.experts_b"][start : start + rank]
                output = output + self.alpha[..., expert : expert + 1] * scale * (x @ a.T @ b)
                start += rank
            return output

        return add

    def _route(self, hidden: torch.Tensor) -> None:
        bias = self.leaves.get("mixse_router.bias", 0)
        softmax = torch.softmax(hidden @ self.leaves["mixse_router.weight"].T + bias, dim=-1)
        kth = softmax.sort(dim=-1, descending=True).values[..., self.settings["top_k"] - 1, None]
        self.alpha = torch.where(softmax >= kth, softmax, 0.0)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """`[length, V]` of one row."""
        if self.settings["router_input"] == "base_last_hidden":
            self.alpha = None
            with torch.no_grad():
                hidden = self.model.model(input_ids=ids[None], use_cache=False).last_hidden_state
            self._route(hidden)
        return self.model(input_ids=ids[None], use_cache=False).logits[0]


def train(folder: str, trainable: str) -> dict:
    """What `tests.parity.distributed.train` gives, whole."""
    mixture = PlainMixture(folder)
    joint = trainable == "joint"
    leaves = {name: leaf for name, leaf in mixture.leaves.items() if joint or name.startswith("mixse_router")}
    optimizer = torch.optim.AdamW(
        [{"params": [leaf], "weight_decay": problem.DECAY if leaf.dim() >= 2 else 0.0} for leaf in leaves.values()],
        betas=problem.BETAS,
        eps=problem.EPS,
    )
    result: dict = {"norms": [], "losses": []}
    for step, rate in enumerate(problem.RATES):
        optimizer.zero_grad()
        rows = problem.rows(step)
        labels = sum(int((row["labels"][1:] != problem.IGNORE).sum()) for row in rows)
        outputs = [mixture.logits(row["input_ids"]) for row in rows]
        loss = sum(
            F.cross_entropy(logits[:-1], row["labels"][1:], ignore_index=problem.IGNORE, reduction="sum")
            for logits, row in zip(outputs, rows, strict=True)
        )
        result["losses"].append(loss.item() / labels)
        (loss / labels).backward()
        if step == 0:
            result["logits"] = [logits.detach() for logits in outputs]
            result["ids"] = [{} for _ in outputs]
            result["gradients"] = {(name, -1): leaf.grad.flatten().clone() for name, leaf in leaves.items()}
        result["norms"].append(torch.nn.utils.clip_grad_norm_(leaves.values(), problem.CLIP).item())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    result["weights"] = {(name, -1): leaf.detach().flatten() for name, leaf in leaves.items()}
    return result
