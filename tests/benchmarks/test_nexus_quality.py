"""The benchmark of Nexus' quality in its short form: it learns nothing, but goes all the way."""

import contextlib
import io
import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from benchmarks import nexus_quality
from benchmarks._nexus_arms import ARMS, EXTENSIONS
from benchmarks._nexus_models import byte_tokenizer
from benchmarks._nexus_results import Results
from benchmarks._nexus_routers import KINDS
from benchmarks._nexus_search import score
from moe_dist.models.nexus.configuration_nexus import NexusLlamaConfig
from moe_dist.models.nexus.router_nexus import PaperRouter

SMOKE = replace(nexus_quality.SMOKE, seeds=(0, 1, 2))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder of trainings, rows, what was printed) of a whole short run."""
    work = tmp_path_factory.mktemp("quality")
    printed = run(["--smoke", "--work", str(work), "--json", str(work / "rows.json")])
    (identity,) = work.glob("*/identity.json")
    return identity.parent, json.loads((work / "rows.json").read_text()), printed


def run(arguments: list[str]) -> str:
    threads, printed = torch.get_num_threads(), io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert nexus_quality.main(arguments) == 0
    torch.set_num_threads(threads)
    return printed.getvalue()


def trainings(folder):
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("seed*.json")}


def test_every_arm_is_trained_on_every_seed_and_shown(finished):
    folder, rows, printed = finished
    identity = json.loads((folder / "identity.json").read_text())
    done = trainings(folder)
    new, rates = len(identity["new"]), len(SMOKE.rates)
    searches = rates * (1 + new)  # on the first seed alone
    assert len(done) == searches + 3 * (1 + len(identity["domains"]) + len(ARMS) + new * len(EXTENSIONS))
    upcycled, extended = printed.split("## Extension")
    dense, upcycled = upcycled.split("## Upcycling")
    for domain in identity["domains"]:
        assert dense.count(f"| {domain} | 3 |") == 1
    own = upcycled[upcycled.index("### Share of") :]
    assert [name for name in ARMS.values() if f"| {name} | " in own] == list(ARMS.values())[3:]  # those with experts
    for name in ARMS.values():
        assert upcycled.count(f"| {name} | 3 |") == 1
    for name in EXTENSIONS.values():
        assert extended.count(f"| {name} | 3 |") == 4
    points = 3 * new * len(SMOKE.budgets)
    assert printed.count(" of 3 seeds, ") == len(ARMS) + 1
    assert printed.count(f" of {points} seeds, domains and budgets, ") == 2 * len(EXTENSIONS)
    paired = extended[extended.index("## Paired") : extended.index("## Claims")]
    for name in EXTENSIONS.values():
        assert paired.count(f"| {name} | ") == (0 if name == EXTENSIONS["prototype"] else 2)
    assert len(rows) == len(ARMS) - 1 + 2 * len(SMOKE.budgets) * (len(EXTENSIONS) - 1)
    for row in rows:
        assert row["difference"] == pytest.approx(row["ours"] - row["peer"], abs=2e-4)
        assert row["difference"] == pytest.approx(sum(row["by_seed"].values()) / 3, abs=2e-5)


def test_arms_see_as_many_tokens_and_are_what_they_are_called_after(finished):
    folder, _, _ = finished
    identity, done = json.loads((folder / "identity.json").read_text()), trainings(folder)
    steps = {arm: done[f"seed0-mix-{arm}"]["steps"] for arm in ARMS}
    branched = len(identity["old"]) * SMOKE.expert_steps
    assert steps.pop("dense_all") == SMOKE.mix_steps + branched
    assert set(steps.values()) == {SMOKE.mix_steps}
    sizes = {arm: done[f"seed0-mix-{arm}"]["parameters"] for arm in ARMS}
    assert sizes["dense"] == sizes["dense_all"] == sizes["merging"]
    assert sizes["linear"] == sizes["cosine"]
    assert sizes["prototype"] == sizes["no_projection"] == sizes["residual"] == sizes["paper"] + SMOKE.layers  # τ
    assert abs(sizes["mlp"] - sizes["paper"]) <= SMOKE.layers * (2 * SMOKE.hidden + len(identity["old"]))
    shared = SMOKE.layers * 3 * SMOKE.hidden * SMOKE.width
    expert_rows = SMOKE.layers * SMOKE.hidden  # BTX has the seed among the routed ones, where linear has it shared
    assert sizes["btx"] == sizes["linear"] + expert_rows
    assert sizes["linear"] > sizes["dense"] + (len(identity["old"]) - 1) * shared
    for arm in ARMS:
        trace = done[f"seed0-mix-{arm}"]["trace"]
        assert list(trace) == ["0", str(steps.get(arm, SMOKE.mix_steps + branched))]
        for domain, shares in trace["0"]["share"].items():
            assert sum(shares.values()) == pytest.approx(2 if arm == "btx" else 1), (arm, domain)
        assert bool(trace["0"]["share"]) == (arm not in ("dense", "dense_all", "merging"))


def test_all_arms_have_the_rate_that_was_found(finished):
    folder, _, printed = finished
    identity, done = json.loads((folder / "identity.json").read_text()), trainings(folder)
    new = identity["new"]
    first = {name.removeprefix("seed0-"): run for name, run in done.items() if name.startswith("seed0-")}
    for stage in ("mix", "extend"):
        scores = {rate: score(first, stage, rate, old=identity["old"], new=new) for rate in SMOKE.rates}
        assert len(set(scores.values())) == len(scores)
        best = min(scores, key=scores.get)
        assert {run["rate"] for name, run in done.items() if name[6:].startswith(f"{stage}-")} == {best}
        assert f"**{scores[best]:.4f}**" in printed
    # The same training as one of the arms, measured on other windows.
    best = first["extend-fr-append"]["rate"]
    seen, other = (first[name]["trace"]["0"]["loss"] for name in ("extend-fr-append", f"search-extend-fr-{best}"))
    assert all(seen[domain] != other[domain] for domain in seen)


def test_extensions_differ_by_their_rows_alone(finished):
    """Before any step: one set of weights, so losses of arms with one trained mixture differ by who is chosen."""
    folder, _, _ = finished
    done = trainings(folder)
    (new,) = json.loads((folder / "identity.json").read_text())["new"]
    start = {arm: done[f"seed0-extend-{new}-{arm}"]["trace"]["0"] for arm in EXTENSIONS}
    for arm, point in start.items():
        assert new in point["share"][new], arm
        assert set(point["loss"]) == {*json.loads((folder / "identity.json").read_text())["old"], new}
    assert start["reset"]["share"] != start["append"]["share"]
    assert start["append"]["share"] != start["centroid"]["share"]
    assert len({point["loss"][new] for point in start.values()}) >= len(start) - 1


def test_the_same_command_does_only_what_is_missing_and_gets_the_same(finished):
    folder, _, printed = finished
    lost = [next(folder.glob(f"seed1-{name}.json")) for name in ("mix-residual", "extend-*-prototype")]
    before = [json.loads(path.read_text())["trace"] for path in lost]
    for path in lost:
        path.unlink()
    times = {path: path.stat().st_mtime_ns for path in folder.glob("seed*.json")}
    again = run(["--smoke", "--work", str(folder.parent), "--json", str(folder.parent / "again.json")])
    assert [json.loads(path.read_text())["trace"] for path in lost] == before
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert again[again.index("Domains:") :] == printed[printed.index("Domains:") :]  # above is the command


def test_without_time_one_training_is_done_and_the_rest_is_told(finished, monkeypatch):
    """And nothing of another experiment is taken for one of its own."""
    monkeypatch.setattr(nexus_quality, "Settings", lambda: replace(SMOKE, seed_steps=2))
    printed = run(["--work", str(finished[0].parent), "--minutes", "0"])
    (other,) = (path.parent for path in finished[0].parent.glob("*/identity.json") if path.parent != finished[0])
    assert [path.name for path in other.glob("seed*.json")] == ["seed0-seed.json"]
    assert "trainings are left" in printed
    assert "No expert is finished yet" in printed


@pytest.mark.parametrize("kind", KINDS)
def test_routers_of_the_benchmark_are_their_formulas(kind):
    torch.manual_seed(0)
    config = NexusLlamaConfig(hidden_size=12, num_attention_heads=2, num_experts=5, router="linear")
    router = KINDS[kind](config)
    with torch.no_grad():
        for tensor in [*router.parameters(), *router.buffers()]:
            if tensor.numel() > 1:
                tensor.normal_()
        x_TH = torch.randn(7, 12)
        logits_TE, weights_TK, ids_TK = router(x_TH)
        if kind == "mlp":
            gate_TK, up_TK = (x_TH @ router.v1.T).chunk(2, dim=1)
            expected_TE = (F.silu(gate_TK) * up_TK) @ router.v2.T
        elif kind == "cosine":
            length = router.weight.norm(dim=1).mean()
            expected_TE = length * F.cosine_similarity(x_TH[:, None], router.weight[None], dim=2)
        else:
            projected = [PaperRouter.row(router, d_M, router.w1, router.w2) for d_M in router.domain_embeddings]
            rows_EH = router.domain_embeddings + torch.stack(projected)
            expected_TE = 8 * F.cosine_similarity((x_TH - router.input_mean)[:, None], rows_EH[None], dim=2)
    torch.testing.assert_close(logits_TE, expected_TE)
    torch.testing.assert_close(weights_TK[:, 0], expected_TE.softmax(1).max(1).values)
    assert ids_TK[:, 0].tolist() == expected_TE.argmax(1).tolist()


def test_a_token_is_a_byte():
    text = "ä\0 b\n\n  中 def f(x):\t'"
    assert byte_tokenizer()(text)["input_ids"] == list(text.encode())


def test_a_rate_is_judged_by_means_over_domains():
    def run(*points):
        return {"trace": {str(step): {"loss": dict(zip("abx", point, strict=True))} for step, point in points}}

    jobs = {"search-mix-0.1": run((0, (9, 9, 9)), (10, (1, 2, 9))), "search-extend-x-0.1": run((0, (1, 3, 5)))}
    assert score(jobs, "mix", 0.1, old=["a", "b"], new=["x"]) == 1.5
    assert score(jobs, "extend", 0.1, old=["a", "b"], new=["x"]) == 3.5
    assert score(jobs, "extend", 0.1, old=["a", "b"], new=["x", "y"]) is None


def test_figures_by_hand():
    """Two old domains, two new ones, one seed: means of numbers that are known."""

    def point(loss, share):
        return {"loss": {"a": loss, "b": loss + 1, "x": 5.0, "y": 6.0}, "share": share}

    mixture = {"trace": {"0": point(3.0, {}), "12": point(1.0, {"a": {"a": 0.5, "b": 0.5}, "b": {"a": 0.1, "b": 0.9}})}}
    jobs = {"mix-paper": mixture}
    for new, share in (("x", 0.2), ("y", 0.4)):
        each = {"a": {new: 0.1}, "b": {new: 0.3}, new: {new: share}}
        jobs[f"extend-{new}-paper"] = {"trace": {"0": point(2.0, each)}}
    results = Results(SMOKE, ["a", "b"], ["x", "y"], {0: jobs})
    assert results.mixed("paper") == {0: {"before": 3.5, "loss": 1.5, "own": pytest.approx(0.7)}}
    found = results.extended("paper", 0)[0]
    assert found == pytest.approx({"new": 5.5, "old": 2.5, "own": 0.3, "taken": 0.2})
    assert results.extended("reset", 0) == {}
