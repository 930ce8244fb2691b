"""The tokenizer for runs without a hub: `model.tokenizer: offline`."""

from pathlib import Path

from moe_dist.data.corpora import prepare_quickstart

OFFLINE = "offline"
MEGABYTES = 4.0


def offline_tokenizer(cache_dir: str | None, *, vocab_size: int):
    """A fast transformers tokenizer of at most `vocab_size` entries, trained on the offline corpora.

    Trained once (some seconds) and kept under `cache_dir` (data.cache_dir; ~/.cache/moe_dist when None). Safe to call
    from several processes at once. UserError where it cannot be written, or vocab_size is below 262.
    """
    from transformers import AutoTokenizer

    folder = Path(cache_dir or "~/.cache/moe_dist").expanduser() / f"{OFFLINE}-tokenizer-{vocab_size}"
    manifest = prepare_quickstart(folder, megabytes=MEGABYTES, vocab_size=vocab_size)
    return AutoTokenizer.from_pretrained(str(folder / manifest["tokenizer"]))
