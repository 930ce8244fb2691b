"""A batch script for SLURM, complete and literal: what `moe-dist launch slurm` shows, writes and submits."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_dist.errors import UserError
from moe_dist.launch.chain import FOLDER

LAUNCHERS = ("torchrun", "deepspeed")
SCRIPT = "slurm.sbatch"

# The launcher itself has to outlive a signal that is meant for its ranks: SLURM sends it to every process of a step.
# Ignored signals are inherited; the ranks take them up again when they train.
_TORCHRUN = """\
MOE_DIST_EXIT_FILE=$run_dir/launch/exit "${step[@]}" bash -c 'trap "" USR1 TERM; exec "$@"' bash \\
    "$python" -m torch.distributed.run --nnodes="$nodes" --nproc-per-node="$ranks_per_node" \\
    --rdzv-backend=c10d --rdzv-endpoint="$master_addr:$master_port" --rdzv-id="moe-dist-$SLURM_JOB_ID-$restarts" \\
    --signals-to-handle=SIGINT --max-restarts=0 -m moe_dist "${words[@]}" &
child=$!"""
_DEEPSPEED = """\
hostfile=$run_dir/launch/hostfile
while read -r host; do
    echo "$host slots=$ranks_per_node"
done <<<"$hosts" >"$hostfile"
export python hostfile master_addr master_port
# SLURM_NODEID is another on every node: single quotes keep it for the shell there.
# shellcheck disable=SC2016
MOE_DIST_EXIT_FILE=$run_dir/launch/exit "${step[@]}" bash -c '
    trap "" USR1
    exec "$python" -m deepspeed.launcher.runner --hostfile "$hostfile" --no_ssh --no_ssh_check \\
        --node_rank "$SLURM_NODEID" --master_addr "$master_addr" --master_port "$master_port" \\
        --module moe_dist "$@"' bash "${words[@]}" &
child=$!"""


@dataclass(frozen=True)
class SlurmJob:
    """What the cluster is asked for. time: as SLURM writes it, None for the partition's own. signal_lead: seconds.

    gpus_per_node = 0 asks for no GPU. cpus_per_node = None takes whole nodes (--exclusive). python: interpreter on the
    nodes, or in `container` (an image for Pyxis), which sees `mounts` besides the working and the run folder.
    """

    nodes: int
    gpus_per_node: int
    ranks_per_node: int
    python: str
    account: str | None = None
    partition: str | None = None
    time: str | None = None
    cpus_per_node: int | None = None
    container: str | None = None
    mounts: tuple[str, ...] = ()
    requeue: bool = False
    signal_lead: int = 300
    launcher: str = "torchrun"

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


def render(job: SlurmJob, *, name: str, run_dir: str, config: str, overrides: Sequence[str] = ()) -> str:
    """The text of the script. run_dir and config are taken from the working folder of this process.

    Values reach the shell quoted. In an #SBATCH line nothing can be quoted dependably: there a value with any other
    character than letters, digits and a few signs is a UserError, and so is an impossible job.
    """
    _check(job)
    folder, run_dir = os.getcwd(), os.path.abspath(run_dir)
    words = ["train", os.path.abspath(config), *overrides, f"parallel.world_size={job.world_size}"]
    cpus = [f"--cpus-per-task={job.cpus_per_node}"] if job.cpus_per_node else ["--cpu-bind=none"]
    values = {
        "SBATCH": "\n".join(f"#SBATCH {line}" for line in _directives(job, name, run_dir)),
        "FOLDER": shlex.quote(folder),
        "PYTHON": shlex.quote(job.python),
        "RUN_DIR": shlex.quote(run_dir),
        "NODES": str(job.nodes),
        "RANKS_PER_NODE": str(job.ranks_per_node),
        "WORDS": " ".join(_quoted(word) for word in words),
        "CONTAINER": " ".join(_quoted(word) for word in _container(job, folder, run_dir)),
        "REQUEUE": "yes" if job.requeue else "no",
        "SRUN": shlex.join(cpus),
        "LEAD": str(job.signal_lead),
        "LAUNCH": _TORCHRUN if job.launcher == "torchrun" else _DEEPSPEED,
    }
    template = Path(__file__).with_name("slurm.sbatch.in").read_text()
    # In one pass, so that a value which looks like a placeholder stays what it is.
    return re.sub("@([A-Z_]+)@", lambda match: values[match[1]], template)


def write(script: str, run_dir: str) -> Path:
    """Put the script into the run folder, whole or not at all; its path."""
    path = Path(run_dir) / FOLDER / SCRIPT
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(script)
        partial.chmod(0o755)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return path


def submit(path: Path) -> str:
    """Hand the script to sbatch; what it answers. Raises UserError where there is none or it refuses."""
    if shutil.which("sbatch") is None:
        raise UserError(f"there is no sbatch on this machine: copy {path} to a login node and run `sbatch {path}`")
    done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise UserError(f"sbatch refused {path}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


def interpreter(*, venv: str | None, container: str | None) -> str:
    """The Python of the nodes: that of a virtual environment, the container's, or the one that runs this."""
    if container is not None:
        return "python3"
    if venv is None:
        return sys.executable
    python = os.path.join(os.path.abspath(venv), "bin", "python")
    if not os.path.exists(python):
        raise UserError(f"--venv {venv}: holds no bin/python")
    return python


