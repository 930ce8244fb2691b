"""Write a run or a checkpoint as a Hugging Face folder: weights, config, tokenizer.

Plain transformers loads the folder, and `model.path` of another run takes it. A run means its newest checkpoint.
Of a run with LoRA (lora.rank) it is the adapter that is written, as PEFT keeps it: PeftModel.from_pretrained loads it.

examples:
  moe-dist export runs/tiny exported
  moe-dist export runs/tiny/checkpoints/step-10 exported-10
"""

import argparse

from moe_dist.errors import EXIT_OK, UserError
from moe_dist.launch import environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="run folder, or one checkpoint of it")
    parser.add_argument("out", metavar="OUT", help="folder to write; new or empty")


def run(args: argparse.Namespace) -> int:
    if environment.apply(local_rank=args.local_rank).world_size > 1:
        raise UserError("export reads a checkpoint of any number of ranks by itself: start it as one plain process")
    from moe_dist.train.finished import export_run

    folder, step = export_run(args.source, args.out)
    print(f"wrote the model of step {step} to {folder}")
    return EXIT_OK
