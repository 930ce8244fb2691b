"""Which answer a rule finds, and which answers are the same."""

from __future__ import annotations

import pytest

from moe_dist.methods.self_moe.judging.answers import LAST_NUMBER, AnswerRule, normalise


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("First 3, then 1,234.50 in all.", "1234.5"),
        ("The answer is $42.", "42"),
        ("5-3", "3"),
        ("x = -3", "-3"),
        ("about 2.5e3 of them", "2500"),
        ("it is 1,234,", "1234"),
        ("room b12", None),
        ("50% of them", "50"),
        ("none", None),
    ],
)
def test_last_number(text, found):
    assert AnswerRule(LAST_NUMBER).find(text) == found


def test_pattern_takes_last_match_and_first_group():
    rule = AnswerRule(r"^Answer:\s*(.+)$")
    assert rule.find("Answer: B\nor rather\nAnswer:  C.\n") == "c"
    assert rule.find("B") is None
    assert rule.same(rule.find("Answer: 3.0"), ["3"])
    assert not rule.same(rule.find("no"), ["no"])
    assert AnswerRule("").find("  The  Whole\ntext. ") == "the whole text"


def test_targets_are_searched_too():
    rule = AnswerRule(r"#### (.+)")
    assert rule.same(rule.find("so\n#### 1,000"), ["500 + 500\n#### 1000"])


@pytest.mark.parametrize(
    ("same", "one"),
    [
        (["3", "3.0", "3.", "+3", "03", "$3", "3e0"], "3"),
        (["0", "-0", "0.00", "0e9"], "0"),
        (["12345678901234567890123456789012345"], "12345678901234567890123456789012345"),
        (["50%", "50.0 %".replace(" ", "")], "50%"),
        (["Paris.", " paris ", "PARIS"], "paris"),
        (["1e99999"], "1e99999"),
        (["."], ""),
    ],
)
def test_spellings(same, one):
    assert {normalise(text) for text in same} == {one}


def test_long_numbers_are_not_rounded():
    assert normalise("1" * 40) != normalise("1" * 39 + "2")
