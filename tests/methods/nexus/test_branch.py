"""`moe-dist nexus branch`: the experts of one launch are those of as many separate runs, however the ranks are cut, and
whatever happens on the way."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from moe_dist.cli.main import main
from moe_dist.errors import EXIT_OK, EXIT_PREEMPTED, EXIT_TRANSIENT, EXIT_USER, UserError
from moe_dist.methods.nexus.branch import branch
from moe_dist.methods.nexus.branch_config import load_branching
from moe_dist.train import loop, worlds
from moe_dist.train.finished import export_run
from tests.methods.nexus.text import seed_folder, write_text
from tests.models.compare import file_tensors
from tests.pool import PRELOAD, RankPool, free_port
from tests.run.processes import trained_steps

DOMAINS = ("code", "prose", "sums")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A configuration of three domains, and in `alone` their experts by `train` and `export`, one run each."""
    folder = tmp_path_factory.mktemp("branch")
    files = write_text(folder)
    tree = {
        "model": {"path": str(seed_folder("llama", folder / "seed"))},
        "data": {
            "train": {name: {"path": files[name]} for name in DOMAINS},
            "eval": {name: {"path": files[name]} for name in ("code", "prose")},
            "seq_len": 24,
            "cache_dir": str(folder / "cache"),
        },
        "train": {"steps": 6, "global_batch_size": 4, "lr": 0.01, "eps": 1e-6, "precision": "fp32", "log_every": 1},
        "checkpoint": {"every": 2},
    }
    (folder / "train.yaml").write_text(yaml.safe_dump(tree))
    tree["branch"] = {"overrides": {"sums": ["train.steps=4"]}}
    (folder / "branch.yaml").write_text(yaml.safe_dump(tree))
    return folder


@pytest.fixture(scope="module")
def alone(folder, ranks):
    """{domain: tensors} of separate runs."""
    return ranks(1, separately, folder, timeout=120)[0]


@pytest.fixture(scope="module")
def pools():
    """Ranks of our own: the world that they form is cut up and formed anew."""
    found = {world: RankPool(world) for world in (2, 4)}
    yield found
    for pool in found.values():
        pool.close()


def separately(folder):
    from moe_dist.config.load import load

    for name in DOMAINS:
        steps = 4 if name == "sums" else 6
        source = f"data.train={{{name}: {{path: {folder}/{name}.jsonl}}}}"
        out = folder / "alone" / name
        words = [source, f"run.name={name}", f"run.dir={out}-run", f"train.steps={steps}"]
        assert loop.train(load(folder / "train.yaml", words)) == EXIT_OK
        export_run(f"{out}-run", out)
    return experts(folder / "alone")


def together(folder, out, *words):
    """On each rank: the exit code, and what the ranks are to one another afterwards."""
    code = branch(load_branching(folder / "branch.yaml", [f"run.dir={out}", *words]))
    import torch
    import torch.distributed as dist

    total = torch.ones(())
    if os.environ["WORLD_SIZE"] != "1":
        dist.all_reduce(total)
    return code, int(os.environ["RANK"]), total.item()


def experts(out: Path) -> dict:
    return {name: file_tensors(out / name) for name in DOMAINS}


def assert_same(ours: dict, theirs: dict, *, within: float = 0.0):
    for name in DOMAINS:
        assert ours[name].keys() == theirs[name].keys()
        for key, tensor in theirs[name].items():
            assert (ours[name][key] - tensor).norm() <= within * tensor.norm(), (name, key)


def test_one_process_trains_what_separate_runs_do(folder, alone, ranks):
    assert ranks(1, together, folder, folder / "one", timeout=120)[0][0] == EXIT_OK
    assert_same(experts(folder / "one"), alone)
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "one").rglob("*.*")}
    assert ranks(1, together, folder, folder / "one", timeout=120)[0][0] == EXIT_OK
    same = {path: path.stat().st_mtime_ns for path in (folder / "one").rglob("*.*")}
    assert same.pop(folder / "one" / "branch.json")
    assert stamps.keys() - same.keys() == {folder / "one" / "branch.json"}
    assert all(stamps[path] == at for path, at in same.items())


def test_two_groups_of_one_rank(folder, alone, pools):
    """Three experts, dealt out to two groups; the losses of all of them and of the seed."""
    from moe_dist.config.strict_json import read_json

    out = folder / "two"
    assert pools[2].run(together, folder, out, timeout=120) == [(EXIT_OK, 0, 2.0), (EXIT_OK, 1, 2.0)]
    assert_same(experts(out), alone)
    losses = read_json(out / "branch.json")
    assert set(losses) == {"seed", *DOMAINS}
    for domain in ("code", "prose"):
        assert losses[domain][domain]["loss"] < min(losses[name][domain]["loss"] for name in losses if name != domain)


