"""Go through the stages of a recipe: skip what is done, stream what runs, stop at what fails.

A finished stage leaves `<dir>/stages/<name>.json` with its hash; it runs again only when it, a file that it names, or
a stage before it has changed. Every stage is a process of its own, so that a launcher can start it and nothing that it
leaves in memory reaches the next. A stage that was killed runs again, unless it had just finished the folder that its
command line names (`moe_dist.data.made`).
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from moe_dist.config.recipe import Recipe, Stage, stage_hashes
from moe_dist.data.made import MADE_FILE, begin, made
from moe_dist.errors import EXIT_OK, UserError
from moe_dist.launch.environment import free_port
from moe_dist.launch.exit_file import EXIT_FILE
from moe_dist.launch.processes import ask_to_stop, kill


def command(stage: Stage, *, port: int = 0) -> list[str]:
    """The command line of a stage, with the interpreter that runs this. port: for the launcher; 0 = its default."""
    if stage.verb is not None:
        target, is_module = ["moe_dist", *stage.verb.split()], True  # "esft score" is two words
    elif stage.module is not None:
        target, is_module = [stage.module], True
    else:
        target, is_module = [str(stage.script)], False
    words = [*target, *([stage.config] if stage.config else []), *stage.overrides, *stage.args]
    if stage.launch == "none":
        return [sys.executable, *(["-m"] if is_module else []), *words]
    if stage.launch == "torchrun":
        start = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={stage.ranks}"]
        start += ["--master-addr=127.0.0.1", f"--master-port={port}"] if port else ["--standalone"]
        return [*start, *(["-m"] if is_module else []), *words]
    start = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(stage.ranks)]
    start += ["--master_addr", "127.0.0.1", *(["--master_port", str(port)] if port else [])]
    return [*start, *(["--module"] if is_module else []), *words]


def describe(recipe: Recipe) -> str:
    """What would run, and what is done already."""
    lines = [f"recipe folder: {recipe.dir}"]
    for index, (stage, digest) in enumerate(zip(recipe.stages, stage_hashes(recipe), strict=True), 1):
        state = "done" if _is_done(_marker(recipe, stage), digest) else "to do"
        lines.append(f"[{index}/{len(recipe.stages)}] {stage.name} ({state}): {shlex.join(command(stage))}")
    return "\n".join(lines)


def run_recipe(recipe: Recipe, *, resume: str, overwrite: bool, report: Callable[[str], None]) -> int:
    """Run the stages in order; the exit code of the first that fails, else 0.

    resume: 'auto' skips stages that are done, 'never' wants a folder without any. overwrite: remove the recipe's
    folder first, if it is one. report: called with one line at the start and the end of each stage.
    """
    folder = Path(recipe.dir)
    if overwrite and (folder / "stages").is_dir():
        shutil.rmtree(folder)
    if resume == "never" and any((folder / "stages").glob("*.json")):
        raise UserError(f"{folder} holds finished stages: resume them (--resume auto), or start anew with --overwrite")
    (folder / "stages").mkdir(parents=True, exist_ok=True)
    total = len(recipe.stages)
    for index, (stage, digest) in enumerate(zip(recipe.stages, stage_hashes(recipe), strict=True), 1):
        head = f"[{index}/{total}] {stage.name}"
        if _is_done(_marker(recipe, stage), digest):
            report(f"{head}: done before, skipped")
            continue
        folder = _made_before_it_was_killed(recipe, stage, digest)
        if folder is not None:
            report(f"{head}: was killed after it had made {folder}, skipped")
            _finish(_marker(recipe, stage), digest, 0.0)
            continue
        begin(_made_file(recipe, stage), digest)
        words = command(stage, port=free_port() if stage.launch != "none" else 0)
        report(f"{head}: {shlex.join(words)}")
        start = time.monotonic()
        code = _run(words, recipe, stage)
        seconds = time.monotonic() - start
        if code != EXIT_OK:
            report(f"{head}: failed with exit code {code} after {seconds:.0f} s; the same command again continues here")
            return code if code > 0 else 128 - code
        _finish(_marker(recipe, stage), digest, seconds)
        report(f"{head}: done in {seconds:.0f} s")
    return EXIT_OK


def _run(words: list[str], recipe: Recipe, stage: Stage) -> int:
    """Run one stage with its output passed through. SIGTERM or Ctrl-C asks its ranks to stop, a second one kills."""
    exit_file = _exit_file(recipe, stage)
    exit_file.unlink(missing_ok=True)
    ours = {EXIT_FILE: str(exit_file.absolute()), MADE_FILE: str(_made_file(recipe, stage).absolute())}
    environment = {**os.environ, **stage.env, **ours}
    # In a session of its own, so that Ctrl-C reaches the ranks by us and not the launcher, which would kill them.
    process = subprocess.Popen(words, env=environment, start_new_session=True)
    requests = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        requests.append(number)
        if len(requests) == 1:
            ask_to_stop(process.pid)
        else:
            kill(process.pid)

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if stage.verb is None:
        return code
    # Its own word is worth more than the launcher's: 85 (preempted, saved) arrives here as 1, a killed rank as 0.
    if exit_file.exists():
        own = int(exit_file.read_text())
        return own if own != EXIT_OK or code == EXIT_OK else code
    return code if code != EXIT_OK else 1


def _marker(recipe: Recipe, stage: Stage) -> Path:
    return Path(recipe.dir) / "stages" / f"{stage.name}.json"


def _exit_file(recipe: Recipe, stage: Stage) -> Path:
    return _marker(recipe, stage).with_suffix(".exit")


def _made_file(recipe: Recipe, stage: Stage) -> Path:
    return _marker(recipe, stage).with_suffix(".made")


def _made_before_it_was_killed(recipe: Recipe, stage: Stage, digest: str) -> str | None:
    """The whole folder, named on its command line, of a stage that had no time to say how it ended."""
    if _exit_file(recipe, stage).exists() and _exit_file(recipe, stage).read_text() != str(EXIT_OK):
        return None
    named = {os.path.normpath(word) for word in (*stage.args, *stage.overrides)}
    return next((folder for folder in made(_made_file(recipe, stage), digest) if folder in named), None)


def _is_done(marker: Path, digest: str) -> bool:
    try:
        return json.loads(marker.read_text())["hash"] == digest
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _finish(marker: Path, digest: str, seconds: float) -> None:
    partial = marker.with_suffix(".partial")
    partial.write_text(json.dumps({"hash": digest, "seconds": round(seconds, 1)}) + "\n")
    os.replace(partial, marker)
