"""`moe-dist self-moe generate` as a user calls it, and what it says to mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_dist.cli.main import main
from moe_dist.errors import EXIT_OK, EXIT_USER
from moe_dist.methods.self_moe.generation.config import load_config

SHIPPED = Path(__file__).parents[4] / "configs" / "self_moe" / "generate.yaml"


def test_the_verb_generates_and_says_how_far_it_is(generation, tmp_path, capsys):
    config = generation(count=4)
    assert main(["self-moe", "generate", str(config), str(tmp_path / "out"), "generate.seed=3"]) == EXIT_OK
    said = capsys.readouterr().out
    assert "tokens/s" in said
    assert f"wrote {tmp_path / 'out' / 'echo.jsonl'}" in said
    records = [json.loads(line) for line in (tmp_path / "out" / "echo.jsonl").read_text().splitlines()]
    assert len(records) == 4
    assert {record["provenance"]["seed"] for record in records} == {3}


def test_the_shipped_configuration_is_the_papers_and_needs_nothing_for_a_dry_run(capsys, monkeypatch, tmp_path):
    section = load_config(SHIPPED).generate
    assert (section.temperature, section.top_p, section.count) == (1.0, 0.98, 5000)
    assert load_config(SHIPPED).filters_for("math").samples == 4
    assert load_config(SHIPPED).filters_for("reasoning").samples == 0
    monkeypatch.chdir(tmp_path)
    assert main(["self-moe", "generate", str(SHIPPED), "out", "--dry-run"]) == EXIT_OK
    said = capsys.readouterr().out
    assert "google/gemma-7b in bfloat16 writes 5,000 records for each of 4 skill(s) into out" in said
    assert "math: seeds/math.jsonl, not there yet; prompts: math" in said
    assert not list(tmp_path.iterdir())


def test_a_dry_run_reads_the_seeds_that_are_there(generation, tmp_path, capsys):
    config = generation()
    assert main(["self-moe", "generate", str(config), str(tmp_path / "out"), "--dry-run"]) == EXIT_OK
    assert "echo.jsonl, 20 seeds" in capsys.readouterr().out
    (tmp_path / "twice.jsonl").write_text('{"instruction": "x"}\n')
    assert main(["self-moe", "generate", str(config), str(tmp_path / "out"), "--dry-run"]) == EXIT_USER
    assert "twice.jsonl:1: no field 'output'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("generate.model=null", "generate.model is not set"),
        ("generate.model=./none", "generate.model=./none: no such folder"),
        ("generate.seeds={}", "generate.seeds is empty"),
        ("generate.seeds.a/b=x.jsonl", "generate.seeds.a/b: a skill names files"),
        ("generate.seeds.echo=none.jsonl", "none.jsonl: cannot be opened"),
        ("generate.prompts.math=math", "generate.prompts.math: no such skill; generate.seeds has echo, twice"),
        ("generate.prompts.echo=none.yaml", "generate.prompts.echo=none.yaml: no such file"),
        ("generate.counts=3", "unknown key generate.counts: did you mean generate.count?"),
        ("generate.count=0", "generate.count=0: has to be at least 1"),
        ("generate.temperature=0", "generate.temperature=0.0: has to be above 0"),
        ("generate.top_p=1.5", "generate.top_p=1.5: has to be at most 1"),
        ("generate.backend=cloud", "generate.backend=cloud: has to be one of local, server"),
        ("generate.backend=server", "server.url is not set"),
        ("skill_filters.math.samples=1", "skill_filters.math: no such skill"),
        ("skill_filters.echo.sample=1", "unknown key sample: did you mean samples?"),
        ("skill_filters.echo.samples=many", "skill_filters.echo: "),
        ("skill_filters.echo.response_words=[9, 1]", "skill_filters.echo.response_words=[9, 1]"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(generation, tmp_path, capsys, override, message):
    config = generation()
    assert main(["self-moe", "generate", str(config), str(tmp_path / "out"), override]) == EXIT_USER
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_help_teaches(capsys):
    assert main(["self-moe", "generate", "--help"]) == EXIT_OK
    said = capsys.readouterr().out
    for word in ('{"instruction": "...", "input": "...", "output": "..."}', "five seed pairs", "torchrun"):
        assert word in said
