import os

import pytest

from moe_dist.cli.main import main
from moe_dist.errors import UserError
from moe_dist.launch.environment import apply, derive, gpu_of

MASTER = {"MASTER_ADDR": "host0", "MASTER_PORT": "1234"}
TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x", **MASTER}
DEEPSPEED = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "CROSS_RANK": "0", "LOCAL_SIZE": "2", **MASTER}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "1",
}
MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


@pytest.mark.parametrize(
    ("environ", "launcher", "ranks"),
    [
        (TORCHRUN, "torchrun", (3, 1, 4)),
        (DEEPSPEED, "deepspeed", (1, 1, 2)),
        (SLURM, "slurm", (3, 1, 4)),
        ({**SLURM, **TORCHRUN, "SLURM_PROCID": "0"}, "torchrun", (3, 1, 4)),
        ({**SLURM, **DEEPSPEED}, "deepspeed", (1, 1, 2)),
        ({**SLURM, **TORCHRUN, "GROUP_WORLD_SIZE": "4"}, "torchrun", (3, 1, 4)),
        ({**SLURM, **DEEPSPEED, "CROSS_SIZE": "4"}, "deepspeed", (1, 1, 2)),
        ({**SLURM, **TORCHRUN, "SLURM_STEP_NUM_TASKS": "1", "GROUP_WORLD_SIZE": "2"}, "torchrun", (3, 1, 4)),
        ({**MPI, **MASTER}, "mpi", (3, 1, 4)),
        ({**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "MASTER_PORT": "1234"}, "mpi", (3, 1, 4)),
        ({**SLURM, **MPI, **MASTER, "SLURM_PROCID": "0"}, "mpi", (3, 1, 4)),  # mpirun inside of an allocation
        ({**MPI, **TORCHRUN, "TORCHELASTIC_RUN_ID": "x"}, "torchrun", (3, 1, 4)),
        ({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "none", (0, 0, 1)),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, "none", (0, 0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "environment", (0, 0, 1)),
        ({}, "none", (0, 0, 1)),
    ],
)
def test_each_launcher_is_understood(environ, launcher, ranks):
    found = derive(environ)
    assert (found.launcher, (found.rank, found.local_rank, found.world_size)) == (launcher, ranks)
    assert 0 < found.master_port < 65536


def test_slurm_tasks_agree_on_a_port_below_the_ephemeral_range():
    first = derive(SLURM)
    second = derive({**SLURM, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    assert first.master_port == second.master_port < 32_768
    assert derive({**SLURM, **MASTER}).master_port == 1234


@pytest.mark.parametrize(
    ("environ", "local_rank", "message"),
    [
        ({"WORLD_SIZE": "2"}, None, "RANK is not"),
        ({"RANK": "0"}, None, "WORLD_SIZE is not"),
        ({**TORCHRUN, "RANK": "4"}, None, "RANK=4 is not below WORLD_SIZE=4"),
        ({**TORCHRUN, "RANK": "x"}, None, "RANK=x"),
        (TORCHRUN, 0, "--local_rank=0 but LOCAL_RANK=1"),
        ({"RANK": "0", "WORLD_SIZE": "2", **MASTER}, None, "LOCAL_RANK is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, None, "MASTER_ADDR is not set"),
        ({**SLURM, "RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", **MASTER}, None, "SLURM_PROCID=3"),
        ({**SLURM, **TORCHRUN, "GROUP_WORLD_SIZE": "1"}, None, "srun started 4 tasks, each with a torchrun"),
        ({**SLURM, **DEEPSPEED, "CROSS_SIZE": "2"}, None, "deepspeed was told of 2 machine(s)"),
        ({**MPI, "RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", **MASTER}, None, "mpirun says 3 of 4"),
        (MPI, None, "MASTER_ADDR is not set, and mpirun"),
        ({**MPI, "MASTER_ADDR": "host0"}, None, "MASTER_PORT is not set, and mpirun"),
        ({**SLURM, "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "n[1-2]"}, None, "set MASTER_ADDR"),
    ],
)
def test_contradictions_are_refused(environ, local_rank, message, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError) as caught:
        derive(environ, local_rank=local_rank)
    assert message in str(caught.value)


def test_slurm_itself_expands_node_lists(tmp_path, monkeypatch):
    fake = tmp_path / "scontrol"
    fake.write_text('#!/bin/sh\n[ "$3" = "rack[1-2]n[1-4]" ] && echo rack1n1 && echo rack1n2\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = derive({**SLURM, "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "rack[1-2]n[1-4]"})
    assert found.master_addr == "rack1n1"


def test_apply_sets_all_five_and_shares_the_cores():
    environ = dict(DEEPSPEED)
    apply(environ, local_rank=1)
    assert int(environ["OMP_NUM_THREADS"]) == max(1, os.cpu_count() // 2)
    alone: dict[str, str] = {}
    apply(alone)
    assert set(alone) == {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    assert apply({**environ, "OMP_NUM_THREADS": "7"}).world_size == 2


BOUND = {**SLURM, "SLURM_GPUS_PER_TASK": "1"}


@pytest.mark.parametrize(
    ("environ", "visible", "index"),
    [
        (TORCHRUN, 8, 1),
        (TORCHRUN, 1, None),
        (TORCHRUN, 0, None),
        (SLURM, 4, 1),
        (SLURM, 1, None),
        (BOUND, 1, 0),
        (BOUND, 4, 1),  # asked for, and yet every task sees all of them
        (BOUND, 0, None),
        ({**SLURM, "SLURM_TRES_PER_TASK": "cpu=4,gres/gpu=1"}, 1, 0),
        ({**SLURM, "SLURM_GPU_BIND": "verbose,single:1"}, 1, 0),
        ({**SLURM, "SLURM_GPU_BIND": "none"}, 1, None),
        ({**SLURM, "CUDA_VISIBLE_DEVICES": "1"}, 1, 0),
        ({**SLURM, "CUDA_VISIBLE_DEVICES": "0"}, 1, None),
        # torchrun in one task of the step: its ranks share what that task sees.
        ({**BOUND, **TORCHRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, 1, None),
    ],
)
def test_the_gpu_of_a_rank(environ, visible, index):
    environ = dict(environ)
    place = apply(environ)
    assert apply(environ).local_rank == 1  # the second time, as a run does, from the variables of the first
    if index is not None:
        assert gpu_of(place, visible=visible, environ=environ) == index
        return
    with pytest.raises(UserError, match=f"local rank 1 has no GPU: it sees {visible}"):
        gpu_of(place, visible=visible, environ=environ)


@pytest.mark.parametrize(("expected", "started", "code"), [("2", "2", 0), ("4", "2", 2), ("2", "1", 2)])
def test_another_number_of_ranks_than_expected_is_refused_before_anything_loads(
    expected, started, code, tmp_path, monkeypatch, capsys
):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": started, **MASTER}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("moe_dist.train.loop.train", lambda *args, **options: 0)
    config = tmp_path / "c.yaml"
    config.write_text("model: {config: {model_type: qwen3_moe}}\n")
    assert main(["train", str(config), f"parallel.world_size={expected}"]) == code
    refused = f"parallel.world_size={expected}, but the launcher started {started} rank(s)"
    assert (refused in capsys.readouterr().err) == (code == 2)
