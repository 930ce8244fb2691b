"""Whether training data, seeds and held-out items have texts in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moe_dist.errors import PolicyStop
from moe_dist.methods.self_moe.evaluation.items import read_texts
from moe_dist.methods.self_moe.generation.filters_base import INSTRUCTION, Draft
from moe_dist.methods.self_moe.judging.overlap import SharedRuns, SimilarTexts

EXAMPLES = 5


class Contamination:
    """Known texts that others are compared with.

    A text overlaps with a known one if the two questions are near-duplicates (Jaccard similarity of their sets of
    3-grams of words) or if question or answer share a run of `ngram` words with question or answer.
    """

    def __init__(self, *, ngram: int = 13, similarity: float = 0.7):
        self._similar, self._shared = SimilarTexts(similarity), SharedRuns(ngram)

    @staticmethod
    def of_files(paths: Iterable[str | Path], *, ngram: int = 13, similarity: float = 0.7) -> Contamination:
        """With the texts of JSON or JSONL files: seeds, held-out items or chat records."""
        known = Contamination(ngram=ngram, similarity=similarity)
        for path in paths:
            for question, answer, origin in read_texts(path):
                known.add(question, answer, origin)
        return known

    def add(self, question: str, answer: str, origin: str) -> None:
        self._similar.add(question, origin)
        self._shared.add((question, answer), origin)

    def find(self, question: str, answer: str = "") -> str | None:
        """Where the known text lies that this one overlaps with; None if it overlaps with none."""
        near = self._similar.nearest(question)
        return near[0] if near else self._shared.find(question) or self._shared.find(answer)


@dataclass
class Overlaps:
    """How many of `total` texts of `name` overlap with known ones; examples: (its place, that of the known one)."""

    name: str
    total: int = 0
    found: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)

    @property
    def share(self) -> float:
        return self.found / max(self.total, 1)

    def render(self) -> str:
        """One line, and one for each example."""
        lines = [f"{self.name}: {self.found} of {self.total} items overlap ({self.share:.1%})"]
        lines += [f"  {place} with {known}" for place, known in self.examples]
        return "\n".join(lines)


def overlaps_of(name: str, texts: Iterable[tuple[str, str, str]], known: Contamination) -> Overlaps:
    """Compare (question, answer, place) triples with the known texts."""
    report = Overlaps(name)
    for question, answer, place in texts:
        report.total += 1
        if (origin := known.find(question, answer)) is not None:
            report.found += 1
            if len(report.examples) < EXAMPLES:
                report.examples.append((place, origin))
    return report


def refuse_above(reports: Sequence[Overlaps], bound: float) -> None:
    """Raise PolicyStop where a larger share than `bound` overlaps."""
    above = [report for report in reports if report.share > bound]
    if above:
        shown = "\n".join(report.render() for report in above)
        raise PolicyStop(
            f"held-out items overlap with what the model may have seen, more than max_contamination={bound:g}:\n{shown}"
        )


class NotInEvaluation:
    """Reasons: in_evaluation, the newest text overlaps with a held-out item."""

    name = "not_in_evaluation"

    def __init__(self, stage: str, known: Contamination):
        self.stage, self.known = stage, known

    def __call__(self, draft: Draft) -> str | None:
        found = self.known.find(draft.instruction, "" if self.stage == INSTRUCTION else draft.response)
        return None if found is None else "in_evaluation"
