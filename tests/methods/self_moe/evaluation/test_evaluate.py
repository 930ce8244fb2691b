"""Evaluation with real models: against plain generation, on any number of ranks, with adapter, mixture and harness."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from tokenizers import processors

from moe_dist.checkpoint.fingerprint import fingerprint
from moe_dist.data.chat import encode_chat
from moe_dist.errors import PolicyStop, UserError
from moe_dist.methods.self_moe.composition.merge import merge_adapter
from moe_dist.methods.self_moe.evaluation.config import load_config
from moe_dist.methods.self_moe.evaluation.evaluate import _prompts, evaluate, open_model
from moe_dist.methods.self_moe.evaluation.harness import check_harness, run_harness
from moe_dist.methods.self_moe.evaluation.items import read_items
from moe_dist.methods.self_moe.evaluation.report import figures, render, summary
from moe_dist.models.mixse import RoutingRecorder, write_mixse_folder
from tests.cli.test_verbs import verbs
from tests.methods.self_moe.tiny_base import example
from tests.models.mixse.tiny import adapter

ALPACA = Path(__file__).parents[4] / "configs" / "self_moe" / "alpaca.jinja"
SKILLS = ("echo", "twice")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """As the ranks have: sums in another order are other sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shots(skill: str, draw: random.Random) -> str:
    pairs = [f"Q {instruction}\nA {response}" for instruction, response in (example(skill, draw) for _ in range(3))]
    return "\n\n".join(["Answers", *pairs[: draw.randint(1, 3)], f"Q {example(skill, draw)[0]}\nA"])


