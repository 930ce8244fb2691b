"""What is wrong with the facts of all ranks: pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

CLOCK = 10.0  # seconds that clocks may differ
LISTED = 8


@dataclass(frozen=True)
class Finding:
    """level: 'wrong' (the user has to repair something), 'failed' (a host or its network; another might do) or
    'warning'."""

    level: str
    text: str


def compare(facts: Sequence[dict]) -> list[Finding]:
    """Findings about the ranks' facts, by rank; see `facts.own_facts`."""
    findings = []
    packages = dict.fromkeys(name for fact in facts for name in fact["versions"])
    for name in packages:
        findings += _odd(facts, lambda fact, name=name: fact["versions"].get(name), f"{name} is", "install the same")
    findings += _odd(
        facts,
        lambda fact: fact["package"][:12],
        "moe_dist's own files are",
        "start all ranks from the same checkout or environment",
    )
    for rank, fact in enumerate(facts):
        if fact["config"]:
            findings.append(
                Finding(
                    "wrong",
                    f"rank {rank} on {fact['host']} has another configuration: {'; '.join(fact['config'][:LISTED])}; "
                    "give all hosts the same file and overrides",
                )
            )
        if not fact["sees"]:
            findings.append(
                Finding(
                    "failed",
                    f"rank {rank} on {fact['host']} does not see the run folder as rank 0 on {facts[0]['host']} does: "
                    "run.dir has to be on a file system that all hosts share, at the same path",
                )
            )
        ahead = fact["told"] - fact.get("heard", fact["told"])
        if abs(ahead) > CLOCK:
            off = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} rank 0's"
            text = f"the clock of {fact['host']} (rank {rank}) is {off}: their logs cannot be compared"
            findings.append(Finding("warning", text))
    findings += [
        Finding("warning", finding.text)
        for finding in _odd(facts, lambda fact: fact["device"], "the device is", "expect the pace of the slowest")
    ]
    return findings


def _odd(facts: Sequence[dict], value: Callable[[dict], object], what: str, to_do: str) -> list[Finding]:
    """A finding for each value that is not the commonest one (of equals, rank 0's)."""
    values = [value(fact) for fact in facts]
    common = max(Counter(values).items(), key=lambda item: (item[1], item[0] == values[0]))[0]
    findings = []
    for other in dict.fromkeys(values):
        if other == common:
            continue
        ranks = [rank for rank, its in enumerate(values) if its == other]
        hosts = dict.fromkeys(facts[rank]["host"] for rank in ranks)
        listed = ", ".join(map(str, ranks[:LISTED])) + (", ..." if len(ranks) > LISTED else "")
        where = f"rank{'s' * (len(ranks) > 1)} {listed} on {', '.join(list(hosts)[:LISTED])}"
        findings.append(Finding("wrong", f"{where}: {what} {other}, on the others {common}; {to_do}"))
    return findings
