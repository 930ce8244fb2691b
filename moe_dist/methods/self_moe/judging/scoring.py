"""Whether a response is right: by its answer, or by running it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from moe_dist.errors import UserError
from moe_dist.methods.self_moe.evaluation.config import EXACT_MATCH, HeldOut
from moe_dist.methods.self_moe.evaluation.items import Item
from moe_dist.methods.self_moe.judging.answers import AnswerRule
from moe_dist.methods.self_moe.judging.checker import Limits, run_programs

FENCED = re.compile(r"```(?:[Pp]ython3?|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Score:
    """answer: what was found in the response, None if nothing was. detail: why a program did not pass."""

    right: bool
    answer: str | None
    detail: str


def check_items(held_out: HeldOut, items: Sequence[Item]) -> None:
    """UserError for an item without what its metric needs."""
    for item in items:
        if held_out.metric == EXACT_MATCH and not item.answers:
            raise UserError(f"{item.origin}: no 'output', which metric exact_match compares with")
        if held_out.metric != EXACT_MATCH and item.test is None:
            raise UserError(f"{item.origin}: no 'test', which metric pass_at_1 runs")


def score(
    held_out: HeldOut, items: Sequence[Item], responses: Sequence[str], *, limits: Limits, workers: int
) -> list[Score]:
    """One score for each item. Programs run `workers` at a time, locked down."""
    if held_out.metric == EXACT_MATCH:
        rule = AnswerRule(held_out.answer)
        found = [rule.find(response) for response in responses]
        return [Score(rule.same(answer, item.answers), answer, "") for answer, item in zip(found, items, strict=True)]
    programs = [program_of(item, response, held_out) for item, response in zip(items, responses, strict=True)]
    tested = (f"{program}\n{item.test}\n" for program, item in zip(programs, items, strict=True))
    verdicts = run_programs(tested, workers=workers, limits=limits)
    return [
        Score(verdict.passed, program, "" if verdict.passed else f"{verdict.status}: {verdict.detail}")
        for program, verdict in zip(programs, verdicts, strict=True)
    ]


def program_of(item: Item, response: str, held_out: HeldOut) -> str:
    """The code in a response: its fenced blocks, or all of it; after the instruction where it goes on with that."""
    if held_out.continues:
        return item.question + response
    return "\n".join(FENCED.findall(response)) or response
