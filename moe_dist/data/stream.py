"""Rows of a source that is read as it comes, never stored.

Limits, beside a cached source: rows are packed and shuffled within a buffer of `BUFFER_ROWS` rows, not over the whole;
the state is the number of rows taken, and a resumed run reads and tokenises the source again up to there; every rank
reads the whole stream and takes its share of the rows. For runs that stop often, or read far, leave streaming off.
"""

from collections.abc import Iterator

import numpy as np

from moe_dist.data.fingerprint import digest
from moe_dist.data.packing import arrange, assemble, best_fit_decreasing, cut
from moe_dist.data.records import RecordLog
from moe_dist.data.sampler import shuffle
from moe_dist.errors import UserError

BUFFER_ROWS = 256


class StreamRows:
    """Rows by number, meant to be asked for in rising order; the stream starts again when it ends.

    rows[k] is a dict of int64 arrays [seq_len], the same for the same k however it is reached. Arguments as for
    `cached_rows`, and the seed of the shuffles.
    """

    def __init__(self, source, encoder, *, seq_len: int, packing: bool | str, seed: int = 0, on_bad: str = "fail"):
        self.source = source
        self.encoder = encoder
        self.seq_len = seq_len
        self.packing = packing
        self.seed = seed
        self.book = RecordLog(on_bad=on_bad)
        self.fingerprint = digest(["stream", BUFFER_ROWS, source.fingerprint(), encoder.identity, seq_len, packing])
        self._rows = self._read()
        self._next = 0
        self._last: tuple[int, dict] | None = None

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        if self._last is not None and self._last[0] == number:
            return self._last[1]
        if number < self._next:
            self._rows, self._next = self._read(), 0
        while self._next < number:
            next(self._rows)
            self._next += 1
        pieces = next(self._rows)
        self._next += 1
        self._last = (number, assemble(pieces, self.seq_len, self.encoder.pad_id))
        return self._last[1]

    def _read(self) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
        self.book = RecordLog(on_bad=self.book.on_bad)
        buffers = 0
        while True:
            before = buffers
            for buffer in self._buffers():
                rows = self._pack(buffer)
                for index in shuffle(len(rows), self.seed, buffers):
                    yield rows[index]
                buffers += 1
            if buffers == before:
                raise UserError(f"data source {self.source.name}: no document with a token to learn")

    def _buffers(self) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
        buffer, tokens = [], 0
        documents = self.encoder.encode(self.source.records(self.book), self.book)
        for ids, loss in arrange(documents, seq_len=self.seq_len, packing=self.packing, seed=self.seed):
            for start, length in cut(loss, self.seq_len):
                buffer.append((ids[start : start + length], loss[start : start + length]))
                tokens += length
            if (tokens if self.packing is True else len(buffer) * self.seq_len) >= BUFFER_ROWS * self.seq_len:
                yield buffer
                buffer, tokens = [], 0
        if buffer:
            yield buffer

    def _pack(self, buffer: list) -> list[list]:
        if self.packing is not True:
            return [[piece] for piece in buffer]
        groups = best_fit_decreasing(np.array([len(ids) for ids, _ in buffer]), self.seq_len)
        return [[buffer[piece] for piece in group] for group in groups]
