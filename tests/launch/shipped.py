"""The scripts of launch/. Those for SLURM are rendered: `python -m tests.launch.shipped` writes them anew."""

from pathlib import Path
from unittest import mock

from moe_dist.launch.slurm import SlurmJob, render

FOLDER = Path(__file__).parents[2] / "launch"
FILES = {
    name: FOLDER / name
    for name in ("single_gpu.sh", "deepspeed_multinode.sh", "slurm_torchrun.sbatch", "slurm_deepspeed.sbatch")
}


def shipped(name: str) -> str | None:
    """What the file should hold, if it is a rendered one: two nodes of eight GPUs, in somebody's project."""
    if not name.startswith("slurm_"):
        return None
    job = SlurmJob(
        nodes=2,
        gpus_per_node=8,
        ranks_per_node=8,
        python="/home/me/project/.venv/bin/python",
        account="my-account",
        partition="my-partition",
        time="24:00:00",
        requeue=True,
        launcher=name.removeprefix("slurm_").removesuffix(".sbatch"),
    )
    with mock.patch("os.getcwd", return_value="/home/me/project"):
        return render(job, name="my-run", run_dir="runs/my-run", config="my.yaml")


if __name__ == "__main__":
    for name, path in FILES.items():
        text = shipped(name)
        if text is not None:
            path.write_text(text)
            path.chmod(0o755)
