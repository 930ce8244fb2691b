"""A save whose bytes are written while training goes on.

What is saved is copied to host memory first, so that the next step may change it. A thread of each rank then writes its
files and reads them back; it takes part in no collective. The checkpoint appears when all ranks come together again to
commit it, so that a kill before that leaves the one before.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_dist.checkpoint.errors import CheckpointError
from moe_dist.checkpoint.format import FileRecord, FrozenBase, TensorInfo
from moe_dist.checkpoint.fragments import Fragment
from moe_dist.checkpoint.group import SINGLE, Group, all_or_none
from moe_dist.checkpoint.verify import file_sha256
from moe_dist.checkpoint.writer import begin, finish


class BackgroundSave:
    """A save that has begun. `step` is the step that it is of.

    Making one is collective and takes what `save` takes; it costs this rank's fragments once in host memory, until
    `commit`. Raises CheckpointError on every rank alike, with nothing left behind: a disk without the room for it is
    found here already.
    """

    def __init__(
        self,
        root: str | Path,
        step: int,
        fragments: Mapping[str, Sequence[Fragment]],
        trainer_state: Mapping[str, Any],
        *,
        catalogue: Mapping[str, TensorInfo],
        frozen: FrozenBase | None = None,
        group: Group = SINGLE,
    ) -> None:
        self.step = step
        copies: dict[str, list[Fragment]] = {}
        all_or_none(group, lambda: copies.update(_on_host(fragments)), what=f"checkpoint step {step} was not saved")
        self._begun = begin(root, step, copies, trainer_state, catalogue=catalogue, frozen=frozen, group=group)
        self._records: Future[dict[str, FileRecord]] = Future()
        threading.Thread(target=self._write, name=f"save of step {step}", daemon=True).start()

    @property
    def done(self) -> bool:
        """Whether this rank's thread has ended, well or badly."""
        return self._records.done()

    @property
    def failed(self) -> bool:
        """Whether it has ended badly; `commit` then raises."""
        return self.done and self._records.exception() is not None

    def commit(self) -> Path:
        """Collective: wait for the threads of all ranks, then make the checkpoint appear; returns its folder.

        Raises CheckpointError on every rank alike where a thread of any of them has failed, as `save` does.
        """
        return finish(self._begun, self._records.result)

    def _write(self) -> None:
        try:
            records = self._begun.write()
            for name, record in records.items():
                if file_sha256(self._begun.folder / name) != record.sha256:
                    raise CheckpointError(f"{self._begun.folder / name} reads back otherwise than it was written")
            self._records.set_result(records)
        except BaseException as error:  # told to all ranks in `commit`
            self._records.set_exception(error)


def _on_host(fragments: Mapping[str, Sequence[Fragment]]) -> dict[str, list[Fragment]]:
    return {
        kind: [replace(piece, tensor=piece.tensor.detach().to("cpu", copy=True)) for piece in pieces]
        for kind, pieces in fragments.items()
    }