def seconds(time: str) -> int:
    """A limit as SLURM writes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if match is None:
        raise UserError(f"--time {time}: write it as SLURM does, hours:minutes:seconds or days-hours:minutes:seconds")
    days, first, second, third = (int(part) if part else None for part in match.groups())
    if days is not None:
        return ((days * 24 + first) * 60 + (second or 0)) * 60 + (third or 0)
    if third is not None:
        return (first * 60 + second) * 60 + third
    return first * 60 + (second or 0)


def _check(job: SlurmJob) -> None:
    if job.launcher not in LAUNCHERS:
        raise UserError(f"--launcher {job.launcher}: has to be {' or '.join(LAUNCHERS)}")
    for option, value, low in (
        ("nodes", job.nodes, 1),
        ("gpus-per-node", job.gpus_per_node, 0),
        ("ranks-per-node", job.ranks_per_node, 1),
        ("signal-lead", job.signal_lead, 1),
    ):
        if value < low:
            raise UserError(f"--{option} {value}: has to be at least {low}")
    if job.cpus_per_node is not None and job.cpus_per_node < 1:
        raise UserError(f"--cpus-per-node {job.cpus_per_node}: has to be at least 1")
    if 0 < job.gpus_per_node < job.ranks_per_node:
        raise UserError(
            f"--ranks-per-node {job.ranks_per_node} is more than --gpus-per-node {job.gpus_per_node}: a rank needs a "
            "GPU of its own"
        )
    if job.time is not None and seconds(job.time) <= job.signal_lead:
        raise UserError(
            f"--time {job.time} is not longer than --signal-lead {job.signal_lead} s: no step would be made"
        )
    if job.signal_lead > 65535:
        raise UserError(f"--signal-lead {job.signal_lead}: SLURM takes at most 65535 seconds")


def _directives(job: SlurmJob, name: str, run_dir: str) -> list[str]:
    given = {
        "job-name": name,
        "account": job.account,
        "partition": job.partition,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": job.gpus_per_node or None,
        "cpus-per-task": job.cpus_per_node,
        "time": job.time,
        "signal": f"B:USR1@{job.signal_lead}",
    }
    lines = [f"--{option}={_literal(option, value)}" for option, value in given.items() if value is not None]
    if job.cpus_per_node is None:
        lines.append("--exclusive")
    lines.append("--requeue" if job.requeue else "--no-requeue")
    # One log for all starts of the chain.
    output = os.path.join(_literal("output, from run.dir,", run_dir), FOLDER, "slurm-%j.log")
    return [*lines, f"--output={output}", "--open-mode=append"]


def _literal(option: str, value: str | int) -> str:
    text = str(value)
    if not re.fullmatch(r"[A-Za-z0-9/][A-Za-z0-9._+@:/=,-]*", text):
        raise UserError(
            f"--{option} {text!r}: an #SBATCH line can hold letters, digits and ._+@:/=,- only, so give another"
        )
    return text


def _container(job: SlurmJob, folder: str, run_dir: str) -> list[str]:
    if job.container is None:
        if job.mounts:
            raise UserError("--container-mounts: only with --container")
        return []
    for path in (folder, run_dir):
        if re.search("[,:]", path):
            raise UserError(f"{path}: a folder that a container mounts must have no , or : in its name")
    mounts = [f"{path}:{path}" for path in dict.fromkeys((folder, run_dir))]
    return [
        f"--container-image={job.container}",
        f"--container-mounts={','.join([*mounts, *job.mounts])}",
        f"--container-workdir={folder}",
        "--no-container-mount-home",
    ]


def _quoted(word: str) -> str:
    """Quoted for an array, also where only a reader could take a comma for a separator."""
    quoted = shlex.quote(word)
    return f"'{word}'" if quoted == word and "," in word else quoted
