"""The rendered batch script: by what has to hold of it, and run with programs in the place of SLURM's."""

import dataclasses
import json
import os
import shutil
import signal
import stat
import subprocess
import sys

import pytest

from moe_dist.cli.main import main
from moe_dist.errors import UserError
from moe_dist.launch.slurm import LAUNCHERS, SlurmJob, render, seconds
from tests.launch.shipped import FILES, shipped

JOB = SlurmJob(nodes=2, gpus_per_node=4, ranks_per_node=4, python=sys.executable, requeue=True)
CONTAINER = dataclasses.replace(JOB, container="org/image:1", mounts=("/data:/data", "/x:/y"), python="python3")
NASTY = 'it\'s; $(touch hacked) `touch hacked`\n"$HOME" @RUN_DIR@ *'


def script(job=JOB, **options):
    return render(job, **{"name": "run", "run_dir": "runs/run", "config": "c.yaml", **options})


def directives(text):
    """The #SBATCH lines that sbatch would read: up to the first line of a command."""
    lines = iter(text.splitlines()[1:])
    found = []
    for line in lines:
        if not line.startswith("#SBATCH "):
            break
        found.append(line.removeprefix("#SBATCH "))
    assert not any(line.startswith("#SBATCH") for line in lines)
    return found


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("job", [JOB, CONTAINER])
def test_scripts_parse_and_please_shellcheck(launcher, job, tmp_path):
    text = script(dataclasses.replace(job, launcher=launcher), overrides=[f"run.x={NASTY}"])
    path = tmp_path / "s.sbatch"
    path.write_text(text)
    subprocess.run(["bash", "-n", path], check=True)
    _shellcheck(path)


@pytest.mark.parametrize("name", FILES)
def test_shipped_scripts_are_what_is_rendered_and_please_shellcheck(name):
    path, text = FILES[name], shipped(name)
    assert text is None or path.read_text() == text, "`python -m tests.launch.shipped` writes them anew"
    subprocess.run(["bash", "-n", path], check=True)
    _shellcheck(path)


def _shellcheck(path):
    program = shutil.which("shellcheck", path=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("no shellcheck here")
    done = subprocess.run([program, "--shell=bash", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_directives_are_literal_and_complete():
    job = dataclasses.replace(JOB, account="a1", partition="gpu", time="2-00:00:00", signal_lead=120)
    found = directives(script(job))
    assert not any(set(line) & set("$`\"'\\ ;@{}") - {"@"} for line in found)
    for line in ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4", "--account=a1", "--partition=gpu"):
        assert line in found
    for line in ("--time=2-00:00:00", "--signal=B:USR1@120", "--requeue", "--open-mode=append", "--exclusive"):
        assert line in found
    assert f"--output={os.getcwd()}/runs/run/launch/slurm-%j.log" in found
    found = directives(script(dataclasses.replace(JOB, gpus_per_node=0, requeue=False, cpus_per_node=16)))
    assert "--cpus-per-task=16" in found
    assert "--no-requeue" in found
    assert not any(line.startswith(("--gpus", "--exclusive", "--account", "--time")) for line in found)


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ({"account": "me; rm"}, {}),
        ({"partition": "$(id)"}, {}),
        ({"partition": "a\n#SBATCH --uid=0"}, {}),
        ({"account": "--wrap=id"}, {}),
        ({}, {"name": "a b"}),
        ({}, {"run_dir": "runs/a b"}),
        ({}, {"run_dir": "runs/%x"}),
        ({}, {"run_dir": "runs/$HOME"}),
    ],
)
def test_what_no_directive_can_hold_is_refused(change, options):
    with pytest.raises(UserError, match="an #SBATCH line can hold"):
        script(dataclasses.replace(JOB, **change), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes": 0}, "--nodes 0"),
        ({"ranks_per_node": 8}, "a GPU of its own"),
        ({"gpus_per_node": -1}, "--gpus-per-node -1"),
        ({"time": "5"}, "not longer than --signal-lead 300"),
        ({"time": "soon"}, "--time soon"),
        ({"signal_lead": 70000, "time": "9-0"}, "65535"),
        ({"mounts": ("/a:/a",)}, "only with --container"),
        ({"launcher": "mpi"}, "--launcher mpi"),
        ({"cpus_per_node": 0}, "--cpus-per-node 0"),
    ],
)
def test_impossible_jobs_are_refused(change, message):
    with pytest.raises(UserError) as caught:
        script(dataclasses.replace(JOB, **change))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("5", 300), ("5:30", 330), ("1:02:03", 3723), ("2-3", 183600), ("1-0:30", 88200), ("1-1:1:1", 90061)],
)
def test_time_limits(text, wanted):
    assert seconds(text) == wanted


