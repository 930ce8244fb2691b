"""Tokenised and packed sources on disk: built once, found by content, mapped into memory.

A cache entry is a folder named by the digest of everything that decides its content (records, tokenizer, chat
template, seq_len, packing, versions of reader and encoder), holding flat little-endian arrays and `meta.json`:

  tokens.bin   uint32 [N]    ids of all documents one after another
  loss.bin     uint8  [N]    1 where a token is to be learned
  start.bin    int64  [M]    first token of each piece of a row, rows one after another
  length.bin   int32  [M]    its tokens
  rows.bin     int64  [R+1]  pieces of row r: rows[r] .. rows[r+1]

It is written in a temporary folder beside, flushed to disk, and renamed: an entry exists whole or not at all. A lock
keeps several processes from doing the same work; where the file system has no locks, the first rename wins.
"""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np

from moe_dist.data.atomic import locked, new_folder, remove_debris, write_durably
from moe_dist.data.fingerprint import digest
from moe_dist.data.packing import arrange, assemble, best_fit_decreasing, cut
from moe_dist.data.records import RecordLog
from moe_dist.errors import UserError

# Bumped when the layout of the files, or how rows are made from documents, changes.
CACHE_VERSION = 1
ARRAYS = {"tokens": "<u4", "loss": "u1", "start": "<i8", "length": "<i4", "rows": "<i8"}


