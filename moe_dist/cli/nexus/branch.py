"""Train the dense experts from the seed, one for each domain. The same command again resumes.

CONFIG.yaml is a configuration as for `moe-dist train`: model.path is the seed, every source of data.train is a domain,
under whose name its expert is trained on it alone; everything else holds for all experts. Only this verb has
  branch.groups=2                             groups of ranks that train side by side, an expert each at a time
  branch.overrides={code: [train.steps=200]}  what is different for one expert
One process trains the experts one after the other. More ranks are cut into as many equal groups as there are experts,
or as divide the ranks; batch sizes and parallel sizes are those of a group. Writes run.dir/DOMAIN, a Hugging Face
folder each, and run.dir/runs/DOMAIN, the run; prints the held-out losses of the seed and of all experts.

examples:
  moe-dist nexus branch configs/nexus/branch.yaml --dry-run --ranks 6
  moe-dist nexus branch configs/nexus/branch.yaml run.dir=experts
  torchrun --nproc-per-node 6 -m moe_dist nexus branch configs/nexus/branch.yaml run.dir=experts
"""

import argparse

from moe_dist.cli import side_by_side

add_arguments = side_by_side.add_arguments


def run(args: argparse.Namespace) -> int:
    from moe_dist.methods.nexus.branch import branch
    from moe_dist.methods.nexus.branch_config import load_branching

    return side_by_side.run(args, load=load_branching, train=branch)
