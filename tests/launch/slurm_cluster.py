"""A real SLURM on this machine: controller and two nodes in a folder of their own, stopped by their process ids."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "sinfo")


def why_not() -> str | None:
    """Why no cluster can be brought up here; None where one can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if missing:
        return f"no {', '.join(missing)} here: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "the daemons of SLURM want to be started as root"
    return None


class Cluster:
    """Context of a running cluster with nodes n1 and n2, each with two cores."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environ = {
            **os.environ,
            "PATH": _path(),
            "SLURM_CONF": str(folder / "slurm.conf"),
            "MOE_DIST_MASTER_ADDR": "127.0.0.1",  # both nodes are this machine, and n1 is no name that resolves
        }
        self._daemons: list[subprocess.Popen] = []
        self._nodes: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Cluster":
        self.folder.mkdir(parents=True)
        key, conf = self.folder / "munge.key", self.folder / "slurm.conf"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        sockets = self.folder / "munge.socket"
        ports = _free_ports(3)
        host = socket.gethostname()
        conf.write_text(
            "\n".join(
                [
                    "ClusterName=test",
                    f"SlurmctldHost={host}(127.0.0.1)",
                    f"SlurmctldPort={ports[0]}",
                    "SlurmUser=root",
                    "AuthType=auth/munge",
                    f"AuthInfo=socket={sockets}",
                    "CredType=cred/munge",
                    "ProctrackType=proctrack/pgid",
                    "TaskPlugin=task/none",
                    "SelectType=select/cons_tres",
                    "SelectTypeParameters=CR_Core",
                    "SwitchType=switch/none",
                    "MpiDefault=none",
                    "ReturnToService=2",
                    "KillWait=5",
                    "SlurmdTimeout=10",
                    "SchedulerParameters=sched_interval=1,sched_min_interval=100000",
                    f"StateSaveLocation={self.folder / 'state'}",
                    f"SlurmdSpoolDir={self.folder / 'spool-%n'}",
                    f"SlurmctldPidFile={self.folder / 'slurmctld.pid'}",
                    f"SlurmdPidFile={self.folder / 'slurmd-%n.pid'}",
                    f"SlurmctldLogFile={self.folder / 'slurmctld.log'}",
                    f"SlurmdLogFile={self.folder / 'slurmd-%n.log'}",
                    *(
                        f"NodeName=n{index} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000"
                        for index, port in ((1, ports[1]), (2, ports[2]))
                    ),
                    "PartitionName=all Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP",
                    "",
                ]
            )
        )
        try:
            self._start(
                *("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={sockets}"),
                *(f"--{name}-file={self.folder / name}" for name in ("pid", "log", "seed")),
            )
            _until(sockets.exists, 10, "munged")
            self._start("slurmctld", "-D", "-f", str(conf))
            for node in ("n1", "n2"):
                self.start_node(node)
            _until(lambda: self.say("sinfo", "-h", "-N", "-o", "%t").split() == ["idle", "idle"], 30, "the nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        if self._nodes:
            with contextlib.suppress(subprocess.SubprocessError):
                for job in self.say("squeue", "-h", "-o", "%A").split():
                    self.say("scancel", job)
                    self.say("scancel", "--signal=KILL", "--full", job)
                _until(lambda: not self.say("squeue", "-h"), 10, "the jobs to end")
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def start_node(self, name: str) -> None:
        self._nodes[name] = self._start("slurmd", "-D", "-N", name, "-f", str(self.folder / "slurm.conf"))

    def kill_node(self, name: str) -> None:
        """What a loss of power does: SIGKILL to the node's daemon and to all that runs on it, at once."""
        doomed = {self._nodes[name].pid}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                variables = (folder / "environ").read_bytes().split(b"\0")
                ours = f"SLURM_CONF={self.folder / 'slurm.conf'}".encode() in variables
                if ours and f"SLURMD_NODENAME={name}".encode() in variables:
                    doomed |= {int(folder.name), *_step_daemons(int(folder.name))}
        for pid in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._nodes[name].wait()

    def say(self, *words: str) -> str:
        """What a command of SLURM prints."""
        return subprocess.run(words, env=self.environ, capture_output=True, text=True, timeout=30).stdout

    def job(self, number: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        words = self.say("scontrol", "-o", "show", "job", number).split()
        return dict(word.partition("=")[::2] for word in words)

    def wait(self, number: str, *states: str, timeout: float) -> dict[str, str]:
        """Wait until the job is in one of these states."""
        _until(lambda: self.job(number).get("JobState") in states, timeout, f"job {number} to be {' or '.join(states)}")
        return self.job(number)

    def _start(self, *words: str) -> subprocess.Popen:
        log = open(self.folder / f"{words[0]}-{len(self._daemons)}.out", "wb")  # noqa: SIM115
        with log:
            self._daemons.append(subprocess.Popen(words, env=self.environ, stdout=log, stderr=log))
        return self._daemons[-1]


def _step_daemons(pid: int) -> set[int]:
    """The daemons of SLURM's steps among a process' parents."""
    found = set()
    while pid > 1:
        fields = Path(f"/proc/{pid}/stat").read_text()
        if "(slurmstepd" in fields:
            found.add(pid)
        pid = int(fields.rpartition(")")[2].split()[1])
    return found


def _until(done, timeout: float, what: str) -> None:
    end = time.monotonic() + timeout
    while not done():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout:.0f} s for {what}")
        time.sleep(0.2)


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
