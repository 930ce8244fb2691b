"""The folder that generation writes: SKILL.jsonl for every skill, report.yaml, and the parts from which it goes on.

Nothing beside the records has a name that a reader of data would take for some: the folder as a whole is a data set.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from moe_dist.config.load import read_mapping
from moe_dist.data.atomic import sync_folder, write_durably
from moe_dist.data.fingerprint import digest
from moe_dist.errors import UserError
from moe_dist.methods.self_moe.generation.config import GenerateConfig
from moe_dist.methods.self_moe.generation.prompts import Prompts
from moe_dist.methods.self_moe.generation.rounds import SkillRun
from moe_dist.methods.self_moe.generation.seeds import Seed

REPORT = "report.yaml"
_PATHS = ("model", "tokenizer", "seeds", "prompts")  # what lies there counts, not where
_REMEDIES = {
    "instruction_unfinished": "raise generate.instruction_tokens, or lower `tasks` in the prompt file",
    "response_unfinished": "raise generate.response_tokens; a model that never ends an answer has not learned how",
    "response_empty": "look whether the seed answers are what the model can go on from",
    "duplicate": "raise generate.temperature or generate.top_p, or give more varied seeds",
    "near_duplicate": "raise generate.temperature or filters.similarity, or give more varied seeds",
    "seed_copy": "give more varied seeds",
    "seed_like": "give more varied seeds, or raise filters.similarity",
    "instruction_over_context": "shorten the seeds, or lower generate.response_tokens",
}


class Output:
    """A folder of records. inputs: seeds and prompts by skill (on rank 0). identity: the backend's."""

    def __init__(
        self,
        folder: Path,
        config: GenerateConfig,
        inputs: dict[str, tuple[Sequence[Seed], Prompts]],
        identity: dict[str, Any],
    ):
        self.folder, self.parts = folder, folder / ".parts"
        settings = asdict(config)
        settings["generate"] = {name: value for name, value in settings["generate"].items() if name not in _PATHS}
        shown = {
            skill: [prompts.hash, [[seed.id, seed.instruction, seed.response] for seed in seeds]]
            for skill, (seeds, prompts) in inputs.items()
        }
        self.identity = digest([settings, shown, identity])

    def prepare(self, *, overwrite: bool) -> None:
        """Make the folder. Raises UserError where it holds something else, or records of other settings."""
        report = self.folder / REPORT
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: no folder can be made there: {error.strerror}") from None
        if report.exists():
            tree = read_mapping(report)
            if not overwrite and tree.get("identity") != self.identity:
                raise UserError(
                    f"{self.folder}: holds records that were generated with other settings, seeds or another model; "
                    "name a new folder, or give --overwrite"
                )
            if overwrite:
                for skill in tree.get("skills") or {}:
                    self._file(skill).unlink(missing_ok=True)
                report.unlink()
        elif not overwrite and not self.parts.is_dir() and (left := sorted(os.listdir(self.folder))):
            raise UserError(
                f"{self.folder}: is not empty ({', '.join(left[:5])}); name a new folder, or give --overwrite"
            )
        if overwrite and self.parts.is_dir():
            shutil.rmtree(self.parts)

    def finish(self, skills: Sequence[SkillRun], say: Callable[[str], None] | None) -> None:
        """Write the records of every skill that has some, and the report; raises UserError for those that have none."""
        for run in skills:
            if run.records:
                lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in run.records[: run.section.count]]
                self._write(self._file(run.skill), "".join(lines))
        rows = {run.skill: describe(run) for run in skills}
        if say:
            for line in render(rows):
                say(line)
        empty = [run for run in skills if not run.records]
        if empty:
            raise UserError("; ".join(map(_without_records, empty)))
        tree = {"identity": self.identity, "skills": rows}
        self._write(self.folder / REPORT, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
        if say:
            say(f"wrote {', '.join(str(self._file(skill)) for skill in rows)}")

    def _file(self, skill: str) -> Path:
        return self.folder / f"{skill}.jsonl"

    def _write(self, path: Path, text: str) -> None:
        temporary = path.with_name(f".{path.name}-{os.getpid()}")
        write_durably(temporary, text.encode("utf-8", "replace"))
        os.replace(temporary, path)
        sync_folder(path.parent)


def describe(run: SkillRun) -> dict[str, Any]:
    """What became of a skill, in numbers: prompts, instructions found, answered, kept, left out by reason."""
    return {
        "seeds": len(run.seeds),
        **{name: run.counts[name] for name in ("prompts", "instructions", "answered")},
        "kept": min(len(run.records), run.section.count),
        "asked_for": run.section.count,
        "left_out": dict(run.reasons.most_common()),
    }


def render(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The report as lines of a table."""
    width = max(map(len, rows))
    lines = [f"{'skill':<{width}}  {'prompts':>8} {'instructions':>12} {'answered':>8} {'kept':>8}  left out"]
    for skill, row in rows.items():
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in row["left_out"].items()) or "none"
        figures = f"{row['prompts']:>8,} {row['instructions']:>12,} {row['answered']:>8,} {row['kept']:>8,}"
        lines.append(f"{skill:<{width}}  {figures}  {reasons}")
    for skill, row in rows.items():
        if 0 < row["kept"] < row["asked_for"]:
            lines.append(
                f"{skill}: {row['kept']:,} of {row['asked_for']:,} records after {row['prompts']:,} brainstorming "
                "prompts; generate.max_prompts allows more"
            )
    return lines


def _without_records(run: SkillRun) -> str:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in run.reasons.most_common()) or "it wrote none"
    advice = [_REMEDIES[reason] for reason, _ in run.reasons.most_common(3) if reason in _REMEDIES]
    advice = advice or ["take a larger base model, or prompts and seeds in a form that it goes on from"]
    return (
        f"no usable generations for the skill {run.skill}: {run.counts['prompts']:,} prompts gave "
        f"{run.counts['instructions']:,} instructions, {run.counts['answered']:,} were answered, none was kept "
        f"({reasons}). What helps: {'; '.join(advice)}"
    )
