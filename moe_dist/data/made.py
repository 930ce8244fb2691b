"""The folders that a stage of a recipe makes, noted just before they appear.

A stage may die after its folder is there and before the recipe has marked it as done. Begun again, its verb would find
a folder that is not empty and refuse it. So whoever gives a whole folder its name notes it first, where
MOE_DIST_MADE_FILE says, and the recipe looks whether what is there is still that. Without the variable nothing happens.
"""

import json
import os
from pathlib import Path

MADE_FILE = "MOE_DIST_MADE_FILE"


def begin(note: Path, stage: str) -> None:
    """Start the note of a stage, which `stage` identifies with all that goes into it."""
    _write(note, {"stage": stage, "folders": {}})


def note_folder(temporary: Path, folder: Path) -> None:
    """Note that the whole folder `temporary` is about to be called `folder`."""
    note = os.environ.get(MADE_FILE)
    if note:
        kept = _read(Path(note))
        kept.setdefault("folders", {})[os.path.normpath(folder)] = _files(temporary)
        _write(Path(note), kept)


def made(note: Path, stage: str) -> list[str]:
    """The folders that this very stage has made and that are still what they were then."""
    kept = _read(note)
    if kept.get("stage") != stage:
        return []
    return [folder for folder, files in kept["folders"].items() if _files(Path(folder)) == files]


def _files(folder: Path) -> dict[str, list[int]]:
    """Name -> size and time of every file: what a new name does not change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            state = path.stat()
            found[str(path.relative_to(folder))] = [state.st_size, state.st_mtime_ns]
    return found


def _read(note: Path) -> dict:
    try:
        kept = json.loads(note.read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _write(note: Path, kept: dict) -> None:
    partial = note.with_name(f"{note.name}.{os.getpid()}.partial")
    with open(partial, "w") as file:
        json.dump(kept, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, note)
