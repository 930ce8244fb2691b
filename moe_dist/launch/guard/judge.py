"""Who is to blame: pure functions over what the hub knows of each rank."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from moe_dist.launch.guard.beat import LONG, Position

LONG_WAIT = 7200.0  # seconds without progress in a phase that may be long
STEP_WAIT = 600.0  # in any other, or SLOWEST times the longest stay in one so far
PREFLIGHT_WAIT, GROUPS_WAIT = 60.0, 180.0  # many ranks take their time to connect with each other
SLOWEST = 20
SLOW = 2.0  # a rank that works so many times as long as the others' median is a straggler


@dataclass
class Known:
    """What the hub knows of a rank. since: when it last made progress, by the hub's clock.

    state: its process' state in /proc ('T': stopped). waiting, top: from its stack, once asked for: whether it waits
    for others, and its innermost line.
    """

    host: str = "an unknown host"
    position: Position = field(default_factory=Position)
    since: float = 0.0
    state: str = "?"
    waiting: bool | None = None
    top: str = ""


def limit(phase: str, *, hang_timeout: float | None, longest: float) -> float:
    """Seconds that a rank may stay in `phase`. longest: the longest stay so far in a phase that is not long."""
    if hang_timeout is not None:
        return hang_timeout or float("inf")
    if phase == "the preflight":
        return PREFLIGHT_WAIT
    if phase == "forming groups":
        return GROUPS_WAIT
    return LONG_WAIT if phase in LONG else max(STEP_WAIT, SLOWEST * longest)


def who_hangs(ranks: Mapping[int, Known]) -> tuple[list[int], str]:
    """The ranks that keep the others waiting, and why it is them; none where all are at the same place."""
    stopped = [rank for rank, known in ranks.items() if known.state in ("T", "t")]
    if stopped:
        return stopped, "is stopped"
    first = min(known.position.beats for known in ranks.values())
    behind = [rank for rank, known in ranks.items() if known.position.beats == first]
    if len(behind) < len(ranks):
        working = [rank for rank in behind if ranks[rank].waiting is False]
        if working or not all(ranks[rank].waiting for rank in behind):
            return working or behind, "is behind the others"
        # A pipeline stage may be behind because it waits for one that is not.
    working = [rank for rank, known in ranks.items() if known.waiting is False]
    if working and len(working) < len(ranks):
        return working, "does not come to where the others wait for it"
    return ([], "") if len(behind) == len(ranks) else (behind, "is behind the others")


def hang_line(ranks: Mapping[int, Known], *, now: float) -> tuple[int | None, str]:
    """(the first rank to blame, None where none stands out; one line about it)."""
    culprits, why = who_hangs(ranks)
    if not culprits:
        known = next(iter(ranks.values()))
        seconds = now - max(known.since for known in ranks.values())
        return None, (
            f"all {len(ranks)} ranks have hung for {seconds:.0f} s at the same place ({known.position}): the network, "
            "or collectives that do not match"
        )
    rank = culprits[0]
    known = ranks[rank]
    others = f"; so do ranks {', '.join(map(str, culprits[1:9]))}" if len(culprits) > 1 else ""
    at = f" at {known.top}" if known.top else ""
    seconds = now - known.since
    if known.state in ("T", "t"):
        line = f"is stopped (SIGSTOP): no progress for {seconds:.0f} s in {known.position}"
        return rank, f"rank {rank} on {known.host} {line}{others}"
    return (
        rank,
        f"rank {rank} on {known.host} hangs: no progress for {seconds:.0f} s in {known.position}{at}; it {why}"
        + others,
    )


def stragglers(work: Mapping[int, float], teams: Mapping[int, int]) -> dict[int, float]:
    """Rank -> how many times the others' median its work is, for those beyond SLOW. work: seconds of a step. teams:
    rank -> a number; the others are those of the same."""
    found = {}
    for rank, own in work.items():
        others = sorted(seconds for other, seconds in work.items() if other != rank and teams[other] == teams[rank])
        if not others:
            continue
        middle = len(others) // 2
        median = others[middle] if len(others) % 2 else (others[middle - 1] + others[middle]) / 2
        if own > SLOW * median and own > 1e-3:
            found[rank] = own / max(median, 1e-9)
    return found
