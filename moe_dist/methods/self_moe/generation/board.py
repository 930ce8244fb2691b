"""Counters that all ranks share: which batch is next, and how far everybody is."""

from __future__ import annotations

import os
import threading
from datetime import timedelta

import torch.distributed as dist

TIMEOUT = timedelta(minutes=10)


class Board:
    """Named whole numbers, all zero at first. Collective to make; then any rank may use it at any time.

    A rank that asks for the next batch gets one that nobody else has, so a slow batch delays nobody but its own rank.
    """

    def __init__(self):
        self._store, self._lock, self._counts = None, threading.Lock(), {}
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        place: list = [None]
        if dist.get_rank() == 0:
            host = os.environ.get("MASTER_ADDR", "127.0.0.1")
            self._store = dist.TCPStore(host, 0, None, is_master=True, timeout=TIMEOUT, wait_for_workers=False)
            place = [(host, self._store.port)]
        dist.broadcast_object_list(place, src=0)
        if self._store is None:
            host, port = place[0]
            self._store = dist.TCPStore(host, port, None, is_master=False, timeout=TIMEOUT, wait_for_workers=False)

    def add(self, name: str, amount: int = 1) -> int:
        """Add to a counter; its new value."""
        with self._lock:
            if self._store is not None:
                return self._store.add(name, amount)
            self._counts[name] = self._counts.get(name, 0) + amount
            return self._counts[name]

    def read(self, name: str) -> int:
        """A counter's value."""
        return self.add(name, 0)