@torch.no_grad()
def plain_answer(model, tokenizer, prompt: str) -> str:
    """What the model says, one prompt at a time, by taking the most likely token again and again."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start, text = ids.shape[1], ""
    while ids.shape[1] - start < 12 and "\n" not in text:
        best = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        if int(best) == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, best], dim=1)
        text = tokenizer.decode(ids[0, start:])
    return text.partition("\n")[0]


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """Two sets, `right` their answers by plain generation; a set of programs; two adapters; a mixture of them."""
    folder = tmp_path_factory.mktemp("evaluate")
    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    for skill in SKILLS:
        draw, lines = random.Random(skill), []
        for number in range(11):
            prompt = shots(skill, draw)
            answer = plain_answer(model, tokenizer, prompt)
            lines.append({"id": f"{skill}{number}", "instruction": prompt, "output": answer if number % 3 else "wrong"})
        (folder / f"{skill}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    programs = [
        {"instruction": f"value{number} = {number}\n# ", "test": f"assert value{number} == {2 * (number // 2)}"}
        for number in range(5)
    ]
    (folder / "code.jsonl").write_text("\n".join(map(json.dumps, programs)))
    adapters = {skill: adapter(base, folder / skill, seed=seed) for seed, skill in enumerate(SKILLS)}
    write_mixse_folder(base, adapters, folder / "mixture", seed=3)
    tokenizer.save_pretrained(folder / "mixture")
    return folder


@pytest.fixture
def configured(base, folder, tmp_path):
    def write(*, harness: dict | None = None, **changes) -> Path:
        sets = [
            {"name": skill, "path": str(folder / f"{skill}.jsonl"), "answer": "", "max_tokens": 12, "stop": ["\n"]}
            for skill in SKILLS
        ]
        code = {"path": str(folder / "code.jsonl"), "metric": "pass_at_1", "continues": True, "stop": ["\n"]}
        sets.append({"name": "sums", "max_tokens": 4, **code})
        section = {"model": str(base), "prompt": "plain", "batch_size": 4, "sets": sets, **changes}
        path = tmp_path / "evaluate.yaml"
        path.write_text(yaml.safe_dump({"evaluate": section, "harness": harness or {}}))
        return path

    return write


def run(path: Path, **options):
    config = load_config(path)
    return evaluate(config, open_model(config.evaluate, CPU), **options)


def test_figures_are_those_of_plain_generation(configured, folder):
    config, lines = load_config(configured()), []
    found = evaluate(config, open_model(config.evaluate, CPU), say=lines.append)
    for skill in SKILLS:
        rows = found.sets[skill].rows
        assert [row["id"] for row in rows] == [f"{skill}{number}" for number in range(11)]
        assert [row["right"] for row in rows] == [bool(number % 3) for number in range(11)]
        assert figures(found.sets[skill], "exact_match")["score"] == pytest.approx(7 / 11)
    assert [row["right"] for row in found.sets["sums"].rows] == [True, False, True, False, True]
    assert found.sets["sums"].rows[1]["detail"].startswith("failed: AssertionError")
    assert [line.split(" in ")[0] for line in lines] == ["echo: 11 items", "twice: 11 items", "sums: 5 items"]
    table = render(summary(config, found))
    assert "63.6%" in table
    assert "routing" not in summary(config, found)


def _outcome(path: str):
    torch.set_num_threads(1)
    found = run(Path(path))
    return {name: (result.rows, [t.tolist() for t in result.routing.values()]) for name, result in found.sets.items()}


def test_same_figures_on_any_number_of_ranks(configured, folder, ranks):
    path = str(configured(model=str(folder / "mixture")))
    alone = _outcome(path)
    for world in (2, 4):
        for outcome in ranks(world, _outcome, path):
            for name, (rows, routing) in alone.items():
                assert outcome[name][0] == rows
                torch.testing.assert_close(torch.tensor(outcome[name][1]), torch.tensor(routing), rtol=1e-12, atol=0)


def test_routing_is_counted_over_the_items_tokens_alone(configured, folder):
    config = load_config(configured(model=str(folder / "mixture")))
    model = open_model(config.evaluate, CPU)
    found = evaluate(config, model)
    for skill in SKILLS:
        with RoutingRecorder(model.model) as recorder, torch.no_grad():
            for row in found.sets[skill].rows:
                ids = model.tokenizer(row["instruction"] + row["response"], return_tensors="pt")["input_ids"]
                model.model(input_ids=ids, use_cache=False)
        counts = torch.stack(list(recorder.counts().values()))
        ours = torch.stack(list(found.sets[skill].routing.values()))
        assert torch.equal(ours[:, :2], counts[:, :2])
        torch.testing.assert_close(ours[:, 2], counts[:, 2], rtol=1e-6, atol=0)
    tree = summary(config, found)
    assert set(tree["routing"]) == {*SKILLS, "sums"}
    assert sum(row["first"] for row in tree["routing"]["echo"].values()) == pytest.approx(1)
    assert "largest weight" in render(tree)


def test_adapter_gives_what_the_merged_model_gives(configured, base, folder, tmp_path):
    merged = merge_adapter(base, folder / "twice", tmp_path / "merged")
    with_adapter = run(configured(adapter=str(folder / "twice")))
    assert with_adapter.identity["adapter"] == fingerprint(folder / "twice")
    without = run(configured())
    as_merged = run(configured(model=str(merged)))
    said = [[row["response"] for row in found.sets["echo"].rows] for found in (with_adapter, as_merged, without)]
    assert said[0] == said[1] != said[2]


def test_adapter_for_another_model(configured, folder, tmp_path):
    from tests.methods.nexus.text import seed_folder

    other = seed_folder("llama", tmp_path / "other")
    with pytest.raises(UserError, match=r"is for a weight|is no linear layer"):
        run(configured(model=str(other), adapter=str(folder / "twice")))


def test_chat_prompts_are_those_of_training(configured, folder):
    config = load_config(configured(prompt="chat", chat_template=str(ALPACA)))
    model = open_model(config.evaluate, CPU)
    # A tokenizer that begins every text with its mark, as most do; the template writes the mark too.
    mark = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    model.tokenizer.backend_tokenizer.post_processor = mark
    assert model.tokenizer("a")["input_ids"][0] == 1
    items = [json.loads(line)["instruction"] for line in (folder / "echo.jsonl").read_text().splitlines()]
    asked = model.encode(_prompts(read_items(folder / "echo.jsonl"), config.evaluate, model))
    for instruction, ids in zip(items, asked, strict=True):
        messages = [{"role": "user", "content": instruction}, {"role": "assistant", "content": "abc"}]
        learned, loss = encode_chat(model.tokenizer, messages, ALPACA.read_text())
        assert ids == learned[: int(loss.argmax())].tolist()


def test_contamination_is_measured_and_refused_before_anything_is_generated(configured, folder, tmp_path, monkeypatch):
    seen = tmp_path / "train.jsonl"
    record = json.loads((folder / "echo.jsonl").read_text().splitlines()[0])
    chat = [{"role": "user", "content": record["instruction"]}, {"role": "assistant", "content": "x"}]
    seen.write_text(json.dumps({"id": "t", "messages": chat}) + "\n")
    lines = []
    found = run(configured(seen=[str(seen)], similarity=0.99), say=lines.append)
    assert [report.found for report in found.overlaps] == [1, 0, 0]
    assert lines[0].startswith("echo: 1 of 11 items overlap (9.1%)")
    from moe_dist.methods.self_moe.generation.local_model import LocalModel

    monkeypatch.setattr(LocalModel, "complete", lambda *_, **__: pytest.fail("nothing may be generated"))
    with pytest.raises(PolicyStop, match=r"max_contamination=0.05"):
        run(configured(seen=[str(seen)], similarity=0.99, max_contamination=0.05))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, r"evaluate\.model is not set"),
        ({"model": "./nowhere"}, r"evaluate\.model=\./nowhere: no such folder"),
        ({"sets": []}, "nothing to evaluate on"),
        ({"sets": [{"name": "a/b", "path": "x"}]}, r"sets\.0\.name=a/b"),
        ({"sets": [{"name": "a", "path": "none.jsonl"}]}, r"sets\.0\.path=none\.jsonl: no such file"),
        ({"sets": [{"name": "a", "metric": "bleu"}]}, r"metric=bleu: has to be one of exact_match, pass_at_1"),
        ({"sets": [{"nam": "a"}]}, r"unknown key evaluate\.sets\.0\.nam: did you mean evaluate\.sets\.0\.name"),
        ({"seen": ["none.jsonl"]}, r"evaluate\.seen\.0=none\.jsonl: no such file"),
        ({"prompt": "chat"}, "has no chat template"),
    ],
)
def test_bad_input(configured, changes, message):
    with pytest.raises(UserError, match=message):
        run(configured(**changes))


def test_items_too_long_for_the_model(configured, folder):
    long = {"name": "a", "path": str(folder / "echo.jsonl"), "max_tokens": 380}
    with pytest.raises(UserError, match=r"echo.jsonl:1: .*more than the model's context of 384"):
        run(configured(sets=[long]))


def test_the_verb(configured, folder, tmp_path):
    config = str(configured(model=str(folder / "mixture")))
    calls = [
        ["self-moe", "evaluate", config, "out", "--dry-run"],
        ["self-moe", "evaluate", config, "out", "evaluate.sets.sums.limit=2"],
        ["self-moe", "evaluate", config, "out"],
        ["self-moe", "evaluate", "--help"],
    ]
    codes, out, err = verbs(tmp_path, *calls)
    assert codes == [0, 0, 2, 0], err
    assert "echo: " in out.split("code 0")[0]
    assert "out already exists and is not empty" in err
    tree = json.loads((tmp_path / "out" / "results.json").read_text())
    assert tree["sets"]["sums"]["items"] == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "echo.jsonl", "results.json", "sums.jsonl", "twice.jsonl",
    ]  # fmt: skip
    assert len((tmp_path / "out" / "echo.jsonl").read_text().splitlines()) == 11


TASK = """\
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{right}}}}"
target_delimiter: " "
metric_list: [{{metric: acc}}]
"""


def test_the_shipped_recipe_names_the_papers_benchmarks_and_asks_before_it_runs_code():
    config = load_config(ALPACA.with_name("lm-eval.yaml"))
    assert config.harness.tasks == ["mmlu", "bbh", "gsm8k", "humaneval"]
    assert not config.harness.run_code


class TestHarness:
    @pytest.fixture(autouse=True)
    def installed(self):
        pytest.importorskip("lm_eval", reason="lm-evaluation-harness: pip install 'moe_dist[eval]'")

    @torch.no_grad()
    def test_a_task_of_ones_own_on_a_mixture(self, configured, folder, tmp_path):
        draw, rows = random.Random(0), []
        for _ in range(12):
            choices = ["".join(draw.choices("abcdefgh", k=3)) for _ in range(3)]
            rows.append({"question": shots("echo", draw), "choices": choices, "right": draw.randrange(3)})
        data = tmp_path / "letters.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / "tasks").mkdir()
        (tmp_path / "tasks" / "letters.yaml").write_text(TASK.format(file=data))
        harness = {"tasks": ["letters"], "include": str(tmp_path / "tasks"), "limit": 10, "batch_size": 3}
        config = load_config(configured(model=str(folder / "mixture"), sets=[], harness=harness))
        check_harness(config.harness, ranks=1)
        model = open_model(config.evaluate, CPU)
        found = run_harness(config.harness, model)["letters"]
        right = 0
        for row in rows[:10]:
            totals = []
            for choice in row["choices"]:
                ids = model.tokenizer(f"{row['question']} {choice}", return_tensors="pt")["input_ids"]
                scores = model.model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
                totals.append(float(scores[-4:].gather(1, ids[0, -4:, None]).sum()))
            right += max(range(3), key=totals.__getitem__) == row["right"]
        assert 0 < right < 10
        assert (found["acc,none"], found["items"], found["shots"]) == (right / 10, 10, 0)

    def test_refusals(self, configured, folder, monkeypatch):
        config = load_config(configured(sets=[], harness={"tasks": ["humaneval"]})).harness
        with pytest.raises(UserError, match=r"harness\.run_code=true"):
            check_harness(config, ranks=1)
        config.tasks = ["mmlu"]
        with pytest.raises(UserError, match="one plain process"):
            check_harness(config, ranks=2)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"pip install 'moe_dist\[eval\]'"):
            check_harness(config, ranks=1)

    def test_unknown_task_and_no_network(self, configured, folder, tmp_path, monkeypatch):
        config = load_config(configured(sets=[], harness={"tasks": ["gsm8"]}))
        model = open_model(config.evaluate, CPU)
        with pytest.raises(UserError, match="knows no gsm8"):
            run_harness(config.harness, model)
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        config.harness.tasks = ["gsm8k"]
        with pytest.raises(UserError, match="cannot be had"):
            run_harness(config.harness, model)