class PackedRows:
    """The rows of one source, read from a cache entry.

    len(rows) rows; rows[i] is a dict of int64 arrays [seq_len] (see `moe_dist.data.packing`).
    meta: counts (documents, tokens, label_tokens, rows, ...), the book of bad records, the identity.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text("utf-8"))
            arrays = {name: self._map(name) for name in ARRAYS}
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{self.folder}: the token cache is damaged ({error}); delete that folder to have it built anew"
            ) from error
        self.seq_len = self.meta["seq_len"]
        self.pad_id = self.meta["pad_id"]
        self._tokens, self._loss = arrays["tokens"], arrays["loss"]
        self._start, self._length, self._rows = arrays["start"], arrays["length"], arrays["rows"]

    def __len__(self) -> int:
        return len(self._rows) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        pieces = []
        for piece in range(int(self._rows[index]), int(self._rows[index + 1])):
            span = slice(int(self._start[piece]), int(self._start[piece]) + int(self._length[piece]))
            pieces.append((self._tokens[span].astype(np.int64), self._loss[span].astype(bool)))
        return assemble(pieces, self.seq_len, self.pad_id)

    def _map(self, name: str) -> np.ndarray:
        path = self.folder / f"{name}.bin"
        dtype, count = np.dtype(ARRAYS[name]), int(self.meta["elements"][name])
        if path.stat().st_size != count * dtype.itemsize:
            raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {count * dtype.itemsize}")
        return np.memmap(path, dtype=dtype, mode="r", shape=(count,)) if count else np.empty(0, dtype)


def cached_rows(
    root: Path, source, encoder, *, seq_len: int, packing: bool | str, seed: int = 0, on_bad: str = "fail"
) -> PackedRows:
    """The packed rows of a source, from the cache under `root`, built now if they are not there.

    source: has name, fingerprint(memo_dir) and records(book). encoder: has identity, pad_id and encode(records, book).
    packing: True for several documents in a row, best fit; False for one document, or one piece of a long one; "esft"
    as `moe_dist.data.concat` says, with draws by `seed`, on which nothing else depends.
    UserError for bad records under the policy "fail", a source without a usable document, a full disk.
    """
    root = Path(root).expanduser()
    identity = {
        "cache": CACHE_VERSION,
        "source": source.fingerprint(root / "files"),
        "encoder": encoder.identity,
        "seq_len": seq_len,
        "packing": [packing, seed] if packing == "esft" else packing,
        "pad_id": encoder.pad_id,
    }
    key = digest(identity)[:40]
    folder = root / key
    if not (folder / "meta.json").is_file():
        try:
            root.mkdir(parents=True, exist_ok=True)
            with locked(root / f"{key}.lock") as held:
                if held:
                    remove_debris(folder)
                if not (folder / "meta.json").is_file():
                    _build(folder, source, encoder, identity, packing, seed, on_bad)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                free = shutil.disk_usage(root).free
                raise UserError(
                    f"{root}: no space left for the token cache of '{source.name}' ({free:,} bytes free); "
                    "choose another data.cache_dir"
                ) from error
            raise UserError(f"{root}: the token cache cannot be written: {error}") from error
    rows = PackedRows(folder)
    bad = rows.meta["book"]["bad"]
    if on_bad == "fail" and bad:  # built by a run that was told to leave such records out
        places = [place for kind in bad for place in rows.meta["book"]["places"][kind]]
        raise UserError(
            f"data source {source.name}: {sum(bad.values())} unusable records, the first at {', '.join(places[:3])}; "
            "correct them, or leave them out with data.on_bad_record=skip"
        )
    return rows


def _build(folder: Path, source, encoder, identity: dict, packing: bool | str, seed: int, on_bad: str) -> None:
    with new_folder(folder, marker="meta.json") as temporary:
        book = RecordLog(on_bad=on_bad)
        meta = _write_arrays(temporary, source, encoder, book, identity["seq_len"], packing, seed)
        meta |= {
            "name": source.name,
            "seq_len": identity["seq_len"],
            "pad_id": identity["pad_id"],
            "book": book.as_dict(),
            "identity": identity,
        }
        write_durably(temporary / "meta.json", json.dumps(meta, indent=1).encode("utf-8"))


def _write_arrays(folder: Path, source, encoder, book: RecordLog, seq_len: int, packing: bool | str, seed: int) -> dict:
    starts: list[int] = []
    lengths: list[int] = []
    documents = tokens = stored = label_tokens = 0

    def counted():
        nonlocal documents, tokens
        for ids, loss in encoder.encode(source.records(book), book):
            documents, tokens = documents + 1, tokens + len(ids)
            yield ids, loss

    with open(folder / "tokens.bin", "wb") as token_file, open(folder / "loss.bin", "wb") as loss_file:
        for ids, loss in arrange(counted(), seq_len=seq_len, packing=packing, seed=seed):
            token_file.write(ids.astype(ARRAYS["tokens"]).tobytes())
            loss_file.write(loss.astype(ARRAYS["loss"]).tobytes())
            for start, length in cut(loss, seq_len):
                starts.append(stored + start)
                lengths.append(length)
                label_tokens += int(np.count_nonzero(loss[start + 1 : start + length]))
            stored += len(ids)
        for file in (token_file, loss_file):
            file.flush()
            os.fsync(file.fileno())
    if not starts:
        left_out = f"; {sum(book.bad.values())} records were left out" if book.bad else ""
        raise UserError(f"data source {source.name}: no document with a token to learn{left_out}")
    rows = best_fit_decreasing(lengths, seq_len) if packing is True else [[piece] for piece in range(len(lengths))]
    order = [piece for row in rows for piece in row]
    arrays = {
        "start": np.asarray(starts)[order],
        "length": np.asarray(lengths)[order],
        "rows": np.concatenate([[0], np.cumsum([len(row) for row in rows])]),
    }
    for name, values in arrays.items():
        write_durably(folder / f"{name}.bin", values.astype(ARRAYS[name]).tobytes())
    return {
        "documents": documents,
        "tokens": tokens,
        "label_tokens": label_tokens,
        "unused_tokens": tokens - sum(lengths),
        "rows": len(rows),
        "fill": sum(lengths) / (len(rows) * seq_len),
        "elements": {"tokens": stored, "loss": stored, **{name: len(values) for name, values in arrays.items()}},
    }
