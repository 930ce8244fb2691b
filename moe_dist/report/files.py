"""Files of a report, each written whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_dist.errors import UserError
from moe_dist.report import drawing
from moe_dist.report.plots import Plot


def csv_text(table: Sequence[Sequence[Any]]) -> str:
    """A header and rows as CSV. Numbers keep all their digits; None is an empty cell."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(table)
    return file.getvalue()


def plot_files(plot: Plot) -> dict[str, bytes]:
    """{file name: content} of a plot: its picture as PNG, and its numbers as CSV."""
    return {f"{plot.name}.png": drawing.png(plot), f"{plot.name}.csv": csv_text(plot.table).encode()}


def write_files(folder: str | Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write files into `folder`, in their order, replacing those of the same names; others stay. Their paths.

    All of them lie on the disk under other names before the first takes its name. UserError where that fails.
    """
    folder, waiting = Path(folder), {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            waiting[name] = folder / f".{name}-{secrets.token_hex(4)}"
            with open(waiting[name], "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name, temporary in waiting.items():
            os.replace(temporary, folder / name)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be written: {error.strerror}") from None
    finally:
        for temporary in waiting.values():
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    return [folder / name for name in files]
