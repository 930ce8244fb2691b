"""The proof of the trainable table: after two steps, what must not change has not, and what must change has.

Frozen tensors are compared by hash, bit for bit. A trainable tensor (of an expert: that expert's part) must have
changed if a gradient ever reached it and the learning rate was large enough for fp32 to show it; one that no gradient
reached is listed: that is a fact about the data, not a fault. Where a frozen expert sits on several ranks, all of them
must hold the same.
"""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist

from moe_dist.models.surgery import moe_layers
from moe_dist.parallel.grid import Grid
from moe_dist.train.engine import Engine
from moe_dist.train.family import family_of, replicas_of


class ChangeProof:
    """Takes hashes when made; `check` after the second step compares. Both are collective."""

    def __init__(self, engine: Engine, grid: Grid):
        self.grid = grid
        self.frozen = dict(self._frozen(engine))
        self.masters = {_key(fragment): digest(fragment.tensor) for fragment in engine.fragments("weights")}

    def check(self, engine: Engine, *, lr: float, eps: float) -> list[str]:
        """Names (with expert ids) of this rank's trainable tensors that no gradient has reached.

        lr, eps: AdamW's, of the last step. Raises RuntimeError, naming the tensors, where a frozen one changed, where
        copies of an expert differ, or where a trained one did not change.
        """
        apart = differing_copies(engine, self.grid)
        changed = [name for name, value in self._frozen(engine) if value != self.frozen[name]]
        stuck, untouched = [], []
        m, v = (
            {_key(fragment): fragment.tensor for fragment in engine.fragments(kind)}
            for kind in ("exp_avg", "exp_avg_sq")
        )
        for fragment in engine.fragments("weights"):
            key = _key(fragment)
            if not m[key].any():
                untouched.append(_label(fragment))
            elif digest(fragment.tensor) == self.masters[key] and _shows(fragment.tensor, m[key], v[key], lr, eps):
                stuck.append(_label(fragment))
        if changed:
            raise RuntimeError(f"frozen tensors have changed: {', '.join(changed)}")
        if apart:
            raise RuntimeError(f"ranks hold different copies of frozen experts: {', '.join(apart)}")
        if stuck:
            raise RuntimeError(f"trainable tensors got a gradient and have not changed: {', '.join(stuck)}")
        return untouched

    def _frozen(self, engine: Engine):
        """(name, hash) of the frozen tensors that fall to this rank; those that ranks hold alike are shared out."""
        for number, (name, parameter) in enumerate(engine.module.named_parameters()):
            if parameter.requires_grad:
                continue
            replicas = replicas_of(family_of(parameter), self.grid)
            with engine.gathered([parameter]):
                if number % replicas.count == replicas.place:
                    yield name, digest(parameter.detach())


def differing_copies(engine: Engine, grid: Grid) -> list[str]:
    """Names, with expert ids, of what ranks of this expert group hold differently, though it is one expert's.

    Collective; the same list on every rank of the group. Of each tensor 60 bits of its hash are compared.
    """
    names, hashes = [], []
    for path, layer in moe_layers(engine.module):
        if not layer.placement.copied:
            continue
        seats = {expert: seat for seat, expert in enumerate(layer.frozen.seat_ids)}
        for name, parameter in layer.frozen.named_parameters():
            with engine.gathered([parameter]):
                for expert in layer.placement.copied:
                    seat = seats.get(expert)
                    names.append(f"{path}.{name}[{expert}]")
                    hashes.append(None if seat is None else int(digest(parameter[seat])[:15], 16))
    if not names:
        return []
    lowest, highest = (
        torch.tensor([other if value is None else value for value in hashes], device=grid.device)
        for other in (2**60, -1)
    )
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=grid.expert_group)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=grid.expert_group)
    return [name for name, differs in zip(names, (lowest != highest).tolist(), strict=True) if differs]


def _shows(master: torch.Tensor, m: torch.Tensor, v: torch.Tensor, lr: float, eps: float) -> bool:
    """Whether an AdamW step of rate `lr` at these moments changes some element of `master` for certain.

    At the start of a warm-up, and at the end of a schedule, it need not: 1 − 1e-9 is 1 in fp32. The step is taken
    without bias correction, which is some times less than the real one at worst, hence more than one rounding.
    """
    change = lr * m.abs() / (v.sqrt() + eps)
    return bool((change > 32 * torch.finfo(master.dtype).eps * master.abs()).any())


def digest(tensor: torch.Tensor) -> str:
    """sha256 of the tensor's bytes."""
    flat = tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu()
    return hashlib.sha256(flat.numpy()).hexdigest()


def _key(fragment) -> tuple[str, int, int]:
    return fragment.name, fragment.expert, fragment.offset


def _label(fragment) -> str:
    return fragment.name if fragment.expert < 0 else f"{fragment.name}[{fragment.expert}]"
