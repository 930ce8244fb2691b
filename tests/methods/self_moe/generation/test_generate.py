"""Generation from end to end with a real model: M8, any number of ranks, interruptions, skills without records."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

from moe_dist.data.chat import encode_chat
from moe_dist.data.records import RecordLog
from moe_dist.data.sources import local_source
from moe_dist.errors import EXIT_OK, UserError
from moe_dist.methods.self_moe.generation.config import load_config
from moe_dist.methods.self_moe.generation.generate import generate
from moe_dist.methods.self_moe.generation.local_model import LocalModel
from moe_dist.methods.self_moe.generation.seeds import read_seeds

SKILLS = ("echo", "twice")
pytestmark = pytest.mark.usefixtures("one_thread")
ALPACA = Path(__file__).parents[4] / "configs" / "self_moe" / "alpaca.jinja"


def run(config: Path, out: Path, **options) -> int:
    return generate(load_config(config), out, device=torch.device("cpu"), **{"say": None, **options})


def records_of(out: Path, skill: str) -> list[dict]:
    return [json.loads(line) for line in (out / f"{skill}.jsonl").read_text().splitlines()]


def bytes_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file()}


def test_m8_the_data_pipeline(generation, tmp_path, batches):
    """M8: three distinct seeds in an instruction prompt, five pairs in a response prompt, greedy answers, no
    duplicates, no seeds among the records; and the same again from the same seed."""
    config, lines = generation(), []
    assert run(config, tmp_path / "out", say=lines.append) == EXIT_OK
    by_skill = {skill: read_seeds(tmp_path / f"{skill}.jsonl", skill=skill, least=5) for skill in SKILLS}
    instructions = {seed.instruction for seeds in by_skill.values() for seed in seeds}
    pairs = {f"Q {seed.instruction}\nA {seed.response}" for seeds in by_skill.values() for seed in seeds}
    kinds = [0, 0]
    for prompts, sampling in batches:
        for prompt in prompts:
            if prompt.startswith("Tasks 8\n"):
                *shown, last = prompt.split("\n")[1:]
                assert [line.split(". ", 1)[0] for line in shown] == ["1", "2", "3"]
                assert last == "4."
                texts = {line.split(". ", 1)[1] for line in shown}
                assert len(texts) == 3
                assert texts <= instructions
                assert (sampling.temperature, sampling.top_p) == (1.0, 0.98)
                kinds[0] += 1
            else:
                head, *shown = prompt.split("\n\n")[:6]
                assert head == "Answers"
                assert len(set(shown)) == 5
                assert set(shown) <= pairs
                asked = prompt.removeprefix("\n\n".join([head, *shown, ""]))
                assert asked.startswith("Q ")
                assert asked.endswith("\nA")
                assert sampling.temperature == 0
                kinds[1] += 1
    assert min(kinds) > 0
    report = yaml.safe_load((tmp_path / "out" / "report.yaml").read_text())["skills"]
    for skill in SKILLS:
        records = records_of(tmp_path / "out", skill)
        assert len(records) == 12
        texts = [record["messages"][0]["content"] for record in records]
        assert len({text.casefold() for text in texts}) == 12
        assert not instructions & set(texts)
        ids = {seed.id for seed in by_skill[skill]}
        for record in records:
            origin = record["provenance"]
            assert len(set(origin["instruction"]["seeds"])) == 3
            assert len(set(origin["response"]["seeds"])) == 5
            assert {*origin["instruction"]["seeds"], *origin["response"]["seeds"]} <= ids
            assert origin["base"]["model"].startswith("sampled:")
            assert origin["response"]["sampling"]["temperature"] == 0
        row = report[skill]
        before = sum(n for reason, n in row["left_out"].items() if not reason.startswith("response"))
        after = sum(n for reason, n in row["left_out"].items() if reason.startswith("response"))
        assert row["answered"] + before <= row["instructions"]  # the rest still waited when the count was reached
        assert row["kept"] <= row["answered"] - after
    assert any("tokens/s" in line for line in lines)
    assert run(config, tmp_path / "again") == EXIT_OK
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "out")


def test_m8_loss_lies_on_the_response_alone(generation, tmp_path, base):
    """M8: the folder as a whole is a data set, whose tokens with loss are the answers in the Alpaca format."""
    from transformers import AutoTokenizer

    assert run(generation(), tmp_path / "out") == EXIT_OK
    tokenizer = AutoTokenizer.from_pretrained(base)
    found = list(local_source(tmp_path / "out").records(RecordLog()))
    assert len(found) == 24
    template = ALPACA.read_text()
    for record in found:
        ids, loss = encode_chat(tokenizer, record.messages, template)
        instruction, response = (message["content"] for message in record.messages)
        assert tokenizer.decode(ids[loss]) == f"{response}</s>"
        assert loss.tolist() == [False] * (len(ids) - loss.sum()) + [True] * loss.sum()
        assert instruction in tokenizer.decode(ids[~loss])


def _on_ranks(config: str, out: str, slow: int | None) -> int:
    """Generate; rank `slow` takes its time over every batch. How many batches this rank has done."""
    done, complete = [], LocalModel.complete

    def counted(self, *args, **options):
        done.append(1)
        if dist.get_rank() == slow:
            time.sleep(0.5)
        return complete(self, *args, **options)

    LocalModel.complete = counted
    try:
        assert run(Path(config), Path(out)) == EXIT_OK
    finally:
        LocalModel.complete = complete
    return len(done)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_ranks_writes_the_same_records(generation, tmp_path, ranks, world):
    config = generation()
    assert run(config, tmp_path / "plain") == EXIT_OK
    counts = ranks(world, _on_ranks, str(config), str(tmp_path / "out"), None, timeout=120)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "plain")
    assert sum(counts) == len(list((tmp_path / "out" / ".parts").rglob("*.json")))


def test_a_slow_rank_delays_nobody_and_hangs_nobody(generation, tmp_path, ranks):
    config = generation(batch_size=2)
    slow, fast = ranks(2, _on_ranks, str(config), str(tmp_path / "out"), 0, timeout=120)
    assert 0 < slow < fast
    assert run(config, tmp_path / "plain") == EXIT_OK
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "plain")


def test_a_skill_without_usable_records_is_named_and_the_others_are_written(generation, tmp_path):
    seeds = tmp_path / "copied.jsonl"
    generation()
    known = read_seeds(tmp_path / "echo.jsonl", skill="echo", least=5)
    seeds.write_text("".join(json.dumps({"instruction": s.instruction, "output": s.response}) + "\n" for s in known))
    config = generation(seeds={"echo": str(tmp_path / "echo.jsonl"), "copied": str(seeds)}, max_prompts=8)
    tree = yaml.safe_load(config.read_text())
    tree["generate"]["prompts"] = {"echo": str(tmp_path / "prompts.yaml"), "copied": str(tmp_path / "prompts.yaml")}
    tree["skill_filters"] = {"copied": {"response_words": [7, 9]}}
    config.write_text(yaml.safe_dump(tree))
    with pytest.raises(
        UserError, match=r"skill copied: \d+ prompts gave \d+ instructions.*none was kept \(.*response_"
    ):
        run(config, tmp_path / "out")
    assert records_of(tmp_path / "out", "echo")
    assert not (tmp_path / "out" / "copied.jsonl").exists()
    assert not (tmp_path / "out" / "report.yaml").exists()


def test_other_settings_need_another_folder(generation, tmp_path, batches):
    out = tmp_path / "out"
    assert run(generation(), out) == EXIT_OK
    with pytest.raises(UserError, match="other settings"):
        run(generation(count=6), out)
    assert len(records_of(out, "echo")) == 12
    assert run(generation(count=6), out, overwrite=True) == EXIT_OK
    assert len(records_of(out, "echo")) == 6
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    batches.clear()
    with pytest.raises(UserError, match=r"not empty \(notes.txt\)"):
        run(generation(), tmp_path / "full")
    assert not batches


def test_prompts_beyond_the_context_are_refused_before_generating(generation, tmp_path, batches):
    with pytest.raises(UserError, match=r"seeds\.echo.*5 longest seeds takes .* context is 384.*echo\.jsonl:\d+"):
        run(generation(response_tokens=300), tmp_path / "out")
    with pytest.raises(UserError, match=r"3 longest seeds.*generate\.instruction_tokens=380"):
        run(generation(instruction_tokens=380), tmp_path / "out")
    assert not batches


def test_an_instruction_too_long_to_be_answered_is_counted(generation, tmp_path, base):
    """The seeds fit, an instruction of many words does not: it is left out, and the batch stays whole."""
    from moe_dist.methods.self_moe.generation.backend import Completion
    from moe_dist.methods.self_moe.generation.filters import filters_of
    from moe_dist.methods.self_moe.generation.parts import Part
    from moe_dist.methods.self_moe.generation.prompts import read_prompts
    from moe_dist.methods.self_moe.generation.rounds import TOO_LONG, SkillRun

    config = load_config(generation(count=2))
    seeds = read_seeds(tmp_path / "echo.jsonl", skill="echo", least=5)
    backend = LocalModel(base, device=torch.device("cpu"))
    prompts = read_prompts("echo", str(tmp_path / "prompts.yaml"))
    skill = SkillRun("echo", seeds, prompts, filters_of(config.filters, seeds), config.generate, backend)
    (batch,) = skill.brainstorm()
    texts = [f" do echo {'abc ' * 80}\n5. do echo hhh\n6. do echo ggg"] * len(batch.items)
    done = [Completion(text, True, 9) for text in texts]
    skill.take_instructions([(batch, Part(done, [()] * len(done), {}))])
    (answers,) = skill.answer()
    assert skill.reasons[TOO_LONG] == 1
    assert [item.id[-2:] for item in answers.items] == ["01"]


def test_answers_are_checked_by_samples_and_by_a_program(generation, tmp_path, batches):
    """Self-consistency draws further answers to the same prompts, seeded by batch; a program has the last word."""
    (tmp_path / "mine.py").write_text("def check(instruction, response):\n    return len(response) % 2 == 1\n")
    config = generation(
        count=4, seeds={"echo": str(tmp_path / "echo.jsonl")}, prompts={"echo": str(tmp_path / "prompts.yaml")}
    )
    tree = yaml.safe_load(config.read_text())
    tree["filters"] = {"samples": 2, "agreement": 0.01, "answer": "^[a-h]", "check": str(tmp_path / "mine.py")}
    config.write_text(yaml.safe_dump(tree))
    assert run(config, tmp_path / "out") == EXIT_OK
    answered = [prompts for prompts, _ in batches if prompts[0].startswith("Answers")]
    drawn = [prompts for prompts, sampling in batches if prompts[0].startswith("Answers") and sampling.temperature]
    assert len(answered) == 3 * (len(answered) - len(drawn))
    for record in records_of(tmp_path / "out", "echo"):
        assert len(record["messages"][1]["content"]) % 2
        assert record["provenance"]["passed"][-2:] == ["self_consistent", "checked"]
    (part, *_) = sorted((tmp_path / "out" / ".parts").rglob("responses-*.json"))
    assert all(len(row["samples"]) == 2 for row in json.loads(part.read_text())["completions"])
    assert run(config, tmp_path / "again") == EXIT_OK
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "out")
