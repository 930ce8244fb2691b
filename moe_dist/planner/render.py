"""What `moe-dist plan` prints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moe_dist.planner.anatomy import Layout
from moe_dist.planner.hardware import GIB, Cluster
from moe_dist.planner.search import Found, Ranking
from moe_dist.planner.study import Study
from moe_dist.planner.timeline import Peak
from moe_dist.planner.wire import Wire


def render(study: Study, cluster: Cluster, own: Found | None, ranking: Ranking | None, *, sequences: int) -> str:
    """The whole text: the cluster with what is assumed, the config's own layout in parts, the ranking."""
    parts = [_assumptions(study, cluster, sequences)]
    if own is not None:
        parts.append(_own(own, cluster, study))
    if ranking is not None:
        parts.append(_ranking(ranking, cluster, study, sequences))
    return "\n\n".join(parts)


def _assumptions(study: Study, cluster: Cluster, sequences: int) -> str:
    gpu, length = cluster.gpu, study.config.data.seq_len
    peak = gpu.bf16 if study.bf16 else gpu.fp32
    precision = "bf16" if study.bf16 else "fp32"
    return "\n".join(
        [
            f"cluster  {cluster.gpus} x {gpu.name}, {cluster.node_size} a node ({gpu.source})",
            f"assumed  {peak / 1e12:g} TFLOP/s in {precision}, of which products reach {cluster.achieved:.0%}; links "
            f"of {gpu.inside / 1e9:g} GB/s inside a node, {gpu.across / 1e9:g} GB/s a GPU across, of which exchanges "
            f"reach {cluster.moved:.0%}",
            f"         {cluster.room / GIB:.1f} GiB of {gpu.memory / GIB:.1f} for tensors ({cluster.usable:.0%}); "
            f"experts used alike; nothing overlaps; attention {study.attention}"
            + (", with masks of packed documents" if study.packed else ""),
            f"         an exchange begins in {cluster.begin * 1e6:g} us, and takes {cluster.message_inside * 1e6:g} us "
            f"a partner inside a node, {cluster.message_across * 1e6:g} us across; the host needs "
            f"{cluster.launch * 1e6:g} us a kernel; weights are read at {gpu.memory_rate / 1e12:g} TB/s",
            f"step     {sequences} sequences of {length} = {sequences * length:,} tokens",
        ]
    )


def _own(found: Found, cluster: Cluster, study: Study) -> str:
    layout, memory, wire, speed = found.layout, found.memory, found.wire, found.speed
    fits = "fits" if memory.total <= cluster.room else "DOES NOT FIT"
    return "\n".join(
        [
            f"config   {describe(layout)}",
            f"memory   {gib(memory.total)} a rank at its peak ({memory.where}): {fits}",
            *_table(memory_parts(memory)),
            f"sent     {gb(wire.total)} a rank and step",
            *_table(wire_parts(wire)),
            f"time     {speed.step:.3g} s a step, {_rate(found, study):,.0f} tokens/s",
            *_table((name, f"{value:.3g} s") for name, value in vars(speed).items() if value),
        ]
    )


def memory_parts(memory: Peak) -> list[tuple[str, str]]:
    names = ("weights", "masters", "moments", "gradients", "activations", "working", "buffers")
    return [(name, gib(getattr(memory, name))) for name in names]


def wire_parts(wire: Wire) -> list[tuple[str, str]]:
    parts = [
        ("experts, inside nodes", wire.experts_inside),
        ("experts, across nodes", wire.experts_across),
        ("tensor", wire.tensor),
        ("sequence", wire.sequence),
        ("pipeline", wire.pipeline),
        *((f"data, {family} weights", sent) for family, sent in wire.data.items()),
    ]
    return [(name, gb(size)) for name, size in parts if size]


def _ranking(ranking: Ranking, cluster: Cluster, study: Study, sequences: int) -> str:
    lines = [f"best     of {ranking.looked_at:,} layouts, by estimated time"]
    if ranking.best:
        lines += table(ranking.best, study)
    else:
        lines.append("         none fits")
    for reason, count in ranking.left_out.most_common():
        lines.append(f"left out {count:,}: {reason}")
    return "\n".join(lines)


SIZES = ("pipeline", "data", "sequence", "tensor", "expert", "ZeRO", "rows")  # rows: of a micro-batch
HEADER = (*SIZES, "recompute", "memory", "sent", "step", "tokens/s")


def table(found: Iterable[Found], study: Study) -> list[str]:
    """A line for each layout, under a header; columns aligned."""
    lines = [HEADER, *(cells(one, study) for one in found)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


def cells(found: Found, study: Study) -> tuple[str, ...]:
    layout = found.layout
    sizes = (layout.pipeline, layout.data, layout.sequence, layout.tensor, layout.expert, layout.zero_stage)
    return (
        *map(str, (*sizes, layout.micro_batch)),
        "yes" if layout.recompute else "no",
        gib(found.memory.total),
        gb(found.wire.total),
        f"{found.speed.step:.3g} s",
        f"{_rate(found, study):,.0f}",
    )


def _rate(found: Found, study: Study) -> float:
    layout = found.layout
    rows = layout.micro_batches * layout.micro_batch * layout.data
    return rows * study.config.data.seq_len / found.speed.step


def describe(layout: Layout) -> str:
    """pipeline 4 x data 8 x sequence 1 x tensor 2; expert 8; ZeRO 1; ..."""
    axes = " x ".join(f"{name} {getattr(layout, name)}" for name in ("pipeline", "data", "sequence", "tensor"))
    recompute = ", recompute" if layout.recompute else ""
    return (
        f"{layout.world} ranks = {axes}, expert {layout.expert}, ZeRO {layout.zero_stage}{recompute}; "
        f"{layout.micro_batches} micro-batches x {layout.micro_batch}"
    )


def _table(rows: Iterable[Sequence[str]]) -> list[str]:
    rows = list(rows)
    name_width, value_width = (max((len(row[column]) for row in rows), default=0) for column in (0, 1))
    return [f"         {name.ljust(name_width)}  {value.rjust(value_width)}" for name, value in rows]


def gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.1f} MiB"


def gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"
