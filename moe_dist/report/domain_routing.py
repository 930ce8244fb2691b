"""Which experts the tokens of each held-out domain went to, at the last evaluation and over all of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from moe_dist.report.plots import LEGEND_ENTRIES, Plot, heat_map, lines
from moe_dist.report.record import RunRecord, numbers
from moe_dist.report.routing import are_counts, filled

Shares = Mapping[int, Sequence[float]]  # step -> share of each expert

SHARE = "Share of the domain's tokens (of their slots, where a token has several experts), as a mean over layers"


def domain_plots(record: RunRecord) -> list[Plot]:
    """A heat map of domain by expert, and for each domain its shares over the evaluations; [] without any."""
    domains = {name: shares for name in record.domains if (shares := _shares(record, name))}
    if not domains:
        return []
    names = _names(record, max(len(row) for shares in domains.values() for row in shares.values()))
    last = {name: max(shares) for name, shares in domains.items()}
    plots = [
        heat_map(
            "domain_routing",
            list(domains),
            names,
            [filled(shares[last[name]], len(names)) for name, shares in domains.items()],
            title="What each expert gets of each held-out domain",
            x="expert",
            y="domain",
            meaning=f"{SHARE}, at the last evaluation (step {max(last.values())}). "
            f"{1 / len(names):.2g} is an even share.",
        )
    ]
    plots += [_over_time(number, *item, names) for number, item in enumerate(domains.items()) if len(item[1]) > 1]
    return plots


def _over_time(number: int, domain: str, shares: Shares, names: list[str]) -> Plot:
    steps = sorted(shares)
    rows = [filled(shares[step], len(names)) for step in steps]
    words = {
        "title": f"Experts of {domain} over time",
        "meaning": f"{SHARE}, at each evaluation. {1 / len(names):.2g} is an even share.",
    }
    stem = f"domain_routing_{number}_" + re.sub(r"[^A-Za-z0-9_-]", "_", domain)
    if len(names) > LEGEND_ENTRIES:  # more lines than can be told apart
        return heat_map(stem, [str(step) for step in steps], names, rows, x="expert", y="step", **words)
    series = {f"expert {name}": [row[expert] for row in rows] for expert, name in enumerate(names)}
    return lines(stem, steps, series, x="step", y="share of tokens", level=1 / len(names), **words)


def _shares(record: RunRecord, domain: str) -> dict[int, list[float]]:
    """{step: share of each expert, as a mean over layers}; where a step stands twice, the later line counts."""
    found = {}
    for entry in record.events.get("eval", []):
        domains = entry.get("domains")
        figures = domains.get(domain) if isinstance(domains, dict) else None
        layers = figures.get("experts") if isinstance(figures, dict) else None
        rows = [numbers(slots) for slots in layers.values()] if isinstance(layers, dict) else []
        rows = [slots for slots in rows if are_counts(slots)]
        if rows and len({len(slots) for slots in rows}) == 1:
            shares = [[slot / sum(slots) for slot in slots] for slots in rows]
            found[entry["step"]] = [sum(column) / len(shares) for column in zip(*shares, strict=True)]
    return found


def _names(record: RunRecord, experts: int) -> list[str]:
    """What the model calls its experts, or else their numbers."""
    named = record.last("eval").get("expert_names")
    if isinstance(named, list) and len(named) == len({*map(str, named)}) == experts:
        return [str(name) for name in named]
    return [str(expert) for expert in range(experts)]
