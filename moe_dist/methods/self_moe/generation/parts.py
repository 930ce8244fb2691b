"""What has been generated, batch by batch: files that are whole or absent, recognised by what they are the answer to.

A batch's file is used again when the same prompts would go to the same model with the same sampling and seed. So a run
that was killed goes on where it was, and one with other settings generates anew just what they change.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_dist.checkpoint.folders import wait_until_visible
from moe_dist.config.strict_json import write_json
from moe_dist.methods.self_moe.generation.backend import Completion
from moe_dist.methods.self_moe.generation.batches import Batch

VISIBLE_SECONDS = 60.0


@dataclass(frozen=True)
class Part:
    """The completions of a batch, in the order of its items. samples: of each item, the further ones."""

    completions: list[Completion]
    samples: list[tuple[str, ...]]
    versions: dict[str, str]


class Parts:
    """The parts in a folder, all by the model that `identity` describes."""

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.folder, self.identity = folder, identity

    def path(self, batch: Batch) -> Path:
        """The file of a batch."""
        return self.folder / f"{batch.name}.json"

    def has(self, batch: Batch) -> bool:
        """Whether the batch has been generated. Anything else in its place, a damaged file too, does not count."""
        return self._read(batch) is not None

    def write(self, batch: Batch, part: Part) -> None:
        """Store a batch, by a temporary file that is flushed and renamed."""
        rows = [
            {"id": item.id, "text": done.text, "finished": done.finished, "tokens": done.tokens, "samples": list(more)}
            for item, done, more in zip(batch.items, part.completions, part.samples, strict=True)
        ]
        write_json(
            self.path(batch), {"digest": batch.digest(self.identity), "versions": part.versions, "completions": rows}
        )

    def read(self, batch: Batch) -> Part:
        """A batch that some rank has stored; waits for a file system that shows it late."""
        wait_until_visible(self.path(batch), seconds=VISIBLE_SECONDS)
        part = self._read(batch)
        assert part is not None, f"{self.path(batch)} was changed by another process"
        return part

    def _read(self, batch: Batch) -> Part | None:
        try:
            tree = json.loads(self.path(batch).read_bytes())
            if tree["digest"] != batch.digest(self.identity):
                return None
            rows = tree["completions"]
            return Part(
                [Completion(row["text"], row["finished"], row["tokens"]) for row in rows],
                [tuple(row["samples"]) for row in rows],
                tree["versions"],
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None
