"""Held-out items to evaluate on, and texts to compare them with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_dist.data.local_files import read_file
from moe_dist.errors import UserError
from moe_dist.methods.self_moe.generation.seeds import StrictBook

FIELDS = "an item needs the string 'instruction', may have 'input', and has 'output' (a string or a list) or 'test'"


@dataclass(frozen=True)
class Item:
    """One question. answers: any of them is right. test: program text that checks a program; None for exact match."""

    id: str
    question: str
    answers: tuple[str, ...]
    test: str | None
    origin: str


def read_items(path: str | Path) -> list[Item]:
    """The items in a JSON or JSONL file, in its order.

    Raises UserError with file and line for a record without its fields or an id that stands twice, and with the file
    where it holds none.
    """
    items, seen = [], {}
    for number, (value, origin) in enumerate(read_file(Path(path).expanduser(), StrictBook()), start=1):
        item = _item(value, origin, number)
        known = seen.setdefault(item.id, origin)
        if known != origin:
            raise UserError(f"{origin}: the same id {item.id!r} as in {known}")
        items.append(item)
    if not items:
        raise UserError(f"{path}: holds no items; {FIELDS}")
    return items


def read_texts(path: str | Path) -> Iterator[tuple[str, str, str]]:
    """(question, answer, origin) of seeds, held-out items or chat records. Raises UserError for anything else."""
    for value, origin in read_file(Path(path).expanduser(), StrictBook()):
        messages = value.get("messages") if isinstance(value, dict) else None
        if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
            sides = {"user": "", "assistant": ""}
            for message in messages:
                role, text = message.get("role"), message.get("content")
                if role in sides and isinstance(text, str):
                    sides[role] = f"{sides[role]}\n{text}".strip()
            yield sides["user"], sides["assistant"], origin
        else:
            item = _item(value, origin, 0)
            yield item.question, "\n".join(item.answers), origin


def _item(value: object, origin: str, number: int) -> Item:
    if not isinstance(value, dict):
        raise UserError(f"{origin}: an item has to be an object, not {type(value).__name__}; {FIELDS}")
    question = [value.get("instruction"), value.get("input") or ""]
    if not all(isinstance(part, str) for part in question) or not question[0].strip():
        raise UserError(f"{origin}: no text under 'instruction' (fields here: {_fields(value)}); {FIELDS}")
    answers, test = value.get("output"), value.get("test")
    answers = [] if answers is None else [answers] if isinstance(answers, (str, int, float)) else answers
    if not isinstance(answers, list) or not all(isinstance(a, (str, int, float)) for a in answers):
        raise UserError(f"{origin}: 'output' has to be a string or a list of strings; {FIELDS}")
    if test is not None and (not isinstance(test, str) or not test.strip()):
        raise UserError(f"{origin}: 'test' has to be the text of a program; {FIELDS}")
    if not answers and test is None:
        raise UserError(f"{origin}: neither 'output' nor 'test' (fields here: {_fields(value)}); {FIELDS}")
    identifier = value.get("id")
    identifier = str(identifier) if isinstance(identifier, (str, int)) else str(number)
    # An instruction alone stays as it is: a program that is to be continued ends where its last line ends.
    text = "\n".join(part.strip() for part in question) if question[1].strip() else question[0]
    return Item(identifier, text, tuple(map(str, answers)), test, origin)


def _fields(value: dict) -> str:
    return ", ".join(map(str, list(value)[:8])) or "none"