FAKES = {
    "scontrol": """
case "$1 $2" in
"show hostnames") echo n1; echo n2 ;;
requeue*) echo "$2" >>"$FAKE/requeued" ;;
esac
""",
    "scancel": 'echo "$@" >>"$FAKE/asked"; [ ! -e "$FAKE/ranks" ] || kill -USR1 "$(cat "$FAKE/ranks")"\n',
    # Runs what a step would run once, as node 0, with the interpreter that writes down what it was given.
    "srun": """
while [ "${1#--}" != "$1" ]; do shift; done
export SLURM_NODEID=1
exec "$@"
""",
    # In the place of Python: the launcher's part is played, the project's own verbs are real.
    "python": """
if [ "$2 $3" = "moe_dist launch" ]; then exec "$REAL" "$@"; fi
"$REAL" -c 'import json, os, sys
json.dump([sys.argv[2:], dict(os.environ)], open(sys.argv[1], "w"))' "$FAKE/start" "$@"
eval "$PLAY"
""",
}


def play(tmp_path, monkeypatch, part, *, job=JOB, signals=(), **options):
    """Run a script whose launcher plays `part`; (exit code, what the launcher was called with, requeued or not)."""
    fake = tmp_path / "fake"
    fake.mkdir(exist_ok=True)
    for name, body in FAKES.items():
        (fake / name).write_text(f"#!/bin/bash\n{body}")
        (fake / name).chmod(0o755)
    text = script(dataclasses.replace(job, python=str(fake / "python")), run_dir=str(tmp_path / "run"), **options)
    environ = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
        "PATH": f"{fake}:{os.environ['PATH']}", "FAKE": str(fake), "REAL": sys.executable, "PLAY": part,
        "RUN": str(tmp_path / "run"), "PYTHONPATH": os.getcwd(), "WORLD_SIZE": "7",
        "SLURM_JOB_ID": "41", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_ON_NODE": "32",
    }  # fmt: skip
    process = subprocess.Popen(
        ["bash", "-c", text], env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for number in signals:
        while not (fake / "ranks").exists():
            assert process.poll() is None, process.stdout.read()
        process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    words, environment = json.loads((fake / "start").read_text()) if (fake / "start").exists() else (None, None)
    return process.returncode, (words, environment, output), (fake / "requeued").exists()


STEP = 'mkdir -p "$RUN/checkpoints"; echo step-3 >"$RUN/checkpoints/latest"; '


@pytest.mark.parametrize(
    ("part", "code", "requeued"),
    [
        ('echo 0 >"$MOE_DIST_EXIT_FILE"', 0, False),
        ('echo 2 >"$MOE_DIST_EXIT_FILE"; exit 1', 2, False),
        (STEP + 'echo 87 >"$MOE_DIST_EXIT_FILE"; exit 1', 87, False),
        (STEP + 'echo 1 >"$MOE_DIST_EXIT_FILE"; exit 1', 1, False),
        (STEP + 'echo 85 >"$MOE_DIST_EXIT_FILE"; exit 1', 85, True),
        (STEP + 'echo 86 >"$MOE_DIST_EXIT_FILE"; exit 1', 86, True),
        (STEP + "kill -9 $$", 86, True),
        (STEP + "exit 0", 86, True),  # the deepspeed launcher after a rank was killed
        ('echo 85 >"$MOE_DIST_EXIT_FILE"; exit 1', 87, False),
        ('echo 86 >"$MOE_DIST_EXIT_FILE"; exit 1', 87, False),
    ],
)
def test_requeued_on_85_and_86_only_and_only_with_progress(tmp_path, monkeypatch, part, code, requeued):
    found, (_, _, output), again = play(tmp_path, monkeypatch, part)
    assert (found, again) == (code, requeued), output


def test_without_leave_nothing_is_requeued(tmp_path, monkeypatch):
    job = dataclasses.replace(JOB, requeue=False)
    found, (_, _, output), again = play(tmp_path, monkeypatch, STEP + 'echo 85 >"$MOE_DIST_EXIT_FILE"; exit 1', job=job)
    assert (found, again) == (85, False)
    assert "submit the same script again" in output


WAITS = STEP + (
    'trap "echo 85 >\\"$MOE_DIST_EXIT_FILE\\"; kill \\$!; exit 1" USR1; '
    'echo $$ >"$FAKE/r"; mv "$FAKE/r" "$FAKE/ranks"; sleep 30 & wait'
)


@pytest.mark.parametrize(("number", "requeued"), [("USR1", True), ("TERM", False)])
def test_a_signal_asks_the_ranks_and_a_cancelled_job_stays_so(tmp_path, monkeypatch, number, requeued):
    # What the ranks of this play could not take up again is ignored before them; Python can, bash cannot.
    monkeypatch.setitem(FAKES, "srun", FAKES["srun"].replace('exec "$@"', '[ "$1" != bash ] || shift 4; exec "$@"'))
    code, (_, _, output), again = play(tmp_path, monkeypatch, WAITS, signals=[getattr(signal, f"SIG{number}")])
    assert (code, again) == (85, requeued), output
    assert (tmp_path / "fake/asked").read_text() == "--signal=USR1 41\n"
    assert (tmp_path / "run/launch/stop").exists()


def test_overrides_arrive_as_they_were_given(tmp_path, monkeypatch):
    words = [f"run.name={NASTY}", "data.train={a: {corpus: docstrings}}"]
    (_, (called, environ, _), _) = play(tmp_path, monkeypatch, 'echo 0 >"$MOE_DIST_EXIT_FILE"', overrides=words)
    assert called[-5:] == ["train", os.path.abspath("c.yaml"), *words, "parallel.world_size=8"]
    assert not list(tmp_path.rglob("hacked"))
    assert not os.path.exists("hacked")
    assert {"--nnodes=2", "--nproc-per-node=4", "--max-restarts=0"} <= set(called)
    assert "--rdzv-id=moe-dist-41-0" in called
    port = 20000 + 41 * 31
    assert f"--rdzv-endpoint=n1:{port}" in called
    assert "WORLD_SIZE" not in environ  # left in the shell of the submission
    assert environ["OMP_NUM_THREADS"] == "8"


def test_deepspeed_is_told_its_node(tmp_path, monkeypatch):
    job = dataclasses.replace(JOB, launcher="deepspeed")
    (_, (called, _, _), _) = play(tmp_path, monkeypatch, 'echo 0 >"$MOE_DIST_EXIT_FILE"', job=job)
    assert called[called.index("--node_rank") + 1] == "1"
    assert called[called.index("--master_addr") + 1] == "n1"
    assert called[-5:] == ["--module", "moe_dist", "train", os.path.abspath("c.yaml"), "parallel.world_size=8"]
    assert (tmp_path / "run/launch/hostfile").read_text() == "n1 slots=4\nn2 slots=4\n"


def test_another_number_of_nodes_is_refused(tmp_path, monkeypatch):
    code, (called, _, output), again = play(tmp_path, monkeypatch, "", job=dataclasses.replace(JOB, nodes=3))
    assert (code, called, again) == (2, None, False)
    assert "this script is for 3 nodes" in output


CONFIG = "model: {config: {model_type: qwen3_moe}}\nparallel: {expert: 2}\n"


def launch(tmp_path, *words):
    (tmp_path / "c.yaml").write_text(CONFIG)
    place = [str(tmp_path / "c.yaml"), f"run.dir={tmp_path / 'run'}"]
    return main(["launch", "slurm", *place, "--gpus-per-node=0", "--ranks-per-node=2", *words])


def test_the_verb_shows_writes_and_submits(tmp_path, monkeypatch, capsys):
    assert launch(tmp_path, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert launch(tmp_path) == 0
    written = tmp_path / "run/launch/slurm.sbatch"
    assert written.read_text() == shown == capsys.readouterr().out
    assert written.stat().st_mode & stat.S_IXUSR
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert launch(tmp_path, "--submit") == 2
    assert "no sbatch on this machine" in capsys.readouterr().err
    (tmp_path / "bin").mkdir()
    for body, code, message in (("echo $1 taken", 0, f"{written} taken"), ("echo no >&2; exit 1", 2, "refused")):
        (tmp_path / "bin/sbatch").write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin/sbatch").chmod(0o755)
        assert launch(tmp_path, "--submit") == code
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["parallel.expert=3"], "needs at least 3 ranks"),
        (["parallel.world_size=5"], "the launcher started 2"),
        (["train.lrr=1"], "unknown key"),
        (["--dry-run", "--submit"], "leave out one"),
        (["--ranks-per-node=0"], "needs --ranks-per-node"),
        (["--venv=/nowhere"], "holds no bin/python"),
        (["--container=x", "--venv=y"], "not allowed with"),
    ],
)
def test_wrong_input_is_found_before_the_queue(tmp_path, capsys, words, message):
    assert launch(tmp_path, *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
