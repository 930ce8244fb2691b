"""The benchmark of Self-MoE's quality in its short form: it learns nothing, but goes all the way."""

import contextlib
import io
import json

import pytest
import torch

from benchmarks import self_moe_quality
from benchmarks._self_moe_arms import ARMS, MADE, MERGED, ROUTED
from benchmarks._self_moe_tables import Results, claims

pytest.importorskip("peft")
SMOKE = self_moe_quality.SMOKE


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
        assert self_moe_quality.main(arguments) == 0
    torch.set_num_threads(threads)
    return printed.getvalue()


def trainings(folder):
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("seed*.json")}


def test_every_arm_is_there_on_every_seed_and_shown(finished):
    folder, rows, printed = finished
    identity, done = json.loads((folder / "identity.json").read_text()), trainings(folder)
    skills = len(identity["skills"])
    searches = len(SMOKE.rates) * (skills + 3)  # on the first seed alone
    assert len(done) == searches + 3 * (1 + skills + len(ARMS))
    for name in ARMS.values():
        assert printed.count(f"| {name} | 3 |") == 1
    for name in ROUTED.values():
        assert f"### {name}\n" in printed
    assert len(rows) == 2 * (skills + len(ARMS))
    for row in rows:
        assert row["difference"] == pytest.approx(row["ours"] - row["peer"], abs=2e-4)
        assert row["difference"] == pytest.approx(sum(row["by_seed"].values()) / 3, abs=2e-5)


def test_arms_train_what_they_are_called_after_for_as_many_steps(finished):
    folder, _, _ = finished
    identity, done = json.loads((folder / "identity.json").read_text()), trainings(folder)
    skills = len(identity["skills"])
    whole = skills * SMOKE.expert_steps + SMOKE.router_steps
    router = skills * SMOKE.hidden
    expert = done[f"seed0-expert-{identity['skills'][0]}"]["parameters"]
    for arm in ROUTED:
        assert (done[f"seed0-{arm}"]["parameters"], done[f"seed0-{arm}"]["steps"]) == (router, SMOKE.router_steps)
    for arm in MADE:
        assert done[f"seed0-{arm}"]["parameters"] == 0
    assert (done["seed0-instance"]["parameters"], done["seed0-instance"]["steps"]) == (expert, whole)
    assert (done["seed0-joint"]["parameters"], done["seed0-joint"]["steps"]) == (router + skills * expert, whole)
    for arm, (densities, weights) in MERGED.items():
        assert done[f"seed1-{arm}"]["density"] in densities
        assert done[f"seed1-{arm}"]["weight"] in weights
        assert done[f"seed1-{arm}"]["chosen"] <= done[f"seed1-{arm}"]["published"]
    share = done["seed0-top1"]["share"]
    assert list(share) == [*identity["skills"], *identity["unseen"]]
    for by_expert in share.values():
        assert sum(by_expert.values()) == pytest.approx(1)


def test_the_same_command_does_only_what_is_missing_and_gets_the_same(finished):
    folder, _, printed = finished
    lost = folder / "seed1-top2.json"
    before = json.loads(lost.read_text())
    lost.unlink()
    times = {path: path.stat().st_mtime_ns for path in folder.glob("seed*.json")}
    again = run(["--smoke", "--work", str(folder.parent), "--json", str(folder.parent / "again.json")])
    assert json.loads(lost.read_text())["loss"] == before["loss"]
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert again.splitlines()[1:] == printed.splitlines()[1:]  # the first line has the command


def test_claims_by_hand():
    """Two skills, one unseen domain, three seeds: what is below what."""
    losses = {"base": (2.0, 2.0, 1.0), "expert-a": (1.0, 3.0, 1.2), "expert-b": (3.0, 1.2, 1.2)}
    losses |= dict.fromkeys(ARMS, (1.5, 1.5, 1.1)) | {"top1": (1.1, 1.3, 0.9), "instance": (1.1, 1.2, 0.8)}
    jobs = {
        job: {"loss": dict(zip(("a", "b", "u"), values, strict=True)), "share": {}} for job, values in losses.items()
    }
    jobs["top1"]["share"] = {"a": {"a": 0.9, "b": 0.1}, "b": {"a": 0.6, "b": 0.4}}
    said = claims(Results(SMOKE, ["a", "b"], ["u"], dict.fromkeys(range(3), jobs)))
    assert "MiXSE is better than the best single specialist, mean of skills: holds (3 of 3 seeds, -0.800" in said
    assert "instance merging (one LoRA, all skills), mean of skills: **does not hold** (0 of 3 seeds, 0.050" in said
    assert "the specialist for a is worse than the base on the other skills: holds (3 of 3 seeds, -1.000" in said
    assert "MiXSE is better than the base on unseen domains: holds (3 of 3 seeds, -0.100" in said
    assert "MiXSE is better than instance merging on unseen domains: **does not hold**" in said
    assert "for most of its tokens: in 0 of 3 seeds" in said
    assert not claims(Results(SMOKE, ["a", "b"], ["u"], dict.fromkeys(range(2), jobs)))
