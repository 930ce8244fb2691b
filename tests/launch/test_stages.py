import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_dist.config.recipe import Recipe, Stage
from moe_dist.errors import EXIT_OK, EXIT_USER, UserError
from moe_dist.launch.stages import command, describe, run_recipe
from tests.methods.nexus.tiny import nexus_folder
from tests.recipes import DEADLY

REPOSITORY = Path(__file__).parents[2]


def note(tmp_path, name, *, code=0):
    """A stage that appends its name to a file and ends with `code`."""
    script = tmp_path / f"{name}.py"
    script.write_text(f"import sys\nopen({str(tmp_path / 'order')!r}, 'a').write({name!r})\nsys.exit({code})\n")
    return Stage(name=name, script=str(script))


def go(recipe, **options):
    lines = []
    code = run_recipe(recipe, **{"resume": "auto", "overwrite": False, "report": lines.append, **options})
    return code, lines


def test_stages_run_in_order_once(tmp_path):
    recipe = Recipe(str(tmp_path / "run"), [note(tmp_path, "a"), note(tmp_path, "b")])
    assert go(recipe)[0] == EXIT_OK
    code, lines = go(recipe)
    assert code == EXIT_OK
    assert lines == ["[1/2] a: done before, skipped", "[2/2] b: done before, skipped"]
    assert (tmp_path / "order").read_text() == "ab"
    assert describe(recipe).count("(done)") == 2


def test_failure_names_the_stage_and_the_same_command_continues(tmp_path):
    recipe = Recipe(str(tmp_path / "run"), [note(tmp_path, "a"), note(tmp_path, "b", code=7), note(tmp_path, "c")])
    code, lines = go(recipe)
    assert code == 7
    assert "[2/3] b: failed with exit code 7" in lines[-1]
    note(tmp_path, "b")
    assert go(recipe)[0] == EXIT_OK
    assert (tmp_path / "order").read_text() == "abbc"


def test_a_changed_stage_runs_again_and_so_do_those_after_it(tmp_path):
    recipe = Recipe(str(tmp_path / "run"), [note(tmp_path, name) for name in "abc"])
    go(recipe)
    recipe.stages[1].args = ["new"]
    go(recipe)
    assert (tmp_path / "order").read_text() == "abcbc"


def test_resume_never_and_overwrite(tmp_path):
    recipe = Recipe(str(tmp_path / "run"), [note(tmp_path, "a")])
    assert go(recipe, resume="never")[0] == EXIT_OK
    with pytest.raises(UserError, match="holds finished stages"):
        go(recipe, resume="never")
    (tmp_path / "run" / "left").write_text("x")
    assert go(recipe, overwrite=True)[0] == EXIT_OK
    assert not (tmp_path / "run" / "left").exists()
    assert (tmp_path / "order").read_text() == "aa"


def test_overwrite_removes_only_a_recipe_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("x")
    go(Recipe(str(tmp_path / "run"), [note(tmp_path, "a")]), overwrite=True)
    assert (tmp_path / "run" / "precious").exists()


def test_a_verb_tells_its_own_exit_code(tmp_path):
    stage = Stage(name="wrong", verb="ckpt", args=["ls", str(tmp_path / "nothing")])
    code, lines = go(Recipe(str(tmp_path / "run"), [stage]))
    assert code == 2
    assert (tmp_path / "run" / "stages" / "wrong.exit").read_text() == "2"
    assert "wrong: failed with exit code 2" in lines[-1]


def test_a_killed_stage_is_a_failure(tmp_path):
    script = tmp_path / "k.py"
    script.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    assert go(Recipe(str(tmp_path / "run"), [Stage(name="k", script=str(script))]))[0] == 137


def test_a_verb_that_ends_without_a_word_is_a_failure(tmp_path, monkeypatch):
    """The deepspeed launcher ends with 0 when a rank was killed by a signal."""
    monkeypatch.setattr("moe_dist.launch.stages.command", lambda stage, port=0: [sys.executable, "-c", "pass"])
    assert go(Recipe(str(tmp_path / "run"), [Stage(name="a", verb="train")]))[0] == 1


