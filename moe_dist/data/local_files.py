"""Readers of local files that know the line of every record.

JSON, JSONL and text are read here rather than through `datasets`, whose readers report a broken block, not the line
in it; Parquet goes through `datasets`.
"""

import gzip
import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from moe_dist.data.records import MAX_DOCUMENT_BYTES, RecordLog
from moe_dist.errors import UserError

UTF8_BOM = b"\xef\xbb\xbf"
# Plain text larger than this is read as several documents, cut at line ends.
TEXT_PIECE_BYTES = 1_000_000

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")
PARQUET_SUFFIXES = (".parquet",)


def kind_of(path: Path) -> str | None:
    """ "json", "text" or "parquet" by the file's suffix (before a final .gz), None for an unknown one."""
    name = path.name.lower()
    suffix = Path(name[:-3] if name.endswith(".gz") else name).suffix
    for kind, suffixes in (("json", JSON_SUFFIXES), ("text", TEXT_SUFFIXES), ("parquet", PARQUET_SUFFIXES)):
        if suffix in suffixes:
            return kind
    return None


def list_files(path: Path) -> list[Path]:
    """The data files of a file or folder, sorted by relative path; UserError where there is none.

    Hidden files and folders, and files of unknown suffix, are passed over inside a folder.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    known = ", ".join((*JSON_SUFFIXES, *PARQUET_SUFFIXES, *TEXT_SUFFIXES))
    if path.is_file():
        if kind_of(path) is None:
            raise UserError(f"{path}: unknown kind of file; known are {known}, plain or .gz")
        return [path]
    files = [
        file
        for file in sorted(path.rglob("*"), key=lambda p: p.relative_to(path).as_posix())
        if file.is_file() and kind_of(file) and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not files:
        raise UserError(f"{path}: the folder holds no data files; known are {known}, plain or .gz")
    return files


def read_file(path: Path, book: RecordLog, *, max_bytes: int = MAX_DOCUMENT_BYTES) -> Iterator[tuple[object, str]]:
    """Yield (parsed value, origin) for every record of a local file; unusable ones go to `book`.

    Text files yield {"text": ...}. Parquet yields one dict a row.
    """
    kind = kind_of(path)
    if kind == "parquet":
        yield from _read_parquet(path)
    elif kind == "text":
        yield from _read_text(path, book, max_bytes)
    elif _is_json_array(path):
        yield from _read_json_array(path, book)
    else:
        yield from _read_jsonl(path, book, max_bytes)


def _open(path: Path):
    try:
        return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be opened: {error.strerror or error}") from error


def _lines(path: Path, book: RecordLog, limit: int) -> Iterator[tuple[bytes, int]]:
    """(line without its end, line number from 1); lines over `limit` bytes are rejected unread."""
    with _open(path) as file:
        for number in count(1):
            origin = f"{path}:{number}"
            try:
                line = file.readline(limit)
                whole = len(line) < limit or line.endswith(b"\n")
                while not whole:  # drop the rest of an oversized line without holding it
                    rest = file.readline(limit)
                    if not rest or rest.endswith(b"\n"):
                        break
            except (OSError, EOFError) as error:  # a cut or damaged .gz, or a failing disk
                book.reject("corrupt_file", origin, f"the file cannot be read further: {error}")
                return
            if not line:
                return
            if not whole:
                book.reject("too_large", origin, f"the line has more than {limit:,} bytes")
                continue
            if number == 1 and line.startswith(UTF8_BOM):
                book.note("bom", origin)
                line = line[len(UTF8_BOM) :]
            if line.endswith(b"\r\n"):
                book.note("crlf", origin)
            yield line.rstrip(b"\r\n"), number


def _decode(line: bytes, origin: str, book: RecordLog) -> str | None:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        book.reject("invalid_utf8", origin, f"byte {error.start} of the line is not UTF-8")
        return None


def _read_jsonl(path: Path, book: RecordLog, max_bytes: int) -> Iterator[tuple[object, str]]:
    # JSON spells one byte of text with up to six ("\u0041"); beside the text there may be other fields.
    for line, number in _lines(path, book, limit=6 * max_bytes + 1_000_000):
        origin = f"{path}:{number}"
        if not line.strip():
            book.note("blank_line", origin)
            continue
        text = _decode(line, origin, book)
        if text is None:
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            book.reject("corrupt_json", origin, f"not valid JSON: {error}")
            continue
        yield value, origin


def _is_json_array(path: Path) -> bool:
    if ".json" not in path.suffixes[-2:]:  # .jsonl is one value a line, whatever the first one is
        return False
    with _open(path) as file:
        try:
            start = file.read(4096)
        except (OSError, EOFError):
            return False  # the line reader locates the damage
    return start.removeprefix(UTF8_BOM).lstrip()[:1] == b"["


def _read_json_array(path: Path, book: RecordLog) -> Iterator[tuple[object, str]]:
    try:
        with _open(path) as file:
            values = json.loads(file.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        book.reject("invalid_utf8", str(path), f"byte {error.start} of the file is not UTF-8")
        return
    except json.JSONDecodeError as error:
        book.reject("corrupt_json", f"{path}:{error.lineno}", f"not valid JSON: {error}")
        return
    except (OSError, EOFError, RecursionError) as error:
        book.reject("corrupt_file", str(path), f"the file cannot be read: {error}")
        return
    for index, value in enumerate(values):
        yield value, f"{path}[{index}]"


def _read_text(path: Path, book: RecordLog, max_bytes: int) -> Iterator[tuple[object, str]]:
    piece: list[str] = []
    size, first, pieces = 0, 1, 0
    for line, number in _lines(path, book, limit=max_bytes):
        text = _decode(line, f"{path}:{number}", book)
        if text is None:
            continue
        if not piece:
            first = number
        piece.append(text)
        size += len(line) + 1
        if size >= TEXT_PIECE_BYTES:
            yield {"text": "\n".join(piece)}, f"{path}:{first}"
            piece, size, pieces = [], 0, pieces + 1
    if piece or not pieces:  # an empty file is one empty document, for the policy to judge
        yield {"text": "\n".join(piece)}, f"{path}:{first}"


def _read_parquet(path: Path) -> Iterator[tuple[object, str]]:
    from datasets import load_dataset

    try:
        rows = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        for index, row in enumerate(rows):
            yield row, f"{path}:row {index}"
    except Exception as error:  # pyarrow and datasets raise many kinds for a damaged file
        raise UserError(f"{path}: cannot be read as Parquet: {error}") from error
