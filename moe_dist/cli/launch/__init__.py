"""Start runs on a cluster, and decide whether a job that ended is started again. See docs/launching.md.

examples:
  moe-dist launch slurm my.yaml --nodes 2 --gpus-per-node 8 --time 24:00:00 --requeue --dry-run
  moe-dist launch slurm my.yaml train.lr=1e-5 --nodes 2 --gpus-per-node 8 --account me --submit
"""

VERBS = {
    "slurm": "render a batch script for SLURM, and submit it on request",
    "begin": "for scripts: note where a run stands before it starts",
    "again": "for scripts: whether a run that has ended is started again",
}
