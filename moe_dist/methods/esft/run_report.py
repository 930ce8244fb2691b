"""What ESFT has to show of a run: the experts that train, how steep their use is, and what tasks have in common."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_dist.config.expert_files import KINDS, Summary, read_summary
from moe_dist.config.strict_json import read_json
from moe_dist.errors import UserError
from moe_dist.methods.esft.figures import compared, coverage, experts_per_layer, short_names, task_overlap
from moe_dist.report.page import Section
from moe_dist.report.plots import Plot
from moe_dist.report.record import RunRecord, by_layer, number
from moe_dist.report.routing import whole_run
from moe_dist.report.tables import Table

SUMMARY = "summary.json"


def section(record: RunRecord, *, compare: Sequence[str | Path] = ()) -> Section:
    """The part of a run's page about its experts.

    compare: score files of other tasks. Scores of the run are those it was placed by, or a summary.json in its folder
    (or in the recipe's that it is a stage of), or else the routing that the run itself has counted. Raises UserError
    where a file of `compare` cannot be read, or is of another model.
    """
    others = {str(path): read_summary(path) for path in compare}
    plots, missing = _selected(record)
    own, source = _own_scores(record, missing)
    if own is None:
        missing.append(
            "No scores: the folder has no summary.json of `moe-dist esft score`, and the run has not counted its "
            "routing yet. So there are no coverage curves"
            + (", and nothing to compare the other tasks with." if others else ".")
        )
    else:
        kind = next(kind for kind in KINDS if own.scores.get(kind))
        scores = own.of_kind(kind)
        plots.append(coverage(scores, of=f"{kind} score, {source}"))
        if others:
            names = [record.name, *short_names(list(others))]
            tasks = [scores, *(other.of_kind(kind, where=path) for path, other in others.items())]
            top = compared([own.extra.get("top_k"), record.setting("model", "config", "num_experts_per_tok")])
            if names[0] in names[1:]:
                names[0] += " (this run)"
            named = dict(zip(names, tasks, strict=True))
            plots.append(task_overlap(named, top=top))
        else:
            missing.append("Overlap between tasks: give the summary.json of others with --compare.")
    return Section("Experts", plots, _selections(record, missing), missing)


def _selected(record: RunRecord) -> tuple[list[Plot], list[str]]:
    layers = record.last("trainable").get("layers")
    counts = {}
    for layer in by_layer(layers) if isinstance(layers, dict) else []:
        row = layers[layer] if isinstance(layers[layer], dict) else {}
        trained, experts = row.get("experts_trained"), row.get("experts")
        if type(trained) is type(experts) is int and experts > 0:
            counts[layer] = (trained, experts)
    if not counts:
        return [], ["The run has not said which experts train."]
    if all(trained == experts for trained, experts in counts.values()):
        return [], ["All experts of all layers train."]
    if not any(trained for trained, _ in counts.values()):
        return [], ["No expert trains."]
    return [experts_per_layer({layer: trained for layer, (trained, _) in counts.items()}, of=record.name)], []


def _own_scores(record: RunRecord, missing: list[str]) -> tuple[Summary | None, str]:
    """(the scores, where they come from in words)"""
    placed_by = record.setting("parallel", "placement_scores")
    for path in [*([Path(placed_by)] if isinstance(placed_by, str) else []), *(f / SUMMARY for f in _folders(record))]:
        if path.is_file():
            try:
                return read_summary(path), path.name
            except UserError as error:
                missing.append(f"not used: {error}")
    counts = whole_run(record)
    if not counts:
        return None, ""
    shares = {layer: [count / sum(slots) for count in slots] for layer, slots in counts.items()}
    return Summary({"token": shares}), "counted in training"


def _selections(record: RunRecord, missing: list[str]) -> list[Table]:
    tables: dict[str, Table] = {}
    for path in (path for folder in _folders(record) for path in sorted(folder.glob("*.selection.json"))):
        try:
            table = _selection_table(path, read_json(path))
        except UserError as error:
            missing.append(f"not used: {error}")
            continue
        if table.name in tables:
            missing.append(f"not shown: {path}, since another selection is called so too")
        tables.setdefault(table.name, table)
    return list(tables.values())


def _selection_table(path: Path, choice: Mapping) -> Table:
    layers = choice.get("layers")
    if not isinstance(layers, dict) or not all(isinstance(figures, dict) for figures in layers.values()):
        raise UserError(f"{path}: no selection of `moe-dist esft select`: there are no layers in it")
    keys = ("selected", "experts", "covered", "mass")
    rows = [(layer, *(number(layers[layer].get(key)) for key in keys)) for layer in by_layer(layers)]
    stem = path.name.removesuffix(".selection.json")
    how = ", ".join(f"{key} {choice[key]}" for key in ("kind", "p", "p_mode", "control") if key in choice)
    return Table(
        "selection_" + re.sub(r"[^A-Za-z0-9_-]", "_", stem),
        f"Selection {stem}",
        ("layer", "selected", "of experts", "score covered", "of score"),
        rows,
        f"Experts chosen by `moe-dist esft select` ({how}).",
    )


def _folders(record: RunRecord) -> list[Path]:
    """The run's folder, and that of its recipe if it is a stage of one."""
    above = record.folder.absolute().parent
    return [record.folder, *([above] if (above / "stages").is_dir() else [])]
