"""Put adapters into their base model: a Hugging Face folder that plain transformers loads.

OUT is a copy of the base's folder in which the experts of the adapters have taken the place of the base's. Everything
else, tokenizer and generation configuration included, is the base to the bit. It is written file by file: no model is
ever in memory. An adapter that was made for another base model is refused; one without adapter_manifest.json, as those
of the ESFT repository, is checked by names and shapes alone.

Adapters of several tasks can be merged together where they hold different experts. Where two hold the same one, a
model cannot be both: that is an error that names the experts, unless --overlap last lets the later one on the command
line win.

examples:
  moe-dist esft merge adapters/intent merged --base models/DeepSeek-V2-Lite
  moe-dist esft merge adapters/intent adapters/law merged --base models/DeepSeek-V2-Lite --overlap last
"""

import argparse

from moe_dist.errors import EXIT_OK, UserError
from moe_dist.launch import environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="folders of adapters")
    parser.add_argument("out", metavar="OUT", help="folder to write; new or empty")
    parser.add_argument("--base", required=True, metavar="FOLDER", help="model folder that the adapters were made for")
    parser.add_argument(
        "--overlap",
        choices=("error", "last"),
        default="error",
        help="two adapters that hold the same expert: an error (default), or the last one wins",
    )


def run(args: argparse.Namespace) -> int:
    if environment.apply(local_rank=args.local_rank).world_size > 1:
        raise UserError("esft merge needs one plain process: start it without a launcher")
    from moe_dist.methods.esft.merge import merge_adapters
    from moe_dist.models.loading import resolve_folder

    folder = merge_adapters(args.adapters, args.out, base=resolve_folder(args.base), overlap=args.overlap)
    print(f"wrote the base model with {', '.join(args.adapters)} in it to {folder}")
    return EXIT_OK
