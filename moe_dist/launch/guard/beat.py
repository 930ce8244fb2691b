"""The heartbeat: a few bytes of memory in which a rank says where it is, and which its watcher reads."""

import mmap
import struct
from dataclasses import dataclass

# In which part of a run a rank is. Those of LONG take as long as the data, the model or the disk wants.
PHASES = (
    "the start",
    "the preflight",
    "forming groups",
    "planning the model",
    "building data",
    "loading the model",
    "resuming",
    "reading a batch",
    "forward",
    "backward",
    "the update",
    "the log",
    "saving",
    "evaluation",
    "the end",
)
LONG = frozenset(
    {"the start", "planning the model", "building data", "loading the model", "resuming", "saving", "the end"}
)
_LAYOUT = struct.Struct("<QqqBdH")
SIZE = mmap.PAGESIZE


@dataclass(frozen=True)
class Position:
    """beats: phases that were entered so far, the same on all ranks at the same place of a run, but for pipeline stages
    in the midst of a step. step: those done.

    timed: steps whose work is in `work`: seconds in which this rank read data and ran forward, without waiting for
    others. team: ranks of one number have the same to do; a pipeline stage.
    """

    beats: int = 0
    step: int = -1
    timed: int = 0
    phase: str = PHASES[0]
    work: float = 0.0
    team: int = 0

    def __str__(self) -> str:
        return self.phase if self.step < 0 else f"step {self.step + 1}, {self.phase}"


class Heartbeat:
    """The rank's side. memory: a file of SIZE bytes that the watcher maps as well."""

    def __init__(self, memory: int | None):
        self._map = None if memory is None else mmap.mmap(memory, SIZE)
        self._beats, self._step, self._timed, self._work = 0, -1, 0, 0.0
        self._team = 0
        self.phase = PHASES[0]

    def beat(self, phase: str, step: int | None = None) -> None:
        """Say that this rank enters `phase`; step: how many steps are done, once there are any to be done."""
        self._beats += 1
        self.phase = phase
        if step is not None:
            self._step = step
        if self._map is not None:
            place = (self._beats, self._step, self._timed, PHASES.index(phase), self._work, self._team)
            _LAYOUT.pack_into(self._map, 0, *place)

    def worked(self, seconds: float, *, team: int = 0) -> None:
        """Add a step's own work; told with the next beat. team: see `Position`."""
        self._team = team
        self._timed += 1
        self._work += seconds

    @property
    def position(self) -> Position:
        return Position(self._beats, self._step, self._timed, self.phase, self._work, self._team)

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None


def read(memory: mmap.mmap) -> Position:
    """Where the rank is. Not locked: what is read in the midst of a write is right the next time."""
    beats, step, timed, phase, work, team = _LAYOUT.unpack_from(memory, 0)
    return Position(beats, step, timed, PHASES[phase] if phase < len(PHASES) else PHASES[0], work, team)
