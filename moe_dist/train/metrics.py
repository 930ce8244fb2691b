"""Where figures go: metrics.jsonl always, lines or a bar for people, Weights & Biases if asked for."""

from __future__ import annotations

import json
import math
import sys
import time
import uuid
from pathlib import Path

from moe_dist.config.save import to_dict
from moe_dist.config.schema import RunConfig


class MetricLog:
    """Writes events of rank 0; on other ranks everything is a no-op. A failing logger never stops a run."""

    def __init__(self, config: RunConfig, *, active: bool, start_step: int, file: Path):
        self.active = active
        self._stream = self._wandb = self._bar = None
        self._warned: set[str] = set()
        if not active:
            return
        try:
            self._stream = open(file, "a", encoding="utf-8")  # noqa: SIM115 - closed in close()
        except OSError as error:
            self._warn("metrics", f"metrics.jsonl cannot be written: {error}")
        if config.logging.wandb != "off":
            self._start_wandb(config, file.parent)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=config.train.steps, initial=start_step, unit="step", dynamic_ncols=True)

    def write(self, event: str, step: int, **values) -> None:
        """One line: {"event", "step", "time", ...}. Numbers that are not finite are written as strings."""
        if not self.active:
            return
        entry = {"event": event, "step": step, "time": round(time.time(), 3), **_plain(values)}
        if self._stream is not None:
            try:
                self._stream.write(json.dumps(entry) + "\n")
                self._stream.flush()
            except OSError as error:
                self._warn("metrics", f"metrics.jsonl cannot be written: {error}")
        if self._wandb is not None:
            try:
                self._wandb.log({f"{event}/{name}": value for name, value in values.items()}, step=step)
            except Exception as error:  # any failure of a remote logger is its own, not the run's
                self._warn("wandb", f"wandb does not take figures: {error}")

    def say(self, line: str) -> None:
        """A line for people."""
        if not self.active:
            return
        if self._bar is not None:
            self._bar.write(line)
        else:
            print(line, flush=True)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def close(self) -> None:
        loggers = ((self._bar, "close", "bar"), (self._stream, "close", "metrics"), (self._wandb, "finish", "wandb"))
        for resource, end, kind in loggers:
            if resource is not None:
                try:
                    getattr(resource, end)()
                except Exception as error:  # closing a logger must not turn a finished run into a failed one
                    self._warn(kind, f"closing a logger failed: {error}")

    def _start_wandb(self, config: RunConfig, folder: Path) -> None:
        # The id is kept in the run folder before wandb starts, so that a resumed run continues the same curve.
        try:
            import wandb

            id_file = folder / "wandb_id"
            if not id_file.exists():
                id_file.write_text(uuid.uuid4().hex[:12])
            self._wandb = wandb.init(
                project=config.logging.project,
                name=config.run.name,
                id=id_file.read_text().strip(),
                resume="allow",
                mode=config.logging.wandb,
                dir=str(folder),
                tags=config.logging.tags,
                config=to_dict(config),
            )
        except Exception as error:  # see write()
            self._warn("wandb", f"wandb did not start, the run goes on without it: {error}")

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            print(f"warning: {message}", file=sys.stderr, flush=True)


def _plain(values: dict) -> dict:
    return {
        name: str(value)
        if isinstance(value, float) and not math.isfinite(value)
        else _plain(value)
        if isinstance(value, dict)
        else value
        for name, value in values.items()
    }
