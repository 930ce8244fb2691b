"""The trainable table: what trains in each layer, and what the optimizer keeps of it on this rank."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from torch import nn

from moe_dist.moe.layer import MoEExperts
from moe_dist.parallel.grid import Grid
from moe_dist.train.trainable import Selection, layer_index

OUTSIDE = "outside layers"


@dataclass
class Row:
    """Elements of one decoder layer on this rank (or of what lies outside of all).

    cut, cut_trained: those among the dense ones that are this rank's part of a tensor-parallel weight.
    ids: what trains, by experts module. copies: {expert that sits on several ranks: on how many}.
    """

    dense_trained: int = 0
    dense: int = 0
    cut_trained: int = 0
    cut: int = 0
    expert_trained: int = 0
    expert: int = 0
    ids: dict[str, tuple[int, ...]] = field(default_factory=dict)
    copies: dict[int, int] = field(default_factory=dict)
    num_experts: int = 0


def rows(model: nn.Module, selection: Selection) -> dict[str, Row]:
    """Rows by decoder layer, in order of depth, from the parameters' shapes (so on the meta device as well)."""
    table: dict[str, Row] = defaultdict(Row)
    inside = set()
    for name, module in model.named_modules():
        if isinstance(module, MoEExperts):
            row = table[_label(name)]
            row.ids[name] = selection.experts[name]
            row.num_experts += module.spec.num_experts
            row.copies |= {expert: len(ranks) for expert, ranks in module.placement.copied.items()}
            for _, parameter, _ in module.expert_parameters():
                inside.add(parameter)
                row.expert += parameter.numel()
                row.expert_trained += parameter.numel() * parameter.requires_grad
    for name, parameter in model.named_parameters():
        if parameter not in inside:
            row = table[_label(name)]
            row.dense += parameter.numel()
            row.dense_trained += parameter.numel() * (name in selection.names)
            if hasattr(parameter, "shard"):
                row.cut += parameter.numel()
                row.cut_trained += parameter.numel() * (name in selection.names)
    return dict(sorted(table.items(), key=lambda item: (item[0] == OUTSIDE, len(item[0]), item[0])))


def optimizer_bytes(row: Row, grid: Grid, *, zero_stage: int, precision: str) -> int:
    """Bytes of optimizer state on one rank: two fp32 moments an element, and an fp32 master where weights are bf16.

    From ZeRO 1 on it is shared by the ranks that hold the same weights, see `shared`.
    """
    each = 8 + (4 if precision == "bf16" else 0)
    if zero_stage == 0:
        return each * (row.dense_trained + row.expert_trained)
    return each * shared(row.dense_trained, row.cut_trained, row.expert_trained, grid)


def shared(dense: int, cut: int, expert: int, grid: Grid) -> int:
    """Elements that one rank keeps where the ranks that hold the same weights share them: all of a stage for dense
    tensors, those with the same tensor rank for `cut` ones (which `dense` includes), the expert-data ranks for experts.
    """
    sizes = (dense - cut, grid.stage_size), (cut, grid.stage_size // grid.tensor), (expert, grid.expert_data)
    return sum(-(-elements // ranks) for elements, ranks in sizes)


def render(model: nn.Module, selection: Selection, grid: Grid, *, zero_stage: int, precision: str) -> str:
    """The table as text, with a line of totals. Counts are of one rank, seats without an expert included."""
    lines = [("layer", "dense trained", "experts trained", "parameters", "optimizer / rank")]
    total = Row()
    total_bytes = 0
    for label, row in rows(model, selection).items():
        size = optimizer_bytes(row, grid, zero_stage=zero_stage, precision=precision)
        total_bytes += size
        for name in ("dense_trained", "dense", "cut_trained", "cut", "expert_trained", "expert", "num_experts"):
            setattr(total, name, getattr(total, name) + getattr(row, name))
        lines.append(_line(label, row, _ids(row), size))
    lines.append(_line("all", total, "", total_bytes))
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def record(model: nn.Module, selection: Selection, grid: Grid, *, zero_stage: int, precision: str) -> dict[str, dict]:
    """The table as plain values, for metrics.jsonl: {layer: elements of this rank, experts that train, bytes}."""
    return {
        label: {
            "dense_trained": row.dense_trained,
            "dense": row.dense,
            "expert_trained": row.expert_trained,
            "expert": row.expert,
            "experts_trained": sum(map(len, row.ids.values())),
            "experts": row.num_experts,
            "optimizer_bytes": optimizer_bytes(row, grid, zero_stage=zero_stage, precision=precision),
        }
        for label, row in rows(model, selection).items()
    }


def _line(label: str, row: Row, ids: str, size: int) -> tuple[str, ...]:
    trained, held = row.dense_trained + row.expert_trained, row.dense + row.expert
    return (
        label,
        f"{row.dense_trained:,} of {row.dense:,}",
        ids or (f"{row.expert_trained:,} of {row.expert:,}" if row.expert else "-"),
        f"{trained:,} of {held:,}",
        human_bytes(size),
    )


def _ids(row: Row) -> str:
    parts = []
    for ids in row.ids.values():
        count = row.num_experts // len(row.ids)
        shown = "all" if len(ids) == count else "none" if not ids else ",".join(map(str, ids[:8]))
        parts.append(f"{len(ids)}/{count} ({shown}{',...' if len(ids) > 8 and shown != 'all' else ''})")
    if row.copies:
        most = sorted(row.copies.items(), key=lambda item: (-item[1], item[0]))
        listed = ",".join(f"{expert} on {ranks}" for expert, ranks in most[:8])
        more = sum(row.copies.values()) - len(row.copies)
        parts.append(f"+ {more} {'copy' if more == 1 else 'copies'} ({listed}{',...' if len(most) > 8 else ''})")
    return " ".join(parts)


def _label(name: str) -> str:
    index = layer_index(name)
    return OUTSIDE if index is None else str(index)


def human_bytes(size: float) -> str:
    """1,536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
