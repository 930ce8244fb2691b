"""Packing as the ESFT repository does it, for `data.packing: esft`: samples one after another until a row is full.

  - A sample that is longer than the room left in its row keeps its tail; what came before it is lost.
  - A sample that is appended to others loses its first token, the bos, with a probability of one in five.
  - A row is one sequence: positions count through, attention and loss cross from sample to sample. So where the chat
    template marks bos as learned, the end of one sample predicts the start of the next.

The draws are those of Python's `random` under the seed, as in the original, and depend on nothing else. Unlike there,
a row of padding alone, which it adds where the last row is full, is left out.
"""

import random
from collections.abc import Iterable, Iterator

import numpy as np

DROP_BOS = 0.2

Sample = tuple[np.ndarray, np.ndarray]  # ids int32 [n], loss bool [n]


def concatenate(samples: Iterable[Sample], seq_len: int, *, seed: int) -> Iterator[Sample]:
    """Rows of `seq_len` tokens, the last one shorter, from samples in their order: (ids int32 [n], loss bool [n])."""
    draws = random.Random(seed)
    row: list[Sample] = []
    filled = 0
    for ids, loss in samples:
        room = seq_len - filled
        ids, loss = ids[-room:], loss[-room:]
        if filled and draws.random() < DROP_BOS:
            ids, loss = ids[1:], loss[1:]
        row.append((ids, loss))
        filled += len(ids)
        if filled == seq_len:
            yield _joined(row)
            row, filled = [], 0
    if filled:
        yield _joined(row)


def _joined(row: list[Sample]) -> Sample:
    ids, loss = zip(*row, strict=True)
    return np.concatenate(ids), np.concatenate(loss)