def test_commands_of_the_launchers():
    options = {"verb": "train", "config": "c.yaml", "overrides": ["a=b"], "args": ["--resume", "auto"], "ranks": 2}
    tail = ["train", "c.yaml", "a=b", "--resume", "auto"]
    assert command(Stage(**{**options, "ranks": 1}))[1:] == ["-m", "moe_dist", *tail]
    words = command(Stage(launch="deepspeed", **options), port=1234)
    assert words[1:] == [
        "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_addr", "127.0.0.1", "--master_port", "1234",
        "--module", "moe_dist", *tail,
    ]  # fmt: skip
    words = command(Stage(launch="torchrun", **options), port=1234)
    assert words[1:3] == ["-m", "torch.distributed.run"]
    assert words[-7:] == ["-m", "moe_dist", *tail]
    assert command(Stage(script="s.py", args=["x"]))[1:] == ["s.py", "x"]


def test_a_stage_has_its_own_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("GREETING", raising=False)
    script = tmp_path / "e.py"
    script.write_text("import os, sys\nsys.exit(os.environ['GREETING'] != 'hello')\n")
    stage = Stage(name="e", script=str(script), env={"GREETING": "hello"})
    assert go(Recipe(str(tmp_path / "run"), [stage]))[0] == EXIT_OK


def started(tmp_path, stage):
    """`run_recipe` of one stage in a process of its own, which the test may signal."""
    recipe = Recipe(str(tmp_path / "run"), [stage])
    code = (
        "import sys; from moe_dist.config.recipe import Recipe, Stage; from moe_dist.launch.stages import run_recipe;"
        f"sys.exit(run_recipe({recipe!r}, resume='auto', overwrite=False, report=print))"
    )
    return subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY)


def wait_for(path, seconds=60):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not appear"
        time.sleep(0.05)


# A launcher that would die of SIGTERM and leave its rank behind, as deepspeed's does.
LAUNCHER = """
import os, subprocess, sys
environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1"}
sys.exit(subprocess.call([sys.executable, sys.argv[1], sys.argv[2]], env=environment))
"""
RANK = """
import signal, sys, time
from pathlib import Path
def stop(number, frame):
    Path(sys.argv[1], "saved").touch()
    sys.exit(85)
signal.signal(signal.SIGTERM, stop if len(sys.argv) < 3 else signal.SIG_IGN)
Path(sys.argv[1], "ready").touch()
time.sleep(120)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_reaches_the_ranks_below_a_launcher(tmp_path, number):
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    (tmp_path / "rank.py").write_text(RANK)
    stage = Stage(name="a", script=str(tmp_path / "launcher.py"), args=[str(tmp_path / "rank.py"), str(tmp_path)])
    process = started(tmp_path, stage)
    wait_for(tmp_path / "ready")
    process.send_signal(number)
    assert process.wait(60) == 85
    assert (tmp_path / "saved").exists()


def test_a_second_request_kills(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    process = started(tmp_path, Stage(name="a", script=str(tmp_path / "rank.py"), args=[str(tmp_path), "deaf"]))
    wait_for(tmp_path / "ready")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 137


def test_a_stage_killed_between_its_folder_and_its_mark_is_done(tmp_path, monkeypatch):
    """A real verb, killed at the first moment at which its folder is there."""
    nexus_folder("llama", tmp_path / "model")
    (tmp_path / "sitecustomize.py").write_text(DEADLY)
    monkeypatch.setenv("DIE_AT", "smaller")
    stage = Stage(
        name="remove",
        verb="nexus remove",
        args=[str(tmp_path / "model"), "1", f"{tmp_path}/./smaller"],
        env={"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"},
    )
    recipe = Recipe(str(tmp_path / "run"), [stage])
    assert go(recipe)[0] == 137
    monkeypatch.delenv("DIE_AT")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "smaller").iterdir()}
    assert tmp_path / "smaller" / "config.json" in stamps
    code, lines = go(recipe)
    assert (code, len(lines)) == (EXIT_OK, 1)
    assert "remove: was killed after it had made" in lines[0]
    assert go(recipe)[1] == ["[1/1] remove: done before, skipped"]
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "smaller").iterdir()}

    # A stage that is another one now, or a folder that is, is refused by the verb.
    stage.args[1] = "2"
    assert go(recipe)[0] == EXIT_USER
    stage.args[1] = "1"
    (tmp_path / "run" / "stages" / "remove.json").unlink()
    assert go(recipe)[0] == EXIT_USER
