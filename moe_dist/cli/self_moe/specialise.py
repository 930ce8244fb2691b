"""Train one LoRA expert for each skill on the same frozen base. The same command again resumes.

CONFIG.yaml is a configuration as for `moe-dist train`: model.path is the base, every source of data.train is a skill,
under whose name its expert is trained on it alone; everything else holds for all experts. lora says what an expert is:
rank 8 and alpha 16 on all linear layers unless told. Only this verb has
  specialise.groups=2                              groups of ranks that train side by side, an expert each at a time
  specialise.overrides={math: [train.steps=200]}   what is different for one expert
  specialise.instance=true                         the baseline: one expert on the data of all skills
One process trains the experts one after the other. More ranks are cut into as many equal groups as there are experts,
or as divide the ranks; batch sizes and parallel sizes are those of a group. Writes run.dir/SKILL, an adapter of PEFT
each, and run.dir/runs/SKILL, the run; prints the held-out losses of the base and of all experts.

examples:
  moe-dist self-moe specialise configs/self_moe/specialise.yaml --dry-run --ranks 4
  moe-dist self-moe specialise configs/self_moe/specialise.yaml run.dir=experts
  torchrun --nproc-per-node 4 -m moe_dist self-moe specialise configs/self_moe/specialise.yaml run.dir=experts
"""

import argparse

from moe_dist.cli import side_by_side

add_arguments = side_by_side.add_arguments


def run(args: argparse.Namespace) -> int:
    from moe_dist.methods.self_moe.config_specialise import load_specialising
    from moe_dist.methods.self_moe.specialise import specialise

    return side_by_side.run(args, load=load_specialising, train=specialise)
