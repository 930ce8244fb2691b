"""Filters of answers: do sampled answers agree with it, does a program find it right."""

from __future__ import annotations

import ast
import os
from collections.abc import Sequence
from pathlib import Path

from moe_dist.errors import UserError
from moe_dist.methods.self_moe.generation.filters_base import RESPONSE, Draft
from moe_dist.methods.self_moe.judging.answers import AnswerRule
from moe_dist.methods.self_moe.judging.checker import Limits, Verdict, run_programs

OWN = Path(__file__).parent / "checks"
CALL = """
_found = check({instruction!r}, {response!r})
if _found is not True:
    raise AssertionError(f"check gave {{_found!r}}")
"""


class SelfConsistent:
    """Reasons: response_no_answer, the rule finds none; response_inconsistent, too few of the samples agree with it.

    agreement: the share of `draft.samples`, answers that were sampled, that has to have the response's own answer.
    """

    name = "self_consistent"
    stage = RESPONSE

    def __init__(self, rule: AnswerRule, agreement: float):
        self.rule, self.agreement = rule, agreement

    def __call__(self, draft: Draft) -> str | None:
        answer = self.rule.find(draft.response)
        if answer is None:
            return "response_no_answer"
        agreeing = sum(self.rule.find(sample) == answer for sample in draft.samples)
        return None if agreeing >= self.agreement * len(draft.samples) else "response_inconsistent"


class Checked:
    """Reasons: check_no, check_error (an exception), check_timeout, check_killed: what `check` made of the response.

    program: a Python file with `check(instruction, response)`, or the name of one of our own. It runs in a locked-down
    process of its own for every draft. Raises UserError for a file that has no such function.
    """

    name = "checked"
    stage = RESPONSE

    def __init__(self, program: str, *, limits: Limits | None = None):
        self.limits = limits
        path = OWN / f"{program}.py"
        if not program.isidentifier() or not path.is_file():
            path = Path(program).expanduser()
        try:
            self.source = path.read_text("utf-8")
            tree = ast.parse(self.source)
        except (OSError, UnicodeDecodeError) as error:
            names = ", ".join(sorted(file.stem for file in OWN.glob("[a-z]*.py")))
            raise UserError(
                f"check={program}: cannot be read ({error}); give a Python file, or one of {names}"
            ) from None
        except (SyntaxError, ValueError) as error:
            raise UserError(f"check={program}: no Python program: {error}") from None
        if not any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in tree.body):
            raise UserError(f"check={program}: defines no function check(instruction, response)")

    def __call__(self, draft: Draft) -> str | None:
        return self.all([draft])[0]

    def all(self, drafts: Sequence[Draft]) -> list[str | None]:
        """What the program makes of each draft, one on every core at a time."""
        calls = [CALL.format(instruction=draft.instruction, response=draft.response) for draft in drafts]
        sources = (f"{self.source}\n{call}" for call in calls)
        return [_reason(it) for it in run_programs(sources, workers=os.cpu_count() or 1, limits=self.limits)]


def _reason(verdict: Verdict) -> str | None:
    if verdict.passed:
        return None
    if verdict.status == "failed":
        return "check_no" if verdict.detail.startswith("AssertionError: check gave ") else "check_error"
    return f"check_{verdict.status}"
