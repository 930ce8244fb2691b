"""Write what a run has trained as an adapter: the full weights of its selected experts, and nothing else.

OUT holds model.safetensors with the experts under their names on the hub, expert_cfg.json with their ids, and the base
model's configuration and tokenizer, as the adapters of the ESFT repository do. Beside them, adapter_manifest.json has
the fingerprint of the base model (an adapter is refused on any other), the sha256 of the files, and how the experts
were chosen. Of a run that keeps its best checkpoint by held-out loss that one is taken, otherwise the newest.

Weights have the dtype in which the run keeps its model: of a bf16 model, two bytes for each parameter that trained.

examples:
  moe-dist esft adapter runs/intent adapters/intent
  moe-dist esft adapter runs/intent adapters/intent --selection expert_config.selection.json
  moe-dist esft adapter runs/intent/checkpoints/step-100 adapters/intent-100
"""

import argparse

from moe_dist.errors import EXIT_OK, UserError
from moe_dist.launch import environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="run folder, or one checkpoint of it")
    parser.add_argument("out", metavar="OUT", help="folder to write; new or empty")
    parser.add_argument(
        "--selection", metavar="FILE", help="NAME.selection.json of esft select: how the experts were chosen"
    )


def run(args: argparse.Namespace) -> int:
    if environment.apply(local_rank=args.local_rank).world_size > 1:
        raise UserError("esft adapter reads a checkpoint of any number of ranks by itself: start it as one process")
    from moe_dist.methods.esft.adapter_run import adapter_of_run

    folder, step = adapter_of_run(args.source, args.out, selection=args.selection)
    print(f"wrote the adapter of step {step} to {folder}")
    return EXIT_OK
