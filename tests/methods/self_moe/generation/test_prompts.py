"""Prompts, seeds and what is read out of a brainstormed list."""

from __future__ import annotations

import itertools
import json

import pytest

from moe_dist.errors import UserError
from moe_dist.methods.self_moe.generation.backend import Sampling
from moe_dist.methods.self_moe.generation.batches import Item, cut, derive_seed
from moe_dist.methods.self_moe.generation.filters_base import INSTRUCTION, RESPONSE, Draft, NoCopies, WellFormed
from moe_dist.methods.self_moe.generation.instructions import instruction_item, parse_instructions, to_drafts
from moe_dist.methods.self_moe.generation.prompts import INSTRUCTION_SHOTS, RESPONSE_SHOTS, read_prompts, shipped
from moe_dist.methods.self_moe.generation.responses import response_item
from moe_dist.methods.self_moe.generation.seeds import Seed, read_seeds
from tests.methods.self_moe.tiny_base import PROMPTS

SEEDS = [Seed(str(n), f"task {n}\nwith more", f"answer {n}", f"seeds.jsonl:{n}") for n in range(9)]


@pytest.mark.parametrize("skill", shipped())
def test_shipped_prompts_show_three_seeds_and_five_pairs(skill):
    prompts = read_prompts(skill)
    assert prompts.origin == skill
    item = instruction_item(prompts, SEEDS, run_seed=0, skill=skill, number=7)
    assert item.id == f"{skill}-000007"
    assert str(prompts.tasks) in item.prompt.split(".")[0]  # {count} is filled in
    assert "{" not in item.prompt
    shown = [seed for seed in SEEDS if seed.instruction in item.prompt]
    assert len(shown) == INSTRUCTION_SHOTS
    assert {seed.id for seed in shown} == set(item.seeds)
    assert item.prompt.endswith("\n4.")
    assert not any(seed.response in item.prompt for seed in SEEDS)
    answer = response_item(prompts, SEEDS, run_seed=0, skill=skill, draft_id="a", instruction="a {new} task")
    shown = [seed for seed in SEEDS if f"{seed.instruction}\n\n### Response:\n{seed.response}" in answer.prompt]
    assert len(shown) == RESPONSE_SHOTS
    assert {seed.id for seed in shown} == set(answer.seeds)
    assert answer.prompt.endswith("### Instruction:\na {new} task\n\n### Response:\n")
    assert prompts.response_stop == "\n### Instruction:"


def test_seeds_are_drawn_anew_for_every_prompt_and_alike_for_the_same():
    prompts = read_prompts("math")
    draws = [instruction_item(prompts, SEEDS, run_seed=1, skill="math", number=n).seeds for n in range(40)]
    assert len(set(draws)) > 30
    assert {seed for draw in draws for seed in draw} == {seed.id for seed in SEEDS}
    assert draws == [instruction_item(prompts, SEEDS, run_seed=1, skill="math", number=n).seeds for n in range(40)]
    other = [instruction_item(prompts, SEEDS, run_seed=2, skill="math", number=n).seeds for n in range(40)]
    assert draws != other


def test_seeds_of_batches_do_not_change_with_the_python_process():
    assert derive_seed(0, "math", "instructions", 3) == 4906487485151189913


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (" one\n5. two\n6) three\n7: four", ["one", "two", "three", "four"]),
        (
            " a task:\n1. first step\n2. second step\n5. the next",
            ["a task:\n1. first step\n2. second step", "the next"],
        ),
        (" one\n\n5. two\n   more of two\n\n", ["one", "two\n   more of two"]),
        (" one\nTask 5: two", ["one", "two"]),
        (" def f(x):\n    '''5.0 is a number'''\n5. two", ["def f(x):\n    '''5.0 is a number'''", "two"]),
        (" one\n7. not the next", ["one\n7. not the next"]),
        ("\n- one\n- two\n  more\n* three", ["one", "two\n  more", "three"]),
        (" which?\n- A\n- B\n5. two", ["which?\n- A\n- B", "two"]),
        (" one\n5. two\n6. three\n7. four\n8. five\n9. six\n10. over", ["one", "two", "three", "four", "five"]),
        ("", [""]),
    ],
)
def test_instructions_in_a_list(text, found):
    assert parse_instructions(text, first=4, tasks=8) == found


def test_only_the_last_of_a_list_that_was_cut_is_unfinished():
    drafts = to_drafts("math", "math-000001", " one\n5. two\n6. thr", finished=False, tasks=20)
    assert [(draft.id, draft.instruction, draft.finished) for draft in drafts] == [
        ("math-000001-00", "one", True),
        ("math-000001-01", "two", True),
        ("math-000001-02", "thr", False),
    ]
    assert all(draft.finished for draft in to_drafts("math", "p", " one\n5. two", finished=True, tasks=20))


def test_first_filters():
    copies = NoCopies(SEEDS)
    assert copies(Draft("a", "s", "Task 3  WITH more")) == "seed_copy"
    assert copies(Draft("b", "s", "new task")) is None
    assert copies(Draft("c", "s", "New\ntask")) == "duplicate"
    assert WellFormed(INSTRUCTION)(Draft("d", "s", "cut", finished=False)) == "instruction_unfinished"
    assert WellFormed(INSTRUCTION)(Draft("d", "s", " \n")) == "instruction_empty"
    assert WellFormed(RESPONSE)(Draft("d", "s", "task", "", finished=True)) == "response_empty"
    assert WellFormed(RESPONSE)(Draft("d", "s", "task", "done")) is None


