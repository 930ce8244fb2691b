"""Each filter on records that it keeps and records that it leaves out, and what is counted."""

from __future__ import annotations

from moe_dist.methods.self_moe.filters import Filters, Format, Length, NearDuplicates


def record(question: str, answer: str | None = None, number: int = 0) -> dict:
    messages = [{"role": "user", "content": question}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return {"id": f"r{number}", "messages": messages, "skill": "s", "provenance": {}}


def test_format():
    test = Format(stops=["### Response"])
    assert test(record("Add 3 and 4.")) is None
    assert test(record("Add 3 and 4.", "7")) is None
    assert test(record("?!")) == "empty instruction"
    assert test(record("Say ### Response")) == "prompt in the instruction"
    assert test(record("Add 3 and 4.", " \n")) == "empty answer"
    assert test(record("Add 3 and 4.", "7\n### Response: 8")) == "prompt in the answer"
    assert test(record("Add 3 and 4.", "add 3 and 4")) == "answer repeats the instruction"


def test_circles_need_length_and_repetition():
    test = Format()
    assert test(record("Go on.", "and so on " * 20)) == "answer goes round in circles"
    assert test(record("Go on.", "and so on " * 5)) is None
    assert test(record("Count.", " ".join(map(str, range(100))))) is None


def test_length_bounds_are_inclusive():
    test = Length(instruction=(2, 3), answer=(1, 2))
    assert test(record("one")) == "instruction too short"
    assert test(record("one two")) is None
    assert test(record("one two three")) is None
    assert test(record("one two three four")) == "instruction too long"
    assert test(record("one two", "a b")) is None
    assert test(record("one two", "a b c")) == "answer too long"


def test_near_duplicates_of_seeds_and_of_kept_records_only():
    seeds = ["Name the capital of the country that lies north of Spain."]
    filters = Filters([Format(), NearDuplicates(seeds=seeds)])
    given = [
        ("name the capital of the country that lies north of spain", "near-duplicate of a seed"),
        ("List three rivers of the country that lies south of Norway and east of Denmark.", None),
        ("List three rivers of the country that lies south of Norway and east of Holland.", "near-duplicate"),
        ("Tell me about bees.", None),
        ("Tell me about bees!", "near-duplicate"),
        ("...", "empty instruction"),
        ("...", "empty instruction"),
    ]
    for number, (question, reason) in enumerate(given):
        assert filters(record(question, number=number)) == reason, question
    left_out = {"near-duplicate": 2, "empty instruction": 2, "near-duplicate of a seed": 1}
    assert filters.summary() == {"kept": 2, "left_out": left_out}


def test_what_another_filter_left_out_is_no_precedent():
    filters = Filters([NearDuplicates(), Length(instruction=(1, 9), answer=(1, 3))])
    assert filters(record("Tell me about bees.", "far too many words here")) == "answer too long"
    assert filters(record("Tell me about bees.", "They hum.")) is None
