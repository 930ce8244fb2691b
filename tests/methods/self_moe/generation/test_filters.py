"""Each filter on drafts that it keeps and drafts that it leaves out, and all of a configuration in a row."""

from __future__ import annotations

import json

import pytest

from moe_dist.errors import UserError
from moe_dist.methods.self_moe.generation.answer_filters import Checked, SelfConsistent
from moe_dist.methods.self_moe.generation.config_filters import FilterSection
from moe_dist.methods.self_moe.generation.filters import Length, NoCircles, NoNearDuplicates, NoPrompt, filters_of
from moe_dist.methods.self_moe.generation.filters_base import INSTRUCTION, RESPONSE, Draft
from moe_dist.methods.self_moe.generation.seeds import Seed
from moe_dist.methods.self_moe.judging.answers import LAST_NUMBER, AnswerRule

SEEDS = [Seed("s1", "Name the capital of the country that lies north of Spain.", "Paris", "seeds:1")]


def draft(instruction: str, response: str | None = None, **fields) -> Draft:
    return Draft("d1", "skill", instruction, response, **fields)


def test_length_bounds_are_inclusive():
    test = Length(INSTRUCTION, 2, 3)
    given = ["one", "one two", "one two three", "one two three four"]
    assert [test(draft(text)) for text in given] == ["instruction_short", None, None, "instruction_long"]
    assert Length(RESPONSE, 1, 2)(draft("one two three", "a b c")) == "response_long"


def test_headings_of_the_prompt():
    assert NoPrompt(INSTRUCTION, ["### Response"])(draft("Say ### Response", "x")) == "instruction_prompt"
    test = NoPrompt(RESPONSE, ["### Response"])
    assert test(draft("Add 3 and 4.", "7\n### Response: 8")) == "response_prompt"
    assert test(draft("Say ### Response", "7")) is None


def test_circles_need_length_and_repetition():
    test = NoCircles()
    assert test(draft("Go on.", "and so on " * 20)) == "response_circles"
    assert test(draft("Go on.", "and so on " * 5)) is None
    assert test(draft("Count.", " ".join(map(str, range(100))))) is None
    assert test(draft("Add 3 and 4.", "add 3 and 4")) == "response_echo"


def test_near_duplicates_of_seeds_and_of_earlier_drafts():
    test = NoNearDuplicates(SEEDS, 0.7)
    given = [
        ("name the capital of the country that lies north of spain", "seed_like"),
        ("List three rivers of the country that lies south of Norway and east of Denmark.", None),
        ("List three rivers of the country that lies south of Norway and east of Holland.", "near_duplicate"),
        ("Tell me about bees.", None),
        ("Tell me about bees!", "near_duplicate"),
    ]
    assert [test(draft(text)) for text, _ in given] == [reason for _, reason in given]


def test_self_consistency():
    test = SelfConsistent(AnswerRule(LAST_NUMBER), 0.5)
    samples = ("so 7", "It is 7.0.", "it is 8", "no idea")
    assert test(draft("3+4?", "3+4 is 7", samples=samples)) is None
    assert test(draft("3+4?", "3+4 is 8", samples=samples)) == "response_inconsistent"
    assert test(draft("3+4?", "who knows", samples=samples)) == "response_no_answer"


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("3 + 4 = 7, and 7 * 6 = 42.", None),
        ("3 + 4 = 8", "check_no"),
        ("(12 + 8) / 3 = 6.67 and 1,000 - 1 = 999", None),
        ("(12 + 8) / 3 = 6.66", "check_no"),
        ("$3 x 4 = $12; 50% * 8 = 4", None),
        ("x = 3 + 4 = 7, f(3) = 9, 3 / 0 = 0, 2 = 2", None),
        ("so 2 + 2 = 5%, 1 + 1 = 3 + 4", None),
        ("Sum: 2 + 2 = 5 apples", "check_no"),
        ("no equation", None),
    ],
)
def test_own_check_of_sums(response, reason):
    assert Checked("arithmetic")(draft("?", response)) == reason


def test_own_check_of_programs():
    test = Checked("python")
    assert test(draft("?", "Here:\n```python\nassert sum([1, 2]) == 3\n```\nas asked (")) is None
    assert test(draft("?", "print(sum([1, 2]))")) is None
    assert test(draft("?", "```python\nprint(undefined)\n```")) == "check_error"
    assert test(draft("?", "import sys; sys.exit(0)")) == "check_error"


def test_check_of_the_users(tmp_path):
    program = tmp_path / "check.py"
    program.write_text("def check(instruction, response):\n    return response == instruction[::-1]\n")
    test = Checked(str(program))
    assert test(draft("ab'\"\n", "\n\"'ba")) is None
    assert test(draft("abc", "abc")) == "check_no"
    program.write_text("x = 1")
    with pytest.raises(UserError, match="defines no function check"):
        Checked(str(program))
    program.write_text("def check(:")
    with pytest.raises(UserError, match="no Python program"):
        Checked(str(program))
    with pytest.raises(UserError, match=r"cannot be read.*arithmetic, python"):
        Checked("arithmetics")


def test_all_of_a_configuration(tmp_path):
    held_out = tmp_path / "held.jsonl"
    long = "one two three four five six seven eight nine ten eleven twelve thirteen"
    items = [{"instruction": "What do bees make of flowers?", "output": "honey"}, {"instruction": "Go", "output": long}]
    held_out.write_text("\n".join(map(json.dumps, items)))
    section = FilterSection(evaluation=[str(held_out)], samples=2, check="arithmetic", answer=LAST_NUMBER)
    section.validate("filters")
    filters = filters_of(section, SEEDS, headings=["List of tasks:"])
    stages = [test.stage for test in filters]
    assert stages == sorted(stages)  # instructions before responses

    def reason(stage: str, given: Draft) -> str | None:
        return next((why for test in filters if test.stage == stage and (why := test(given))), None)

    assert reason(INSTRUCTION, draft("What do bees make of flowers?!")) == "in_evaluation"
    assert reason(INSTRUCTION, draft(f"Repeat after me: {long.upper()}")) == "in_evaluation"
    assert reason(INSTRUCTION, draft("Add the numbers three and four.")) is None
    answered = draft("Add the numbers three and four.", "3 + 4 = 7", samples=("7", "7"))
    assert reason(RESPONSE, answered) is None
    assert reason(RESPONSE, draft("Add.", f"{long} 7", samples=("7", "7"))) == "in_evaluation"
    assert reason(RESPONSE, draft("Add.", "3 + 4 = 8", samples=("8", "8"))) == "check_no"
    assert reason(RESPONSE, draft("Add.", "3 + 4 = 7", samples=("8", "9"))) == "response_inconsistent"


def test_section_is_checked():
    with pytest.raises(UserError, match=r"filters.instruction_words=\[3\]"):
        FilterSection(instruction_words=[3]).validate("filters")
    with pytest.raises(UserError, match=r"filters.answer='\(': no regular expression"):
        FilterSection(answer="(").validate("filters")
