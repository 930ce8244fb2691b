"""What a source yields, and the book kept about the records that could not be used."""

import logging
from dataclasses import dataclass, field

from moe_dist.errors import UserError

log = logging.getLogger(__name__)

MAX_DOCUMENT_BYTES = 8_000_000
PLACES_KEPT = 20


@dataclass(frozen=True)
class Record:
    """One document: `text`, or the `messages` of a conversation (the other is None), and where it came from.

    origin: "file:line" for JSONL and text, "file[index]" for a JSON array, "file:row n" for Parquet,
    "name:split:row n" for a hub dataset.
    """

    text: str | None
    messages: list[dict] | None
    origin: str


@dataclass
class RecordLog:
    """Counts and places of records that are unusable (`bad`) or were only tidied up (`noted`).

    on_bad: "fail" raises a UserError at the first unusable record; "skip" counts it and goes on.
    Kinds of bad records: corrupt_json, invalid_utf8, corrupt_file, too_large, missing_field, wrong_type, empty.
    Kinds of notes: bom, crlf, blank_line, duplicate_id. Those records are used.
    """

    on_bad: str = "fail"
    bad: dict[str, int] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self):
        if self.on_bad not in ("fail", "skip"):
            raise UserError(f"on_bad must be 'fail' or 'skip', not {self.on_bad!r}")

    def reject(self, kind: str, origin: str, why: str) -> None:
        """Count an unusable record; raises UserError under the policy "fail"."""
        self._add(self.bad, kind, origin)
        if self.on_bad == "fail":
            raise UserError(
                f"{origin}: {why} ({kind}). Correct the record, or leave such records out with data.on_bad_record=skip"
            )

    def note(self, kind: str, origin: str) -> None:
        """Count something that was tidied up without harm."""
        self._add(self.noted, kind, origin)

    def _add(self, counts: dict[str, int], kind: str, origin: str) -> None:
        counts[kind] = counts.get(kind, 0) + 1
        places = self.places.setdefault(kind, [])
        if len(places) < PLACES_KEPT:
            places.append(origin)

    def as_dict(self) -> dict:
        """Plain dict for JSON: {"bad": {kind: n}, "noted": {kind: n}, "places": {kind: [origin, ...]}}."""
        return {"bad": dict(self.bad), "noted": dict(self.noted), "places": dict(self.places)}


def describe_log(book: dict, name: str) -> list[str]:
    """One line per kind of a `RecordLog.as_dict()`, with the first places, for a run's log."""
    lines = []
    for group, verb in (("bad", "left out"), ("noted", "tidied up")):
        for kind, count in sorted(book[group].items()):
            places = ", ".join(book["places"].get(kind, [])[:3])
            lines.append(f"{name}: {count} x {kind} {verb} (first: {places})")
    return lines


def to_record(
    value: object,
    origin: str,
    book: RecordLog,
    *,
    kind: str = "auto",
    field_name: str | None = None,
    max_bytes: int = MAX_DOCUMENT_BYTES,
) -> Record | None:
    """Check one parsed value and make a Record of it, or None if it was rejected (and policy is "skip").

    kind: "text", "chat" or "auto". field_name: where the document lies; when None, `messages` for a conversation and
    `text` for a text, and "auto" takes the first of the two that is there. Under a field name "auto" takes a list for
    a conversation, a string for a text.
    """
    if not isinstance(value, dict):
        book.reject("wrong_type", origin, f"a record must be an object with fields, not {type(value).__name__}")
        return None
    if field_name is None:
        if kind == "auto":
            kind = "chat" if "messages" in value else "text"
        field_name = "messages" if kind == "chat" else "text"
    if value.get(field_name) is None:
        present = ", ".join(list(value)[:8]) or "none"
        book.reject("missing_field", origin, f"no field '{field_name}' (fields here: {present})")
        return None
    document = value[field_name]
    if kind == "chat" or (kind == "auto" and isinstance(document, list)):
        return _chat_record(document, field_name, origin, book, max_bytes)
    return _text_record(document, field_name, origin, book, max_bytes)


def _text_record(text, field_name, origin, book, max_bytes) -> Record | None:
    if not isinstance(text, str):
        book.reject("wrong_type", origin, f"'{field_name}' must be a string, not {type(text).__name__}")
    elif not text.strip():
        book.reject("empty", origin, "the document is empty")
    elif _fits([text], origin, book, max_bytes):
        return Record(text=text, messages=None, origin=origin)
    return None


def _chat_record(messages, field_name, origin, book, max_bytes) -> Record | None:
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        why = f"'{field_name}' must be a list of objects with the strings 'role' and 'content'"
        book.reject("wrong_type", origin, why)
    elif not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        book.reject("empty", origin, "the conversation has no answer of the assistant")
    elif _fits([m["content"] for m in messages], origin, book, max_bytes):
        return Record(text=None, messages=messages, origin=origin)
    return None


def _fits(texts: list[str], origin: str, book: RecordLog, max_bytes: int) -> bool:
    try:
        size = sum(len(text.encode("utf-8")) for text in texts)
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON can spell and UTF-8 cannot
        book.reject("invalid_utf8", origin, f"character {error.start} is half of a surrogate pair")
        return False
    if size > max_bytes:
        book.reject("too_large", origin, f"the document has {size:,} bytes, the most is {max_bytes:,}")
        return False
    return True
