"""The benchmark of ESFT's quality in its short form: it learns nothing, but goes all the way."""

import contextlib
import io
import json
from dataclasses import replace

import pytest
import torch

from benchmarks import _quality_figures as figures
from benchmarks import _quality_tables as tables
from benchmarks import esft_quality
from benchmarks._quality_runs import ARMS, Experiment, lora_model
from benchmarks._quality_text import load_domains, spaced
from benchmarks._quality_training import as_batch, forward, spread
from moe_dist.config.strict_json import write_json
from moe_dist.models import load_model

ARMS_HERE = esft_quality.arms()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder of trainings, rows, what was printed) of a whole short run."""
    work = tmp_path_factory.mktemp("quality")
    printed = run(["--smoke", "--work", str(work), "--json", str(work / "rows.json")])
    (identity,) = work.glob("*/identity.json")
    return identity.parent, json.loads((work / "rows.json").read_text()), printed


@pytest.fixture(scope="module")
def experiment(finished):
    folder = finished[0]
    task, domains = load_domains(folder.parent, megabytes=esft_quality.SMOKE.megabytes)
    return Experiment(esft_quality.SMOKE, task, domains, folder)


def run(arguments: list[str]) -> str:
    threads, printed = torch.get_num_threads(), io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert esft_quality.main(arguments) == 0
    torch.set_num_threads(threads)
    return printed.getvalue()


def test_every_arm_is_trained_on_every_seed_and_shown(finished):
    folder, rows, printed = finished
    for arm in ARMS_HERE:
        found = figures.collect(folder, esft_quality.SMOKE, ARMS_HERE).arms[arm]
        assert sorted(found) == [0, 1, 2], arm
        assert f"| {ARMS[arm]} | 3 |" in printed
    assert len(list(folder.glob("seed*.json"))) == 3 * (1 + len(ARMS_HERE)) + len(ARMS_HERE)  # one more of the search
    for row in rows:
        assert {"case", "unit", "ours", "peer", "peer_name", "ratio", "made_by"} <= set(row)
        assert row["ratio"] == pytest.approx(row["peer"] / row["ours"], rel=1e-3)
    losses = [row for row in rows if row["unit"] == "nats/byte"]
    assert {row["peer_name"] for row in losses} == {ARMS[a] for a in ARMS_HERE if not a.startswith("token")}
    for row in losses:
        assert row["difference"] == pytest.approx(row["ours"] - row["peer"], abs=2e-4)
        assert row["difference"] == pytest.approx(sum(row["by_seed"].values()) / len(row["by_seed"]), abs=2e-5)


def test_the_same_command_does_only_what_is_missing_and_gets_the_same(finished):
    folder, _, printed = finished
    lost = next(folder.glob("seed1-full-*.json"))
    before = json.loads(lost.read_text())
    lost.unlink()
    times = {path: path.stat().st_mtime_ns for path in folder.glob("seed*.json")}
    again = run(["--smoke", "--work", str(folder.parent), "--json", str(folder.parent / "again.json")])
    after = json.loads(lost.read_text())
    assert after["trace"] == before["trace"]
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert again.splitlines()[1:] == printed.splitlines()[1:]  # the first line has the command


def test_without_time_one_training_is_done_and_the_rest_is_told(finished, tmp_path, monkeypatch):
    """And nothing of another experiment is taken for one of its own."""
    monkeypatch.setattr(esft_quality, "Settings", lambda: replace(esft_quality.SMOKE, base_steps=3))
    printed = run(["--work", str(finished[0].parent), "--minutes", "0", "--json", str(tmp_path / "rows.json")])
    (other,) = (path.parent for path in finished[0].parent.glob("*/identity.json") if path.parent != finished[0])
    assert [path.name for path in other.glob("seed*.json")] == ["seed0-base-0.003.json"]
    assert f"{len(ARMS_HERE) * 2 + 2} trainings or more are left" in printed
    assert "## Claims" not in printed
    assert all(row["unit"] == "experts" for row in json.loads((tmp_path / "rows.json").read_text()))


def test_arms_train_what_they_are_called_after(experiment, finished):
    s = esft_quality.SMOKE
    one_expert = 3 * s.hidden * s.width
    run_of = {arm: runs[0] for arm, runs in figures.collect(finished[0], s, ARMS_HERE).arms.items()}
    chosen = {arm: experiment.trainable(0, arm) for arm in ("token_0.2", "token_0.4", "random", "least_used")}
    for arm, section in chosen.items():
        assert not section.shared_experts
        assert not section.non_expert_modules
        assert run_of[arm]["parameters"] == one_expert * sum(map(len, section.experts.values()))
    small, large, random, least = (section.experts for section in chosen.values())
    for layer, ids in small.items():
        assert ids == large[layer][: len(ids)]
        assert len(random[layer]) == len(least[layer]) == len(ids)
        assert not set(ids) & set(random[layer])
    assert run_of["shared"]["parameters"] == s.layers * one_expert
    whole = load_model(experiment.base_folder(0))
    assert run_of["full"]["parameters"] == sum(parameter.numel() for parameter in whole.parameters())


def test_lora_begins_at_the_base_and_is_on_every_matrix_but_embeddings_and_head(experiment):
    pytest.importorskip("peft")
    base, lora = load_model(experiment.base_folder(0)), lora_model(experiment.base_folder(0), rank=8).eval()
    batch = as_batch(experiment.held_out["search"])
    with torch.no_grad():
        torch.testing.assert_close(forward(lora, batch), forward(base, batch), rtol=1e-5, atol=1e-6)
    adapted = {}
    for name, module in lora.named_modules():
        if hasattr(module, "parameter_name"):
            clean = name.removeprefix("base_model.model.").replace(".base_layer", "")
            adapted[f"{clean}.{module.parameter_name}"] = module
    stock = lora.get_base_model()
    matrices = {
        name.replace(".base_layer", "")
        for name, parameter in stock.named_parameters()
        if parameter.dim() >= 2 and "lora_" not in name
    }
    assert set(adapted) == matrices - {"model.embed_tokens.weight", "lm_head.weight"}
    for name, module in adapted.items():
        assert module.scaling["default"] == 2
        assert module.r["default"] == (16 if name.endswith("gate_up_proj") else 8)  # two matrices in one tensor
    assert trained(lora_model(experiment.base_folder(0), rank=2)) * 4 == trained(lora)
    assert all("lora_" in name for name, parameter in lora.named_parameters() if parameter.requires_grad)


def trained(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_text_of_the_task_is_not_in_the_base_and_held_out_text_in_no_training(experiment):
    assert experiment.task not in experiment.general
    for domain in experiment.domains.values():
        trained = bytes(domain.train.tolist())
        documents = [part for part in bytes(domain.held_out.tolist()).split(b"\0") if len(part) > 500]
        assert documents
        assert sum(document in trained for document in documents) <= 0.02 * len(documents)  # copies under other names
    windows_BL = experiment.held_out[experiment.task]
    assert not (windows_BL[:, None] == experiment.held_out["search"][None]).all(-1).any()


def test_windows_are_spread_over_the_stream():
    stream_N = torch.arange(101, dtype=torch.uint8)
    assert spaced(stream_N, 5, 11).tolist() == [list(range(start, start + 11)) for start in (0, 22, 45, 67, 90)]


def test_general_loss_at_a_task_loss_lies_on_straight_lines():
    curve = [(3.0, 1.0), (2.0, 1.4), (1.0, 2.0), (1.5, 3.0)]
    assert figures.general_at(curve, 2.5) == pytest.approx(1.2)
    assert figures.general_at(curve, 1.0) == pytest.approx(2.0)
    assert figures.general_at(curve, 0.9) is None


def test_figures_by_hand(tmp_path):
    """Two seeds, two arms, losses of which mean, spread and paired differences are known."""
    settings = replace(esft_quality.SMOKE, measured_at=(1,), rates=(0.1, 0.2), seeds=(0, 1))
    write_json(tmp_path / "identity.json", {"task": "t"})
    for seed in (0, 1):
        base = {"losses": {"search": 9.0, "t": 4.0, "a": 1.0, "b": 2.0}}
        base |= {"experts_to_cover": dict.fromkeys(("0.2", "0.4", "0.6"), 1)}
        base |= dict.fromkeys(("overlap_same", "overlap_cross", "overlap_task"), 1)
        write_json(figures.job_file(tmp_path, seed, "base", settings.base_rate), base)
        for arm, task, general in (("token_0.2", 3.0 + seed, 1.6), ("full", 2.0, 2.0 + seed)):
            for rate in settings.rates:
                losses = {"search": rate, "t": task, "a": general - 1, "b": general + 1}
                write_json(
                    figures.job_file(tmp_path, seed, arm, rate), {"rate": rate, "trace": {"1": losses}, "parameters": 8}
                )
    found = figures.collect(tmp_path, settings, ["token_0.2", "full"])
    assert {run["rate"] for runs in found.arms.values() for run in runs.values()} == {0.1}  # the lowest "search"
    assert figures.paired(found, "token_0.2", "full", "task") == pytest.approx([1.0, 2.0])
    assert figures.paired(found, "token_0.2", "full", "general") == pytest.approx([-0.4, -1.4])
    # To a task loss of 3 ESFT comes with 1.6; the other was halfway from 1.5 to 2.0. Seed 1 gains nothing.
    assert figures.paired(found, "token_0.2", "full", "equal") == pytest.approx([1.6 - 1.75])
    shown = tables.render(found)
    assert f"| {ARMS['full']} | **2.000 / 2.000** | 2.000 / 2.000 | 1.750 |" in shown
    assert f"| {ARMS['token_0.2']} | **3.000 / 1.600** | 3.000 / 1.600 | 1.600 |" in shown
    assert "Claims" not in shown  # two seeds say nothing
    assert spread([1.0, 2.0]) == pytest.approx((1.5, 0.5**0.5))
    figures.job_file(tmp_path, 0, "full", 0.2).unlink()
    assert figures.best_rate(tmp_path, settings, "full") is None
