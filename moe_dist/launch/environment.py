"""The rank environment: what torchrun, deepspeed, mpirun, SLURM tasks or no launcher at all say about this process.

torch.distributed and DeepSpeed read RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; `apply` makes sure that
all five are set, whoever started the process. In order of precedence:

1. RANK and WORLD_SIZE in the environment (torchrun, deepspeed, or set by hand). torchrun and deepspeed often run inside
   a SLURM task of their own: then only the number of launchers has to be that of the step's tasks.
2. Open MPI: OMPI_COMM_WORLD_RANK, _LOCAL_RANK, _SIZE. On several machines MASTER_ADDR and MASTER_PORT are needed.
3. A SLURM step of several tasks (`srun`): SLURM_PROCID, SLURM_LOCALID, SLURM_STEP_NUM_TASKS. A batch script or an
   allocation without `srun` is no step and counts as no launcher.
4. Nothing: one process, a free local port.

MASTER_ADDR and MASTER_PORT, where set, are kept in all four. Values that contradict each other are an error, because
ranks that disagree wait for each other until a timeout.
"""

import os
import socket
import subprocess
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from moe_dist.errors import UserError


@dataclass(frozen=True)
class RankEnvironment:
    """Where this process stands. launcher: 'torchrun', 'deepspeed', 'mpi', 'slurm', 'environment' or 'none'."""

    rank: int
    local_rank: int
    world_size: int
    master_addr: str
    master_port: int
    launcher: str


def apply(environ: MutableMapping[str, str] = os.environ, *, local_rank: int | None = None) -> RankEnvironment:
    """Derive the rank environment, write its five variables into `environ`, and return it.

    local_rank: what the deepspeed launcher passed as --local_rank. Several ranks on one machine also share its cores:
    OMP_NUM_THREADS is set to a rank's share unless it is set already (call this before torch is imported).
    """
    found = derive(environ, local_rank=local_rank)
    environ["RANK"] = str(found.rank)
    environ["LOCAL_RANK"] = str(found.local_rank)
    environ["WORLD_SIZE"] = str(found.world_size)
    environ["MASTER_ADDR"] = found.master_addr
    environ["MASTER_PORT"] = str(found.master_port)
    neighbours = environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE")
    if "OMP_NUM_THREADS" not in environ and neighbours and neighbours.isdecimal() and int(neighbours) > 1:
        environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(neighbours)))
    return found


def derive(environ: MutableMapping[str, str], *, local_rank: int | None = None) -> RankEnvironment:
    """The rank environment that `environ` describes; changes nothing. Raises UserError for contradictions."""
    if "RANK" in environ or "WORLD_SIZE" in environ:
        found = _from_variables(environ, local_rank)
    elif "OMPI_COMM_WORLD_SIZE" in environ:
        found = _from_open_mpi(environ)
    elif _number(environ, "SLURM_STEP_NUM_TASKS", 1) > 1:
        found = _from_slurm(environ)
    else:
        address = environ.get("MASTER_ADDR", "127.0.0.1")
        found = RankEnvironment(0, 0, 1, address, _number(environ, "MASTER_PORT", 0) or free_port(), "none")
    if not 0 <= found.rank < found.world_size:
        raise UserError(f"RANK={found.rank} is not below WORLD_SIZE={found.world_size}: the launcher's variables clash")
    if local_rank is not None and local_rank != found.local_rank:
        raise UserError(f"--local_rank={local_rank} but LOCAL_RANK={found.local_rank}: unset the one that is wrong")
    return found


def gpu_of(place: RankEnvironment, *, visible: int, environ: Mapping[str, str]) -> int:
    """Index of this rank's GPU among the `visible` ones.

    Where all ranks of a machine see all of its GPUs it is the local rank. SLURM can bind GPUs to tasks
    (`--gpus-per-task`): then each rank sees its own alone, and takes the first where its local rank is beyond them.
    Raises UserError where this rank would have to share a GPU.
    """
    if place.local_rank < visible:
        return place.local_rank
    if visible and _gpus_are_bound(place, environ):
        return 0
    raise UserError(
        f"local rank {place.local_rank} has no GPU: it sees {visible}. Start at most one rank for each GPU, let SLURM "
        "give each task its own (--gpus-per-task=1), or set MOE_DIST_DEVICE=cpu"
    )


def _gpus_are_bound(place: RankEnvironment, environ: Mapping[str, str]) -> bool:
    """Whether each rank is a SLURM task to which GPUs of its own were given."""
    if environ.get("SLURM_PROCID") != str(place.rank) or environ.get("SLURM_STEP_NUM_TASKS") != str(place.world_size):
        return False  # a launcher inside of a task: its ranks share what the task sees
    binding = environ.get("SLURM_GPU_BIND", "").removeprefix("verbose,").removeprefix("quiet,")
    return (
        environ.get("SLURM_GPUS_PER_TASK", "0") != "0"
        or "gres/gpu" in environ.get("SLURM_TRES_PER_TASK", "")
        or binding.startswith(("single", "per_task"))
        # A wrapper that shows each task the GPU of its own number.
        or environ.get("CUDA_VISIBLE_DEVICES") == str(place.local_rank)
    )


