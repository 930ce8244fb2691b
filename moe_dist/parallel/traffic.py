"""What travels between ranks, counted: every exchange adds its rows and bytes to the counters that are switched on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Exchange:
    """One exchange as this rank sends it. Rows to itself do not travel and are not counted.

    what: the name that the sender gives it. rows: sent to each rank of its group, this one's set to zero.
    row_bytes: of one row.
    """

    what: str
    rows: tuple[int, ...]
    row_bytes: int

    @property
    def bytes(self) -> int:
        return sum(self.rows) * self.row_bytes


@dataclass
class Traffic:
    """The exchanges that this rank has sent while the counter was on."""

    exchanges: list[Exchange] = field(default_factory=list)

    def rows(self, what: str) -> int:
        """Rows sent to other ranks by the exchanges of that name."""
        return sum(sum(exchange.rows) for exchange in self.exchanges if exchange.what == what)

    def bytes(self, what: str | None = None) -> int:
        """Bytes sent to other ranks, by the exchanges of that name or by all."""
        return sum(exchange.bytes for exchange in self.exchanges if what in (None, exchange.what))


_counters: list[Traffic] = []


@contextlib.contextmanager
def count_traffic() -> Iterator[Traffic]:
    """`with count_traffic() as traffic:` counts what this rank sends inside, also in backward."""
    traffic = Traffic()
    _counters.append(traffic)
    try:
        yield traffic
    finally:
        _counters.remove(traffic)


def note(what: str, send: Sequence[int], rank: int, row_bytes: int) -> None:
    """An exchange: `send[r]` rows of `row_bytes` bytes to each rank r of the group, in which this one is `rank`."""
    if _counters:
        rows = tuple(0 if other == rank else count for other, count in enumerate(send))
        for counter in _counters:
            counter.exchanges.append(Exchange(what, rows, row_bytes))
