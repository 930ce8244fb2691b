"""One iterable of records, whatever the text lies in: local files, a hub dataset, an offline corpus."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from moe_dist.data.fingerprint import digest, file_digest
from moe_dist.data.local_files import kind_of, list_files, read_file
from moe_dist.data.records import MAX_DOCUMENT_BYTES, Record, RecordLog, to_record
from moe_dist.errors import UserError

# Bumped when the same bytes would give other records: caches and fingerprints of before then no longer match.
READER_VERSION = 1
# Duplicates are looked for among this many ids (they are kept in memory).
IDS_KEPT = 5_000_000


@dataclass(frozen=True)
class TextSource:
    """A named source of documents; iterate with `records(book)`, as often as wanted, in a fixed order.

    Exactly one of path (local file or folder) and hub (dataset name, or a folder that `datasets` understands) is set.
    part: "all", or "train" / "held_out": the two sides of a split by document, where the held-out side gets
    `held_out_fraction` of the documents. The side depends on the document's content alone, so equal documents
    are never on both sides.
    limit: at most this many usable documents, before the split.
    """

    name: str
    path: str | None = None
    hub: str | None = None
    subset: str | None = None
    revision: str | None = None
    split: str = "train"
    kind: str = "auto"
    field_name: str | None = None
    streaming: bool = False
    limit: int | None = None
    max_bytes: int = MAX_DOCUMENT_BYTES
    part: str = "all"
    held_out_fraction: float = 0.0

    def records(self, book: RecordLog) -> Iterator[Record]:
        """Yield the usable records in order; the others go to `book` (which raises under the policy "fail")."""
        taken = 0
        seen_ids: set[int] = set()
        values = self._hub_values() if self.hub else self._local_values(book)
        for value, origin in values:
            record = to_record(
                value, origin, book, kind=self.kind, field_name=self.field_name, max_bytes=self.max_bytes
            )
            if record is None:
                continue
            taken += 1
            self._note_duplicate(value, origin, seen_ids, book)
            if self.part == "all" or (self.part == "held_out") == self._is_held_out(record):
                yield record
            if taken == self.limit:
                return

    def split_held_out(self, fraction: float) -> tuple["TextSource", "TextSource"]:
        """(training side, held-out side) of this source."""
        return (
            replace(self, part="train", held_out_fraction=fraction),
            replace(self, part="held_out", held_out_fraction=fraction),
        )

    def fingerprint(self, memo_dir: Path | None = None) -> str:
        """Hex digest of everything that decides which records come, in which order.

        Local files count by their content (digests are remembered in `memo_dir` by path, size and time); a hub
        dataset by the fingerprint that `datasets` gives it, or when streamed by its name and revision.
        """
        if self.hub:
            content = {"hub": self.hub, "revision": self.revision}
            if not self.streaming:
                content = {"datasets": self._hub_dataset()._fingerprint}
        else:
            root = Path(self.path)
            base = root if root.is_dir() else root.parent
            content = [[file.relative_to(base).as_posix(), file_digest(file, memo_dir)] for file in list_files(root)]
        return digest(
            {
                "reader": READER_VERSION,
                "content": content,
                "choice": [self.subset, self.split, self.kind, self.field_name, self.limit, self.max_bytes],
                "part": [self.part, self.held_out_fraction],
            }
        )

    def check(self) -> None:
        """Raise UserError for what can be known without reading: a missing path, streaming that cannot be."""
        if self.hub:
            return
        files = list_files(Path(self.path))
        if self.streaming and any(kind_of(file) != "parquet" for file in files):
            raise UserError(f"{self.path}: streaming needs a hub or a Parquet source; JSON and text are cached")

    def _local_values(self, book: RecordLog) -> Iterator[tuple[object, str]]:
        for file in list_files(Path(self.path)):
            yield from read_file(file, book, max_bytes=self.max_bytes)

    def _hub_values(self) -> Iterator[tuple[object, str]]:
        place = f"{self.hub}{'/' + self.subset if self.subset else ''}:{self.split}"
        for index, row in enumerate(self._hub_dataset()):
            yield row, f"{place}:row {index}"

    def _hub_dataset(self):
        from datasets import load_dataset

        try:
            return load_dataset(
                self.hub, self.subset, split=self.split, revision=self.revision, streaming=self.streaming
            )
        except Exception as error:  # no network, no such dataset, no such split: many kinds of exception
            raise UserError(f"data source {self.name}: cannot load '{self.hub}' from the hub: {error}") from error

    def _is_held_out(self, record: Record) -> bool:
        content = record.text if record.text is not None else json.dumps(record.messages, sort_keys=True)
        draw = int.from_bytes(hashlib.sha256(content.encode("utf-8")).digest()[:8], "big") / 2**64
        return draw < self.held_out_fraction

    @staticmethod
    def _note_duplicate(value: dict, origin: str, seen: set[int], book: RecordLog) -> None:
        identifier = value.get("id")
        if isinstance(identifier, (str, int)):
            key = hash((type(identifier), identifier))
            if key in seen:
                book.note("duplicate_id", origin)
            elif len(seen) < IDS_KEPT:
                seen.add(key)


def local_source(path: str | Path, *, name: str | None = None, split: str = "train", **options) -> TextSource:
    """A TextSource of a local file or folder, checked to exist. options: fields of TextSource."""
    if split != "train":
        raise UserError(
            f"{path}: 'split' chooses within a hub dataset or a corpus; for local data give the path of the "
            f"files that make up '{split}'"
        )
    path = Path(path).expanduser()
    source = TextSource(name=name or path.name.split(".")[0], path=str(path), **options)
    source.check()
    return source


def hub_source(hub: str, *, name: str | None = None, **options) -> TextSource:
    """A TextSource of a hub dataset; nothing is loaded before its records are asked for."""
    return TextSource(name=name or hub.rstrip("/").split("/")[-1], hub=hub, **options)
