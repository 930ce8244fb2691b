"""The trainable table: what trains in each layer, and what the optimizer keeps of it on this rank."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from moe_dist.moe.layer import MoEExperts
from moe_dist.parallel.grid import Grid
from moe_dist.train.family import EXPERT
from moe_dist.train.memory import Totals, Weight, settings_of, totals, weight_of
from moe_dist.train.trainable import Selection, layer_index

OUTSIDE = "outside layers"


@dataclass
class Row:
    """One decoder layer on this rank (or what lies outside of all).

    ids: what trains, by experts module. copies: {expert that sits on several ranks: on how many}.
    """

    weights: list[Weight] = field(default_factory=list)
    ids: dict[str, tuple[int, ...]] = field(default_factory=dict)
    copies: dict[int, int] = field(default_factory=dict)
    num_experts: int = 0

    @cached_property
    def totals(self) -> Totals:
        return totals(self.weights)

    @property
    def expert(self) -> int:
        return self.totals.held[EXPERT]

    @property
    def expert_trained(self) -> int:
        return self.totals.trained[EXPERT]

    @property
    def dense(self) -> int:
        return sum(self.totals.held.values()) - self.expert

    @property
    def dense_trained(self) -> int:
        return sum(self.totals.trained.values()) - self.expert_trained


def rows(model: nn.Module, selection: Selection) -> dict[str, Row]:
    """Rows by decoder layer, in order of depth, from the parameters' shapes (so on the meta device as well).

    model: with what trains marked (`trainable.freeze`).
    """
    table: dict[str, Row] = defaultdict(Row)
    for name, module in model.named_modules():
        if isinstance(module, MoEExperts):
            row = table[_label(name)]
            row.ids[name] = selection.experts[name]
            row.num_experts += module.spec.num_experts
            row.copies |= {expert: len(ranks) for expert, ranks in module.placement.copied.items()}
    for name, parameter in model.named_parameters():
        table[_label(name)].weights.append(weight_of(parameter))
    return dict(sorted(table.items(), key=lambda item: (item[0] == OUTSIDE, len(item[0]), item[0])))


def optimizer_bytes(row: Row, grid: Grid, *, zero_stage: int, precision: str) -> int:
    """Bytes of optimizer state on one rank: fp32 moments, and masters where there are any (see `train.memory`)."""
    return settings_of(row.totals, grid, zero_stage=zero_stage, precision=precision, bucket=0).optimizer


def render(model: nn.Module, selection: Selection, grid: Grid, *, zero_stage: int, precision: str) -> str:
    """The table as text, with a line of totals. Counts are of one rank, seats without an expert included."""
    lines = [("layer", "dense trained", "experts trained", "parameters", "optimizer / rank")]
    table = rows(model, selection)
    for label, row in table.items():
        size = optimizer_bytes(row, grid, zero_stage=zero_stage, precision=precision)
        lines.append(_line(label, row, _ids(row), size))
    total = Row([weight for row in table.values() for weight in row.weights])
    lines.append(_line("all", total, "", optimizer_bytes(total, grid, zero_stage=zero_stage, precision=precision)))
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
