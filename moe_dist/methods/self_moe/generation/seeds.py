"""Seed files: about a hundred examples of a skill, written by people, from which the base model goes on by itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moe_dist.data.local_files import read_file
from moe_dist.data.records import RecordLog
from moe_dist.errors import UserError

FIELDS = "each record needs the strings 'instruction' and 'output', and may have 'input'"


@dataclass(frozen=True)
class Seed:
    """One example. instruction: the whole task, `input` included. id: the record's own, else its line in the file."""

    id: str
    instruction: str
    response: str
    origin: str


class StrictBook(RecordLog):
    """A record that cannot be read is an error at once: files of a hundred records are repaired, not thinned out."""

    def reject(self, kind: str, origin: str, why: str) -> None:
        raise UserError(f"{origin}: {why} ({kind})")


def read_seeds(path: str | Path, *, skill: str, least: int) -> list[Seed]:
    """The seeds in a JSON or JSONL file, in its order.

    Raises UserError with file and line for a record without its fields, one that stands twice, and with the file for
    fewer than `least` seeds.
    """
    seeds: list[Seed] = []
    seen: dict[str, dict[str, str]] = {"id": {}, "instruction": {}}
    for number, (value, origin) in enumerate(read_file(Path(path).expanduser(), StrictBook()), start=1):
        seed = _seed(value, origin, number)
        for name, taken in seen.items():
            known = taken.setdefault(getattr(seed, name), origin)
            if known != origin:
                raise UserError(f"{origin}: the same {name} as in {known}; a seed counts once, remove one of them")
        seeds.append(seed)
    if len(seeds) < least:
        raise UserError(
            f"{path}: {len(seeds)} seeds for {skill}, but a prompt shows {least} different ones; about 100 are usual"
        )
    return seeds


def _seed(value: object, origin: str, number: int) -> Seed:
    if not isinstance(value, dict):
        raise UserError(f"{origin}: a seed has to be an object, not {type(value).__name__}; {FIELDS}")
    texts = {}
    for name in ("instruction", "output", "input"):
        text = value.get(name)
        if text is None and name == "input":
            text = ""
        if text is None:
            there = ", ".join(map(str, list(value)[:8])) or "none"
            raise UserError(f"{origin}: no field '{name}' (fields here: {there}); {FIELDS}")
        if not isinstance(text, str):
            raise UserError(f"{origin}: '{name}' has to be a string, not {type(text).__name__}; {FIELDS}")
        texts[name] = text.strip()
        if not texts[name] and name != "input":
            raise UserError(f"{origin}: '{name}' is empty; {FIELDS}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can spell what UTF-8 cannot
            raise UserError(f"{origin}: character {error.start} of '{name}' is half of a surrogate pair") from None
    identifier = value.get("id")
    identifier = str(identifier) if isinstance(identifier, (str, int)) else str(number)
    instruction = "\n".join(filter(None, (texts["instruction"], texts["input"])))
    return Seed(identifier, instruction, texts["output"], origin)