def test_batches_hold_every_item_once_and_like_lengths_together():
    items = [Item(f"{n:03d}", "x" * (n * 37 % 50), ()) for n in range(23)]
    common = {"skill": "s", "phase": "p", "sampling": Sampling(0.0, 1.0, 8), "run_seed": 0}
    batches = cut(items, first=4, size=5, **common)
    assert [batch.index for batch in batches] == [4, 5, 6, 7, 8]
    assert sorted(item.id for batch in batches for item in batch.items) == [item.id for item in items]
    lengths = [[len(item.prompt) for item in batch.items] for batch in batches]
    assert all(min(before) >= max(after) for before, after in itertools.pairwise(lengths))
    assert len({batch.seed for batch in batches}) == 5
    again = cut(list(reversed(items)), first=4, size=5, **common)
    assert again == batches
    warmer = cut(items, first=4, size=5, **{**common, "sampling": Sampling(1.0, 1.0, 8)})
    assert warmer[0].digest({}) != batches[0].digest({}) == again[0].digest({}) != again[0].digest({"model": "other"})


RECORD = {"instruction": "add", "output": "3", "input": "1 2"}


def seed_file(tmp_path, *records) -> str:
    lines = [json.dumps({**RECORD, "instruction": f"add {n}"}) for n in range(5)]
    lines += [record if isinstance(record, str) else json.dumps(record) for record in records]
    path = tmp_path / "seeds.jsonl"
    path.write_text("\n".join(lines))
    return str(path)


def test_seeds_join_instruction_and_input(tmp_path):
    seeds = read_seeds(
        seed_file(tmp_path, {"id": "x7", "instruction": " say hi ", "output": "hi\n"}), skill="s", least=5
    )
    assert (seeds[0].id, seeds[0].instruction, seeds[0].response) == ("1", "add 0\n1 2", "3")
    assert (seeds[5].id, seeds[5].instruction, seeds[5].response) == ("x7", "say hi", "hi")
    assert seeds[5].origin.endswith("seeds.jsonl:6")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"instruction": "add", "response": "3"}, r"no field 'output' \(fields here: instruction, response\)"),
        ({"output": "3"}, "no field 'instruction'"),
        ({"instruction": "add", "output": 3}, "'output' has to be a string, not int"),
        ({"instruction": "add", "output": "3", "input": ["1"]}, "'input' has to be a string, not list"),
        ({"instruction": "  ", "output": "3"}, "'instruction' is empty"),
        ({"instruction": "add 2", "input": "1 2", "output": "9"}, "the same instruction as in .*seeds.jsonl:3"),
        ({"instruction": "add", "output": "3", "id": "2"}, "the same id as in .*seeds.jsonl:2"),
        (["add", "3"], "a seed has to be an object, not list"),
        ('{"instruction": "add", ', "not valid JSON"),
        ({"instruction": "add \ud800", "output": "3"}, "surrogate"),
    ],
)
def test_wrong_seeds_are_named_with_file_and_line(tmp_path, record, message):
    with pytest.raises(UserError, match=rf"seeds\.jsonl:6: .*{message}"):
        read_seeds(seed_file(tmp_path, record), skill="s", least=5)


def test_too_few_seeds(tmp_path):
    with pytest.raises(UserError, match="5 seeds for sums, but a prompt shows 6"):
        read_seeds(seed_file(tmp_path), skill="sums", least=6)
    with pytest.raises(UserError, match=r"none\.jsonl: cannot be opened"):
        read_seeds(tmp_path / "none.jsonl", skill="sums", least=5)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("tasks: 8", "tasks: 3", "tasks=3 has to be a number above the 3"),
        ("tasks: 8", "tasks: many", "tasks=many"),
        ("tasks: 8\n", "", "no key tasks"),
        ("tasks: 8", "tasks: 8\nrole: x", "unknown key role"),
        ("A {response}", "A", "once each"),
        ("A {response}", "A {response}.", r"end with \{response\}"),
        ("Q {instruction}", "{instruction}", "after a heading"),
        ("Q {instruction}", "Q {instruction} {instruction}", "once each"),
        ('answer: "Answers"', "answer: 3", "answer has to be a text"),
    ],
)
def test_wrong_prompt_files_are_named_with_the_key(tmp_path, before, after, message):
    path = tmp_path / "mine.yaml"
    path.write_text(PROMPTS.replace(before, after))
    with pytest.raises(UserError, match=rf"mine\.yaml: .*{message}"):
        read_prompts("math", str(path))


def test_prompts_of_a_skill():
    assert read_prompts("cooking").origin == "generic"
    assert read_prompts("cooking", "math").hash == read_prompts("math").hash != read_prompts("generic").hash
    with pytest.raises(UserError, match=r"generate\.prompts\.math=none\.yaml: no such file, and not one of coding"):
        read_prompts("math", "none.yaml")
