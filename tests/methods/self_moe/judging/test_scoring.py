"""Scores of responses that are right and wrong, as answers and as programs."""

from __future__ import annotations

import pytest

from moe_dist.errors import UserError
from moe_dist.methods.self_moe.evaluation.config import HeldOut
from moe_dist.methods.self_moe.evaluation.items import Item
from moe_dist.methods.self_moe.judging.checker import Limits
from moe_dist.methods.self_moe.judging.scoring import check_items, score

LIMITS = Limits(cpu_seconds=1)


def item(*answers: str, question: str = "?", test: str | None = None) -> Item:
    return Item("1", question, answers, test, "held.jsonl:1")


def scores(held_out: HeldOut, pairs) -> list:
    items, responses = zip(*pairs, strict=True)
    return score(held_out, items, responses, limits=LIMITS, workers=2)


def test_exact_match():
    found = scores(
        HeldOut(name="math"),
        [
            (item("7"), "3 + 4 is 7.0"),
            (item("7"), "3 + 4 is 8"),
            (item("7"), "seven"),
            (item("8", "7"), "It is $7."),
            (item("<<3+4=7>> so\n#### 7"), "7"),
        ],
    )
    assert [one.right for one in found] == [True, False, False, True, True]
    assert [one.answer for one in found] == ["7", "8", None, "7", "7"]


def test_pass_at_1():
    test = "assert double(2) == 4\nassert double(0) == 0"
    good = "def double(x):\n    return 2 * x\n"
    found = scores(
        HeldOut(name="code", metric="pass_at_1"),
        [
            (item(test=test), good),
            (item(test=test), f"Sure:\n```python\n{good}```\nThat is it."),
            (item(test=test), f"```\n{good}"),  # cut before its end mark
            (item(test=test), "def double(x):\n    return x\n"),
            (item(test=test), "import sys; sys.exit(0)"),
            (item(test=test), "while True: pass"),
        ],
    )
    assert [one.right for one in found] == [True, True, True, False, False, False]
    details = [one.detail.split(":")[0] for one in found]
    assert details == ["", "", "", "failed", "failed", "timeout"]


def test_response_goes_on_with_the_instruction():
    start = 'def double(x):\n    """Twice x."""\n'
    held_out = HeldOut(name="code", metric="pass_at_1", continues=True)
    pairs = [
        (item(question=start, test="assert double(2) == 4"), body) for body in ("    return 2 * x", "    return x")
    ]
    assert [one.right for one in scores(held_out, pairs)] == [True, False]


def test_items_need_what_their_metric_needs():
    with pytest.raises(UserError, match=r"held.jsonl:1: no 'output'"):
        check_items(HeldOut(name="math"), [item(test="pass")])
    with pytest.raises(UserError, match=r"held.jsonl:1: no 'test'"):
        check_items(HeldOut(name="code", metric="pass_at_1"), [item("7")])