def _from_variables(environ: MutableMapping[str, str], local_rank: int | None) -> RankEnvironment:
    for name in ("RANK", "WORLD_SIZE"):
        if name not in environ:
            other = "WORLD_SIZE" if name == "RANK" else "RANK"
            raise UserError(
                f"{other} is set but {name} is not: start with torchrun, deepspeed or srun, "
                f"or unset {other} for a single process"
            )
    rank, world_size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    if "TORCHELASTIC_RUN_ID" in environ:
        launcher = "torchrun"
        _check_launchers(environ, "torchrun", _number(environ, "GROUP_WORLD_SIZE", 0))
    elif "CROSS_RANK" in environ:
        launcher = "deepspeed"
        _check_launchers(environ, "deepspeed", _number(environ, "CROSS_SIZE", 0))
    else:
        launcher = "environment"
        tasks, task = _number(environ, "SLURM_STEP_NUM_TASKS", 1), _number(environ, "SLURM_PROCID", 0)
        # One exported RANK for all tasks: `$SLURM_PROCID` was expanded before srun started them.
        if tasks == world_size > 1 and task != rank:
            raise UserError(
                f"RANK={rank} but SLURM_PROCID={task} of {tasks} tasks: RANK was set outside of srun; unset RANK and "
                "WORLD_SIZE and let the tasks find their own"
            )
        peers = _number(environ, "OMPI_COMM_WORLD_SIZE", 1)
        if peers > 1 and (peers, _number(environ, "OMPI_COMM_WORLD_RANK")) != (world_size, rank):
            raise UserError(
                f"RANK={rank} of {world_size}, but mpirun says {environ['OMPI_COMM_WORLD_RANK']} of {peers}: unset "
                "RANK and WORLD_SIZE, which are older than mpirun's"
            )
    if "LOCAL_RANK" in environ:
        local = _number(environ, "LOCAL_RANK")
    elif local_rank is not None:
        local = local_rank
    elif world_size == 1:
        local = 0
    else:
        raise UserError(f"LOCAL_RANK is not set though WORLD_SIZE={world_size}: set it to the rank within the machine")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if world_size > 1 and not environ.get(name):
            raise UserError(f"{name} is not set though WORLD_SIZE={world_size}: set it to that of rank 0")
    address = environ.get("MASTER_ADDR") or "127.0.0.1"
    return RankEnvironment(
        rank, local, world_size, address, _number(environ, "MASTER_PORT", 0) or free_port(), launcher
    )


def _check_launchers(environ: Mapping[str, str], name: str, launchers: int) -> None:
    """`srun torchrun` starts a launcher a task; launchers that do not know of each other would each train alone."""
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS", 1)
    if launchers and tasks > 1 and launchers != tasks:
        raise UserError(
            f"srun started {tasks} tasks, each with a {name} of its own, but {name} was told of {launchers} "
            f"machine(s): start one task a node (--ntasks-per-node=1) and tell {name} the number of nodes"
        )


def _from_open_mpi(environ: MutableMapping[str, str]) -> RankEnvironment:
    world_size, here = _number(environ, "OMPI_COMM_WORLD_SIZE"), _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", 0)
    alone = world_size == 1
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        # On one machine the address is known; a port that all ranks agree on is not.
        if not alone and not environ.get(name) and not (name == "MASTER_ADDR" and here == world_size):
            raise UserError(
                f"{name} is not set, and mpirun does not tell it: start with `mpirun -x MASTER_ADDR=HOST -x "
                "MASTER_PORT=29500 ...`, HOST being that of rank 0"
            )
    return RankEnvironment(
        _number(environ, "OMPI_COMM_WORLD_RANK"),
        _number(environ, "OMPI_COMM_WORLD_LOCAL_RANK"),
        world_size,
        environ.get("MASTER_ADDR") or "127.0.0.1",
        _number(environ, "MASTER_PORT", 0) or free_port(),
        "mpi",
    )


def _from_slurm(environ: MutableMapping[str, str]) -> RankEnvironment:
    address = environ.get("MASTER_ADDR")
    if not address:
        address = "127.0.0.1"
        if _number(environ, "SLURM_STEP_NUM_NODES", 1) > 1:
            address = _first_host(environ.get("SLURM_STEP_NODELIST", ""))
    # Every task computes the same port from the job and the step. It lies below the range from which the system
    # hands out ports for outgoing connections, so that none of those can take it first.
    job, step = _number(environ, "SLURM_JOB_ID", 0), _number(environ, "SLURM_STEP_ID", 0)
    port = _number(environ, "MASTER_PORT", 0) or 20_000 + (job * 31 + step) % 10_000
    return RankEnvironment(
        _number(environ, "SLURM_PROCID"),
        _number(environ, "SLURM_LOCALID"),
        _number(environ, "SLURM_STEP_NUM_TASKS"),
        address,
        port,
        "slurm",
    )


def _first_host(nodes: str) -> str:
    """The first host of a SLURM node list; SLURM itself expands it, as its grammar is more than brackets."""
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=30)
        hosts = done.stdout.split() if done.returncode == 0 else []
    except (OSError, subprocess.TimeoutExpired):
        hosts = []
    if not hosts:
        raise UserError(f"cannot expand the node list {nodes!r} with scontrol: set MASTER_ADDR to the host of rank 0")
    return hosts[0]


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if (text is None or text == "") and default is not None:
        return default
    if text is None or not text.strip().isdecimal():
        raise UserError(f"{name}={text}: has to be a whole number")
    return int(text)


def free_port() -> int:
    """A TCP port of this machine that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
