"""The one table of all benchmarks, as Markdown."""

from __future__ import annotations

ROW = ("case", "unit", "ours", "peer", "peer_name", "ratio")

HEAD = """# All benchmarks

Written by `make bench` (`make bench ONLY="NAME ..."` for some of them). `ratio` is peer / ours: above 1 is better for
us. Times are medians; behind them, in brackets, the first and the third quartile over repetitions.
"""


def render(results: dict[str, dict]) -> str:
    """`benchmark -> what measure() of benchmarks.__main__ gives`."""
    runs = ["benchmark", "about", "command", "device", "versions", "day", "seconds", "exit status", "rows"]
    lines = [HEAD, "## Runs", "", *_head(runs)]
    for name, result in sorted(results.items()):
        versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
        cells = [name, result["about"], f"`{result['command']}`", result["device"], versions, result["day"]]
        lines.append(_line([*cells, f"{result['seconds']:.0f}", result["exit_status"], len(result["rows"])]))
    lines += ["", "## Rows", "", *_head(["benchmark", "case", "unit", "ours", "peer", "ratio", "peer is"])]
    for name, result in sorted(results.items()):
        for row in result["rows"]:
            sides = [_figure(row, "ours"), _figure(row, "peer")]
            lines.append(_line([name, row["case"], row["unit"], *sides, f"{row['ratio']:.2f}", row["peer_name"]]))
    return "\n".join(lines) + "\n"


def _figure(row: dict, side: str) -> str:
    spread = row.get(f"{side}_spread")
    return f"{row[side]:.4g}" + (f" ({spread[0]:.4g} to {spread[1]:.4g})" if spread else "")


def _head(titles: list[str]) -> list[str]:
    return [_line(titles), "|" + "---|" * len(titles)]


def _line(cells: list) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
