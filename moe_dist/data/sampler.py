"""The order of training rows: a pure function of a few integers, the same on any number of ranks.

Draw number t of a run (t = 0, 1, 2, ...) is one row of one source:
  - which source: a fixed cycle of `CYCLE` draws in which every source has its share of the places, spread as evenly
    as can be (each place goes to the source that lags its share most);
  - which row: the k-th draw of a source is entry k mod n of its shuffle number k div n, so that a source is gone
    through once before any of its rows comes again, whatever the batch size.
An optimizer step with a global batch of G rows takes the next G draws. Ranks and micro-batches only cut those G rows
up, so the state is one position, and a run goes on with another number of ranks, or another G, with no row skipped
or repeated.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from moe_dist.errors import UserError

# Shares are kept to one part in CYCLE; a source always has at least one place.
CYCLE = 4096


class IndexSampler:
    """Deterministic, resumable draws from weighted sources.

    rows: rows of each source; None for a stream, whose k-th draw is its k-th row.
    weights: relative share of each source, equal when None. seed: of the shuffles. fingerprint: of the data, compared
    on resume. UserError for an empty source, or weights that do not fit.
    """

    def __init__(
        self,
        rows: Sequence[int | None],
        *,
        weights: Sequence[float] | None = None,
        seed: int = 0,
        fingerprint: str = "",
    ):
        self.rows = list(rows)
        self.seed = int(seed)
        self.fingerprint = fingerprint
        self.position = 0
        if not self.rows or any(count == 0 for count in self.rows):
            raise UserError(f"every data source needs at least one row, got {self.rows}")
        self._cycle = weighted_cycle([1.0] * len(self.rows) if weights is None else weights, len(self.rows))
        # _before[i, j]: how many of the first j places of the cycle are source i's
        self._before = np.zeros((len(self.rows), len(self._cycle) + 1), dtype=np.int64)
        for source in range(len(self.rows)):
            self._before[source, 1:] = np.cumsum(self._cycle == source)
        self._shuffles: dict[int, tuple[int, np.ndarray]] = {}

    def next_batch(self, size: int) -> list[tuple[int, int]]:
        """The next `size` draws as (source, row); moves the position on."""
        batch = self.batch_at(self.position, size)
        self.position += size
        return batch

    def batch_at(self, position: int, size: int) -> list[tuple[int, int]]:
        """Draws position .. position + size - 1, without moving."""
        return [self._draw(position + offset) for offset in range(size)]

    def epochs(self) -> list[float]:
        """How often each source has been gone through so far (rows taken, for a stream)."""
        return [self._drawn(source, self.position) / (count or 1) for source, count in enumerate(self.rows)]

    def state_dict(self) -> dict:
        """{"seed": int, "position": int, "fingerprint": str}: all that a resumed run needs."""
        return {"seed": self.seed, "position": self.position, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a saved state; UserError if it belongs to other data or another seed."""
        if state["fingerprint"] != self.fingerprint:
            raise UserError(
                "the training data is not that of the checkpoint: its content, tokenizer, template, seq_len, packing "
                f"or weights differ (fingerprint {state['fingerprint'][:12]} then, {self.fingerprint[:12]} now)"
            )
        if int(state["seed"]) != self.seed:
            raise UserError(f"the checkpoint's data order has seed {state['seed']}, the run has {self.seed}")
        self.position = int(state["position"])

    def _drawn(self, source: int, position: int) -> int:
        cycles, place = divmod(position, len(self._cycle))
        return int(cycles * self._before[source, -1] + self._before[source, place])

    def _draw(self, position: int) -> tuple[int, int]:
        source = int(self._cycle[position % len(self._cycle)])
        k = self._drawn(source, position)
        count = self.rows[source]
        if count is None:
            return source, k
        epoch, place = divmod(k, count)
        return source, int(self._shuffle(source, epoch)[place])

    def _shuffle(self, source: int, epoch: int) -> np.ndarray:
        kept = self._shuffles.get(source)
        if kept is None or kept[0] != epoch:
            kept = (epoch, shuffle(self.rows[source], self.seed, source, epoch))
            self._shuffles[source] = kept
        return kept[1]


def shuffle(count: int, *key: int) -> np.ndarray:
    """A permutation of range(count), int64, that depends on the key alone.

    Sorts the raw output of Philox, which numpy keeps the same in all versions (unlike what Generator makes of it).
    """
    name = hashlib.sha256(repr(tuple(int(part) for part in key)).encode("ascii")).digest()
    bits = np.random.Philox(key=int.from_bytes(name[:16], "little")).random_raw(count)
    return np.argsort(bits, kind="stable")


def weighted_cycle(weights: Sequence[float], sources: int) -> np.ndarray:
    """The cycle of draws: int64 array of source indices, every source in it about weight / sum of the times."""
    weights = np.asarray(weights, dtype=np.float64)
    if len(weights) != sources or not np.all(np.isfinite(weights)) or not np.all(weights > 0):
        raise UserError(f"weights must be {sources} positive numbers, one for each data source, got {list(weights)}")
    if sources > CYCLE:
        raise UserError(f"at most {CYCLE} data sources can be mixed, got {sources}")
    if np.all(weights == weights[0]):
        return np.arange(sources)
    exact = weights / weights.sum() * CYCLE
    places = np.maximum(1, np.round(exact)).astype(np.int64)
    total = int(places.sum())
    # The source that lags its share most comes next; ties go to the first.
    cycle = np.empty(total, dtype=np.int64)
    lag = np.zeros(sources, dtype=np.int64)
    for place in range(total):
        lag += places
        cycle[place] = chosen = int(np.argmax(lag))
        lag[chosen] -= total
    return cycle


def rank_share(batch: Sequence, *, rank: int, ranks: int, micro_batch: int) -> list[list]:
    """The micro-batches of one data rank: lists of `micro_batch` entries, None where there is nothing left.

    Micro-batch a of rank r is entries a·D·m + r·m .. + m (D ranks, micro-batches of m), so all ranks have the same
    number of micro-batches, of the same shape, and together every entry once.
    """
    assert 0 <= rank < ranks
    stride = ranks * micro_batch
    shares = []
    for start in range(0, len(batch), stride):
        first = start + rank * micro_batch
        share = list(batch[first : first + micro_batch])
        shares.append(share + [None] * (micro_batch - len(share)))
    return shares
