"""How the facts come together. Rank 0 judges; the others wait for its verdict. Every wait is bounded."""

from __future__ import annotations

import contextlib
import json
import secrets
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from moe_dist.errors import HostFailure, UserError
from moe_dist.launch.preflight.collectives import judge_results, wrong_results
from moe_dist.launch.preflight.compare import Finding, compare
from moe_dist.launch.preflight.facts import own_facts, write_file
from moe_dist.parallel.grid import Grid

FACTS = 45.0  # seconds for all ranks to tell of themselves
VERDICT = 15.0  # more, for rank 0 to judge, and for the others to hear of it
SHARE = 2.0  # for the others to hear that there is no folder to look into


def compare_ranks(
    store: dist.Store,
    *,
    rank: int,
    world: int,
    device: torch.device,
    folder: Path,
    versions: dict[str, str | None],
    config: dict,
) -> tuple[list[dict], float]:
    """(facts of all ranks, bytes a second that rank 0 writes into `folder`); both empty on other ranks. Collective.

    folder: one that all ranks share, made and removed again where it is not there. Raises UserError or HostFailure on
    all ranks alike.
    """
    if rank:
        of_rank_0 = _get(store, "rank-0", "rank 0 has not told what it sees")
        facts = own_facts(device, versions=versions, config=config, of_rank_0=of_rank_0)
        agree(store, "facts", rank=rank, world=world, own=facts)
        return [], 0.0
    with _file_for_all(folder, store) as (path, token, speed):
        of_rank_0 = {"config": config, "file": str(path), "token": token}
        store.set("rank-0", json.dumps(of_rank_0))
        facts = own_facts(device, versions=versions, config=json.loads(json.dumps(config)), of_rank_0=of_rank_0)
        return agree(store, "facts", rank=0, world=world, own=facts, judge=compare), speed


def check_collectives(store: dist.Store, grid: Grid, facts: list[dict]) -> None:
    """Try every group of the grid, and raise on all ranks where one computes wrongly. Collective; facts: rank 0's."""
    own = {"wrong": wrong_results(grid)}
    hosts = [fact["host"] for fact in facts]
    agree(store, "results", rank=grid.rank, world=grid.world, own=own, judge=lambda said: judge_results(said, hosts))


def agree(
    store: dist.Store, name: str, *, rank: int, world: int, own: dict, judge=None, patience: float = FACTS
) -> list[dict]:
    """Rank 0 gets what all ranks have to say and judges it; what it finds is raised on all. [] on other ranks.

    judge: on rank 0, the list of what each rank says -> findings. patience: seconds in which all have to speak.
    """
    if rank:
        store.set(f"{name}-{rank}", json.dumps(own))
        findings = [
            Finding(**entry) for entry in _get(store, f"{name}-verdict", "rank 0 has not judged", more=patience)
        ]
        store.set(f"{name}-heard-{rank}", "1")
        _raise(findings)
        return []
    said, missing, end = {0: own}, list(range(1, world)), time.monotonic() + patience
    while missing and time.monotonic() < end:
        for other in list(missing):
            if store.check([f"{name}-{other}"]):
                missing.remove(other)
                said[other] = {**json.loads(store.get(f"{name}-{other}")), "heard": time.time()}
        time.sleep(0.005)
    findings = [
        Finding("failed", f"rank {other} has not answered within {patience:.0f} s: look at its host")
        for other in missing
    ]
    said = [said[other] for other in sorted(said)]
    findings = findings or judge(said)
    store.set(f"{name}-verdict", json.dumps([vars(finding) for finding in findings]))
    # The store may live in this process: the others have to hear why it ends before it does.
    heard_by, end = [other for other in range(1, world) if other not in missing], time.monotonic() + VERDICT
    while heard_by and time.monotonic() < end:
        heard_by = [other for other in heard_by if not store.check([f"{name}-heard-{other}"])]
        time.sleep(0.002)
    report(findings)
    return said


def report(findings: list[Finding]) -> None:
    """Print warnings, once; raise the rest: UserError for what the user has to repair, else HostFailure."""
    for finding in findings:
        if finding.level == "warning":
            print(f"warning: preflight: {finding.text}", file=sys.stderr, flush=True)
    _raise(findings)


def _raise(findings: list[Finding]) -> None:
    bad = [finding for finding in findings if finding.level != "warning"]
    if not bad:
        return
    text = "preflight: " + "\n  ".join(finding.text for finding in bad[:20])
    raise (UserError if any(finding.level == "wrong" for finding in bad) else HostFailure)(text)


def _get(store: dist.Store, key: str, what: str, *, more: float = 0.0):
    try:
        store.wait([key], timedelta(seconds=VERDICT + more))
    except RuntimeError:
        raise HostFailure(f"preflight: {what} within {VERDICT + more:.0f} s") from None
    return json.loads(store.get(key))


@contextlib.contextmanager
def _file_for_all(folder: Path, store: dist.Store):
    """A file in `folder` that is there while the ranks look for it; leaves no folder behind that was not there."""
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    path, token = folder / f".preflight-{secrets.token_hex(8)}", secrets.token_hex(16)
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            speed = write_file(path, token)
        except OSError as error:
            finding = Finding("wrong", f"cannot write the run folder {folder.parent}: {error.strerror}")
            store.set("rank-0", json.dumps({"config": {}, "file": str(path), "token": token}))
            store.set("facts-verdict", json.dumps([vars(finding)]))
            time.sleep(SHARE)
            raise UserError(finding.text) from None
        yield path, token, speed
    finally:
        path.unlink(missing_ok=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