@pytest.mark.parametrize("stage", [1, 3])
def test_groups_of_two_ranks(folder, alone, pools, stage):
    words = ["branch.groups=2", f"parallel.zero_stage={stage}"]
    out = folder / f"four-{stage}"
    found = pools[4].run(together, folder, out, *words, timeout=120)
    assert found == [(EXIT_OK, rank, 4.0) for rank in range(4)]
    assert_same(experts(out), alone, within=1e-5)


# Ranks that nothing watches over, as they are without a launcher.


def _rank(rank: int, world: int, port: int, words: list[str], fault: str, log: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    sys.stdout = sys.stderr = open(log, "w")  # noqa: SIM115 - the process ends
    worlds.LOOK, worlds.SILENCE, worlds.GRACE = 0.2, 3.0, 10.0
    if fault == "dies" and rank == 1:
        save, saved = loop.state.save, []

        def save_and_die(*args, **options):
            save(*args, **options)
            saved.append(1)
            if len(saved) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        loop.state.save = save_and_die
    sys.exit(main(["nexus", "branch", *words]))


def started(folder, *words, fault="", world=2):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    logs, port = [folder / f"log-{rank}" for rank in range(world)], free_port()
    words = [str(folder / "branch.yaml"), *words]
    processes = [
        context.Process(target=_rank, args=(rank, world, port, words, fault, str(logs[rank])), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes, logs


def ended(processes, *, seconds):
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def wait_for(run, step, *, seconds=120):
    deadline = time.monotonic() + seconds
    while not any(number >= step for number in trained_steps(run)):
        assert time.monotonic() < deadline, f"no step {step} in {run}"
        time.sleep(0.05)


def test_a_killed_rank_ends_all_and_the_same_command_goes_on(folder, alone, pools):
    out = folder / "killed"
    processes, logs = started(folder, f"run.dir={out}", fault="dies")
    assert ended(processes, seconds=60) == [EXIT_TRANSIENT, -signal.SIGKILL]
    assert "expert prose: rank 1 has shown no sign of life" in logs[0].read_text()
    assert not (out / "prose").exists()
    made = {path: path.stat().st_mtime_ns for path in (out / "code").iterdir()}
    assert (out / "runs" / "prose" / "checkpoints" / "step-4").is_dir()
    assert [code for code, _, _ in pools[2].run(together, folder, out, timeout=120)] == [EXIT_OK] * 2
    assert_same(experts(out), alone)
    assert made == {path: path.stat().st_mtime_ns for path in (out / "code").iterdir()}
    lines = (out / "runs" / "prose" / "metrics.jsonl").read_text()
    assert '"event": "data", "step": 4' in lines


LONG = "branch.overrides={code: [train.steps=100000, checkpoint.every=0]}"


def test_an_expert_that_fails_ends_those_of_other_groups(folder):
    (folder / "torn.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    out, text = folder / "failed", [f"data.train.prose.path={folder}/torn.jsonl", LONG]
    processes, logs = started(folder, f"run.dir={out}", *text)
    assert ended(processes, seconds=60) == [EXIT_TRANSIENT, EXIT_USER]
    assert "torn.jsonl:2" in logs[1].read_text()
    assert "another rank failed: expert prose: " in logs[0].read_text()
    assert "torn.jsonl:2" in logs[0].read_text()


@pytest.mark.parametrize("world", [2, 4])
def test_a_request_to_one_rank_stops_all_of_them_saved(folder, world):
    out = folder / f"stopped-{world}"
    words = [f"run.dir={out}", "branch.groups=2", LONG, "branch.overrides.prose=[train.steps=100000]"]
    processes, _ = started(folder, *words, world=world)
    wait_for(out / "runs" / "code", 3)
    wait_for(out / "runs" / "prose", 3)
    os.kill(processes[-1].pid, signal.SIGTERM)
    assert ended(processes, seconds=60) == [EXIT_PREEMPTED] * world
    for name in ("code", "prose"):
        assert list((out / "runs" / name / "checkpoints").glob("step-*"))
        assert not (out / name).exists()


def test_a_request_to_a_rank_that_waits_for_the_others(folder):
    out = folder / "waiting"
    processes, _ = started(folder, f"run.dir={out}", LONG)
    wait_for(out / "runs" / "code", 3)
    deadline = time.monotonic() + 60
    while not (out / "branch.json").exists():
        assert time.monotonic() < deadline, "the second group did not come to its end"
        time.sleep(0.05)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert ended(processes, seconds=60) == [EXIT_PREEMPTED] * 2
    assert list((out / "runs" / "code" / "checkpoints").glob("step-*"))
    assert (out / "prose" / "config.json").exists()
    assert not (out / "runs" / "sums").exists()


# Wrong input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.train=[]"], "data.train is empty: give one source for each domain"),
        (["data.train={code: {}}"], r"data\.train\.0: set exactly one of path, hub and corpus, not none"),
        (["data.train=[{name: a, path: ./x.jsonl}, {name: a, path: ./x.jsonl}]"], "two sources are called 'a'"),
        (["data.train={runs: {corpus: prose}}"], "a domain cannot be called 'runs'"),
        (["data.train={../x: {corpus: prose}}"], r"a domain cannot be called '\.\./x'"),
        (["data.train={law: {path: nowhere.jsonl}}"], "nowhere.jsonl: no such file"),
        (["branch.overrides={law: [train.steps=1]}"], r"branch\.overrides\.law: no such domain; there is code"),
        (["branch.overrides={code: [train.step=1]}"], r"did you mean train\.steps\?"),
        (["branch.overrides={code: [model.path=./other]}"], r"code: model\.path is the same for all experts"),
        (["branch.group=2"], r"did you mean branch\.groups\?"),
        (["branch.groups=0"], "branch.groups=0: has to be at least 1"),
        (["train.stop_at=3"], "experts are trained to the end"),
        (["checkpoint.save_last=false"], "an expert's model is made of its last checkpoint"),
        (["model.path=null", "model.config={model_type: llama}"], r"model\.path is not set: name the seed"),
    ],
)
def test_mistakes_in_the_configuration(folder, monkeypatch, words, message):
    monkeypatch.chdir(folder)
    (folder / "x.jsonl").write_text('{"text": "a"}\n')
    (folder / "other").mkdir(exist_ok=True)
    with pytest.raises(UserError, match=message):
        load_branching(folder / "branch.yaml", [*(["branch.overrides={}"] if "data.train" in words[0] else []), *words])


def test_how_ranks_are_cut(folder):
    def deal(ranks, *words):
        return load_branching(folder / "branch.yaml", ["train.global_batch_size=12", *words]).deal(ranks)

    assert deal(1) == [["code", "prose", "sums"]]
    assert deal(2) == deal(4) == [["code", "sums"], ["prose"]]
    assert deal(3) == deal(6) == [["code"], ["prose"], ["sums"]]
    assert deal(6, "branch.groups=1") == [["code", "prose", "sums"]]
    with pytest.raises(UserError, match=r"4 rank\(s\) cannot be cut into 3 groups .* what works here: 1, 2"):
        deal(4, "branch.groups=3")
    with pytest.raises(UserError, match=r"expert code, in a group of 5 of 5 ranks: train\.global_batch_size=12 is no"):
        deal(5)


def test_dry_run(folder, capsys):
    words = [str(folder / "branch.yaml"), f"run.dir={folder}/dry", "train.global_batch_size=12"]
    assert main(["nexus", "branch", *words, "--dry-run", "--ranks", "4"]) == EXIT_OK
    said = capsys.readouterr().out
    assert "4 rank(s) as 2 group(s) of 2\ngroup 1  code, sums\ngroup 2  prose\n" in said
    assert f"run      prose in {folder}/dry/runs/prose" in said
    assert not (folder / "dry").exists()


def test_folders_of_others_and_another_configuration(folder, ranks, tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "precious").write_text("x")
    said = ranks(1, refused, folder, tmp_path, timeout=120)[0]
    assert f"{tmp_path / 'code'} is not empty and holds no expert of this configuration" in said
    assert [path.name for path in tmp_path.rglob("*")] == ["code", "precious"]
    assert ranks(1, together, folder, tmp_path / "x", timeout=120)[0][0] == EXIT_OK
    assert "train.lr: 0.01 -> 0.5" in ranks(1, refused, folder, tmp_path / "x", "train.lr=0.5", timeout=120)[0]
    assert "is a nexus_llama" not in said


def refused(folder, out, *words) -> str:
    try:
        branch(load_branching(folder / "branch.yaml", [f"run.dir={out}", *words]))
    except UserError as error:
        return str(error)
    return "not refused"
