"""Is there room for the model, its checkpoints, and the time to save one? Pure functions over the ranks' facts."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_dist.launch.preflight.compare import Finding

KEPT = 2  # checkpoints that have to fit: the last one stays until the next is whole
LEAD, END = "MOE_DIST_SIGNAL_LEAD", "SLURM_JOB_END_TIME"


@dataclass(frozen=True)
class Needs:
    """Bytes: of one rank before activations, and of one checkpoint."""

    rank: int
    checkpoint: int


def judge_room(facts: Sequence[dict], needs: Needs, *, speed: float, environ: Mapping[str, str]) -> list[Finding]:
    """Findings about memory, disk and time. speed: bytes a second that one host writes into the run folder."""
    return [*_memory(facts, needs), *_disk(facts, needs), *_time(facts, needs, speed, environ)]


def lines_of(facts: Sequence[dict], needs: Needs, speed: float) -> list[str]:
    """What was found, for people; nothing on ranks that hold no facts."""
    if not facts:
        return []
    hosts = list(dict.fromkeys(fact["host"] for fact in facts))
    least = min((fact["free"] for fact in facts if fact["free"] is not None), default=0)
    pace = f", written at {gib(speed)}/s" if speed else ""
    return [
        f"ranks    {len(facts)} on {len(hosts)} host(s): {', '.join(hosts[:8])}{', ...' * (len(hosts) > 8)}",
        f"devices  {', '.join(dict.fromkeys(fact['device'] for fact in facts))}; at least {gib(least)} free",
        f"memory   {gib(needs.rank)} a rank before activations",
        f"disk     {gib(facts[0]['disk'])} free in the run folder; a checkpoint takes {gib(needs.checkpoint)}{pace}",
        "the ranks are ready",
    ]


def _memory(facts: Sequence[dict], needs: Needs) -> list[Finding]:
    on_host: dict[str, list[int]] = defaultdict(list)
    for rank, fact in enumerate(facts):
        on_host[fact["host"] if fact["device"] == "cpu" else f"{fact['host']}, rank {rank}"].append(rank)
    findings = []
    for ranks in on_host.values():
        # Of ranks that share a host's memory, the one that looked first saw it before the others took theirs.
        free = [facts[rank]["free"] for rank in ranks if facts[rank]["free"] is not None]
        wanted = needs.rank * len(ranks)
        if not free or wanted <= max(free):
            continue
        listed = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))} on {facts[ranks[0]]['host']}"
        total = facts[ranks[0]]["total"]
        text = f"{listed} need{'s' * (len(ranks) == 1)} {gib(wanted)} before activations; "
        if wanted > total:
            text += f"there are {gib(total)}: take more ranks, a higher parallel.zero_stage or parallel.expert"
            findings.append(Finding("wrong", text))
        else:
            text += f"{gib(max(free))} of {gib(total)} are free: end what else runs there, or leave the host out"
            findings.append(Finding("failed", text))
    return findings


def _disk(facts: Sequence[dict], needs: Needs) -> list[Finding]:
    free = facts[0]["disk"]
    if free >= KEPT * needs.checkpoint:
        return []
    level = "wrong" if free < needs.checkpoint else "warning"
    text = (
        f"{gib(free)} free in the run folder; a checkpoint takes about {gib(needs.checkpoint)}, and {KEPT} have to fit"
    )
    return [Finding(level, f"{text}: free some, or choose another run.dir")]


def _time(facts: Sequence[dict], needs: Needs, speed: float, environ: Mapping[str, str]) -> list[Finding]:
    hosts = len({fact["host"] for fact in facts})
    saving = needs.checkpoint / (speed * hosts) if speed else 0.0
    findings = []
    lead = _number(environ.get(LEAD))
    if lead is not None and lead < saving:
        findings.append(
            Finding(
                "warning",
                f"the signal to stop comes {lead:.0f} s before the end, and a save takes about {saving:.0f} s: give a "
                f"--signal-lead of {2 * saving + 30:.0f} or more",
            )
        )
    end = _number(environ.get(END))
    if end is not None and (left := end - time.time()) < (lead or 0) + saving + 60:
        findings.append(
            Finding("warning", f"{max(0, left):.0f} s are left of this job: too little for steps and a save")
        )
    return findings


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def gib(size: float) -> str:
    """12345678901 -> '11.5 GiB'; small ones in MiB."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
