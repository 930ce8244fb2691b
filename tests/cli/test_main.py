import errno
import subprocess
import sys
import time
from pathlib import Path

import pytest

import moe_dist.cli.ckpt
from moe_dist.cli.main import VERBS, main, take_local_rank
from moe_dist.errors import EXIT_OK, EXIT_POLICY, EXIT_TRANSIENT, EXIT_USER, PolicyStop, UserError

REPOSITORY = Path(__file__).parents[2]
INLINE = "model: {config: {model_type: qwen3_moe}}\n"


def call(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "moe_dist", *words], capture_output=True, text=True, cwd=REPOSITORY, **options
    )


def test_help_is_quick_and_teaches():
    # The best of three, since another process may hold the cores.
    seconds, done = [], None
    for _ in range(3):
        start = time.monotonic()
        done = call("--help")
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 1
    assert done.returncode == EXIT_OK
    assert "examples:" in done.stdout
    for verb in VERBS:
        assert f"  {verb} " in done.stdout


def test_import_and_help_leave_torch_alone():
    code = "import sys, moe_dist, moe_dist.cli.main as m; m.main(['train', '--help']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    modules = done.stdout.splitlines()[-1]
    for heavy in ("'torch'", "'transformers'", "'deepspeed'", "'datasets'", "'omegaconf'", "'numpy'"):
        assert heavy not in modules


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    assert main([verb, "--help"]) == EXIT_OK
    assert f"usage: moe-dist {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "did you mean train?"),
        (["train"], "train needs a CONFIG.yaml"),
        (["train", "--lr", "3"], "go without dashes"),
        (["train", "missing.yaml"], "missing.yaml: no such file"),
        (["train", "missing.yaml", "--ranks", "2"], "--ranks is for --dry-run"),
        (["train", "missing.yaml", "--overwrite", "--resume", "x"], "cannot go with --resume PATH"),
        (["run", "missing.yaml"], "missing.yaml: no such file"),
        (["run"], "required: RECIPE.yaml"),
        (["ckpt", "ls", "/nonexistent"], "no such folder"),
        (["--local_rank=x", "train"], "--local_rank=x"),
    ],
)
def test_wrong_input_is_one_message_and_exit_2(argv, message, capsys):
    assert main(argv) == EXIT_USER
    told = capsys.readouterr()
    assert message in told.err
    assert told.err.startswith("moe-dist: error: ")
    assert told.out == ""


def test_wrong_config_from_a_shell_shows_no_traceback(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(INLINE + "train: {learning_rate: 1}")
    done = call("train", str(file), "--dry-run")
    assert done.returncode == EXIT_USER
    assert done.stderr == f"moe-dist: error: {file}: unknown key train.learning_rate: did you mean train.lr?\n"


@pytest.mark.parametrize(
    ("argv", "rest", "value"),
    [
        (["--local_rank=1", "train", "c"], ["train", "c"], 1),
        (["train", "c", "--local-rank", "3", "a=b"], ["train", "c", "a=b"], 3),
        (["train"], ["train"], None),
    ],
)
def test_local_rank_is_taken_from_anywhere(argv, rest, value):
    assert take_local_rank(argv) == (rest, value)


def test_other_ranks_say_who_they_are(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    assert main(["train", "missing.yaml"]) == EXIT_USER
    assert capsys.readouterr().err.startswith("moe-dist [rank 3]: error: ")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("wrong"), EXIT_USER, "error: wrong"),
        (PolicyStop("too many NaN"), EXIT_POLICY, "stopped: too many NaN"),
        (OSError(errno.ENOSPC, "No space left", "/x/y"), EXIT_USER, "no disk space left at /x/y"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer"), EXIT_TRANSIENT, "start the same"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_become_exit_codes(error, code, message, monkeypatch, capsys, tmp_path):
    def fail(args):
        raise error

    monkeypatch.setattr(moe_dist.cli.ckpt, "run", fail)
    monkeypatch.setenv("MOE_DIST_EXIT_FILE", str(tmp_path / "exit"))
    assert main(["ckpt", "ls", "x"]) == code
    assert message in capsys.readouterr().err
    assert (tmp_path / "exit").read_text() == str(code)


def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path):
    def fail(args):
        raise KeyError("bug")

    monkeypatch.setattr(moe_dist.cli.ckpt, "run", fail)
    monkeypatch.setenv("MOE_DIST_EXIT_FILE", str(tmp_path / "exit"))
    with pytest.raises(KeyError):
        main(["ckpt", "ls", "x"])
    assert (tmp_path / "exit").read_text() == "1"


def test_first_failing_rank_is_the_one_that_counts(monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_DIST_EXIT_FILE", str(tmp_path / "exit"))
    monkeypatch.setenv("RANK", "1")
    assert main(["--help"]) == EXIT_OK
    assert not (tmp_path / "exit").exists()  # only rank 0 speaks for success
    assert main(["trian"]) == EXIT_USER
    monkeypatch.setenv("RANK", "0")
    assert main(["--help"]) == EXIT_OK
    assert (tmp_path / "exit").read_text() == str(EXIT_USER)
