"""Whether two models mean the same tokens by the same ids: as many of them does not make them the same."""

from __future__ import annotations

from pathlib import Path

from moe_dist.errors import UserError

FILE = "tokenizer.json"


def check_same_tokens(what: str, folder: Path, first: Path) -> None:
    """Raise UserError where the tokenizers of two model folders give an id to different tokens.

    what: the two models in words. Nothing is known, and nothing refused, where a folder has no tokenizer.json.
    """
    if not (folder / FILE).is_file() or not (first / FILE).is_file():
        return
    if (folder / FILE).read_bytes() == (first / FILE).read_bytes():
        return
    theirs, ours = _tokens(folder), _tokens(first)
    differing = sorted(number for number in theirs.keys() | ours.keys() if theirs.get(number) != ours.get(number))
    if differing:
        number = differing[0]
        raise UserError(
            f"{what} have different vocabularies: {len(differing):,} tokens differ, such as {number}, which is "
            f"{theirs.get(number)!r} and {ours.get(number)!r}; experts have to be trained from the seed with its "
            "tokenizer"
        )


def _tokens(folder: Path) -> dict[int, str]:
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_file(str(folder / FILE)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{folder / FILE}: cannot be read: {error}") from None
    return {number: token for token, number in found.items()}
