"""Write one expert of a mixture by itself.

--form peft is the adapter: PeftModel.from_pretrained loads it over the base, as vLLM and others do. --form merged is
the expert in its base's weights: a dense Hugging Face model without LoRA, for anything that serves such models.
The mixture as a whole needs no export: it is a Hugging Face folder, and `moe-dist export RUN OUT` gives one of a run
that has trained its router.

examples:
  moe-dist self-moe export mixture math-adapter --expert math
  moe-dist self-moe export mixture math-model --expert math --form merged
"""

import argparse

from moe_dist.errors import EXIT_OK, UserError
from moe_dist.launch import environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mixture", metavar="MIXTURE", help="folder or hub name of a mixture")
    parser.add_argument("out", metavar="OUT", help="folder to write; new or empty")
    parser.add_argument("--expert", required=True, metavar="NAME", help="the expert's name in the mixture")
    parser.add_argument("--form", choices=("peft", "merged"), default="peft", help="what to write (peft)")


def run(args: argparse.Namespace) -> int:
    if environment.apply(local_rank=args.local_rank).world_size > 1:
        raise UserError("self-moe export runs as one plain process")
    from moe_dist.methods.self_moe.composition.export import export_expert

    print(f"wrote {export_expert(args.mixture, args.expert, args.out, form=args.form)}")
    return EXIT_OK
