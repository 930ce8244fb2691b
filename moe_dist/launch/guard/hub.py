"""The hub: hears of all ranks, finds the first culprit, and tells every watcher to end its rank. Runs beside rank 0."""

import hmac
import socket
import time
from collections.abc import Callable

from moe_dist.errors import EXIT_TRANSIENT
from moe_dist.launch.guard.beat import LONG, Position
from moe_dist.launch.guard.judge import Known, hang_line, limit, stragglers
from moe_dist.launch.guard.wire import Wire

WINDOW = 3.0  # seconds in which a rank that knows why may still speak, after one has only noticed that others are gone
SILENCE = 60.0  # a watcher that has said nothing for so long is taken for dead, and its host with it
KEEPALIVE = 10.0  # how often hub and watchers speak though nothing has changed
SUSPENDED = 15.0  # seconds between two looks that say that this process itself was stopped
STACKS = 3.0  # seconds that the watchers get to send the stacks of a hang
LINGER = 30.0  # seconds that the hub stays after it has spoken
SAMPLE_STEPS, SAMPLE_SECONDS, SAMPLES = 3, 2.0, 3  # how a straggler shows: windows of so many steps, so often in a row


class Hub:
    """See the module's text. `over`: there is nothing left to watch.

    folder: where stacks go. say: prints a line for people. hang_timeout: seconds, 0 never, None by the run's own pace.
    """

    def __init__(self, *, world: int, token: str, folder: str, hang_timeout: float | None, say: Callable[[str], None]):
        self.world, self.folder, self.hang_timeout, self.say = world, folder, hang_timeout, say
        self.listener = socket.create_server(("", 0), backlog=max(128, world))
        self.over, self.verdict = False, None
        self._token = token
        self._wires: dict[int, Wire] = {}
        self._rank_of: dict[Wire, int] = {}
        self.ranks: dict[int, Known] = {}
        self._heard: dict[int, float] = {}
        self._done: set[int] = set()
        self._failed: dict[int, dict] = {}
        self._pending: list[tuple[float, dict]] = []
        self._longest = 0.0
        self._stacks_until: float | None = None
        self._looked = self._pinged = time.monotonic()
        self._sampled: tuple[float, dict[int, Position]] | None = None
        self._slow: dict[int, int] = {}

    @property
    def port(self) -> int:
        return self.listener.getsockname()[1]

    def accept(self) -> Wire | None:
        """The connection of another watcher; it counts once it has said who it is."""
        try:
            return Wire(self.listener.accept()[0])
        except OSError:
            return None

    def hear(self, wire: Wire, message: dict) -> None:
        kind, now = message["kind"], time.monotonic()
        if kind == "hello":
            rank = message.get("rank")
            known = isinstance(rank, int) and 0 <= rank < self.world and rank not in self._wires
            if not known or not hmac.compare_digest(str(message.get("token")), self._token):
                wire.close()
                return
            self._wires[rank], self._rank_of[wire] = wire, rank
            self.ranks[rank] = Known(host=str(message.get("host")), since=now)
            self._heard[rank] = now
            return
        rank = self._rank_of.get(wire)
        if rank is None:
            return
        self._heard[rank] = now
        known = self.ranks[rank]
        if kind == "beat":
            position = Position(*message["position"])
            if position.beats != known.position.beats:
                if known.position.step >= 0 and known.position.phase not in LONG:
                    self._longest = max(self._longest, now - known.since)
                known.since = now
            known.position, known.state = position, message["state"]
        elif kind == "stack":
            known.waiting, known.top = message["waiting"], message["top"]
        elif kind == "done":
            self._done.add(rank)
        elif kind == "failed" and rank not in self._failed:
            self._failed[rank] = message
            self._blame(rank, message, now)

    def lost(self, wire: Wire) -> None:
        """The connection to a watcher has ended."""
        rank = self._rank_of.get(wire)
        if rank is None or rank in self._done or rank in self._failed or self.verdict:
            return
        self._failed[rank] = {"cause": "is gone, and what watched over it: its host went down?", "sort": "gone"}
        self._blame(rank, self._failed[rank], time.monotonic())

    def look(self) -> None:
        """What time alone brings to light; to be called every second or so."""
        now = time.monotonic()
        if now - self._looked > SUSPENDED:  # nobody is to blame for that
            for known in self.ranks.values():
                known.since += now - self._looked
            self._heard = dict.fromkeys(self._heard, now)
        self._looked = now
        if now - self._pinged > KEEPALIVE:
            self._pinged = now
            for wire in self._wires.values():
                wire.send("ping")
        if self.verdict:
            others = [wire for rank, wire in self._wires.items() if rank != 0]
            self.over = now > self.verdict[0] + LINGER or not any(wire.open for wire in others)
            return
        ended = len(self._done | self._failed.keys()) == self.world
        if ended and all(message["sort"] == "user" for _, message in self._pending):
            # All are done, or each has said itself what it ended of: there is nobody to point at.
            for wire in self._wires.values():
                wire.send("over")
            self.verdict = (now, None)
            return
        if self._pending and now > self._pending[0][0] + WINDOW:
            self._speak(self._best_of_pending(), now)
            return
        silent = [rank for rank, heard in self._heard.items() if now - heard > SILENCE and rank not in self._done]
        if silent and silent[0] not in self._failed:
            self._failed[silent[0]] = {"cause": f"has shown no sign of life for {SILENCE:.0f} s", "sort": "own"}
            self._blame(silent[0], self._failed[silent[0]], now)
            return
        self._look_for_hangs(now)
        self._look_for_stragglers(now)

    def _blame(self, rank: int, message: dict, now: float) -> None:
        message["rank"] = rank
        if self.verdict:
            return
        if message["sort"] == "own":
            self._speak(message, now)
        else:
            self._pending.append((now, message))

    def _best_of_pending(self) -> dict:
        """A rank that says what is wrong knows more than one that misses another, and a lost host than its victims."""
        order = {"user": 0, "gone": 1, "peer": 2}
        return min((message for _, message in self._pending), key=lambda message: order[message["sort"]])

    def _speak(self, message: dict, now: float) -> None:
        rank = message["rank"]
        known = self.ranks[rank]
        self._end(now, rank, f"rank {rank} on {known.host} {message['cause']} ({known.position})")

    def _end(self, now: float, rank: int | None, line: str, *, grace: bool = True) -> None:
        if rank is not None:
            line += f"; its stack: {self.folder}/rank-{rank}.log"
        self.say(line)
        for wire in self._wires.values():
            wire.send("end", text=line, code=EXIT_TRANSIENT, grace=grace)
        self.verdict = (now, line)

    def _look_for_hangs(self, now: float) -> None:
        if self._stacks_until is not None:
            there = {rank: known for rank, known in self.ranks.items() if rank not in self._done}
            if now < self._stacks_until and any(known.waiting is None for known in there.values()):
                return
            rank, line = hang_line(there, now=now)
            self._end(now, rank, line if rank is not None else f"{line}; stacks: {self.folder}", grace=False)
            return
        for rank, known in self.ranks.items():
            longest = limit(known.position.phase, hang_timeout=self.hang_timeout, longest=self._longest)
            if rank not in self._done and now - known.since > longest:
                self._stacks_until = now + STACKS
                for wire in self._wires.values():
                    wire.send("stacks")
                return

    def _look_for_stragglers(self, now: float) -> None:
        """Compare the ranks' own work over a window of steps; tell rank 0 of one that stays slow."""
        if len(self.ranks) < self.world:
            return
        positions = {rank: known.position for rank, known in self.ranks.items()}
        if self._sampled is None:
            self._sampled = (now, positions)
            return
        start, before = self._sampled
        steps = {rank: position.timed - before[rank].timed for rank, position in positions.items()}
        if min(steps.values()) < SAMPLE_STEPS or now - start < SAMPLE_SECONDS:
            return
        work = {rank: (position.work - before[rank].work) / steps[rank] for rank, position in positions.items()}
        slow = stragglers(work, {rank: position.team for rank, position in positions.items()})
        self._slow = {rank: self._slow.get(rank, 0) + 1 for rank in slow}
        for rank, windows in self._slow.items():
            if windows == SAMPLES and 0 in self._wires:
                host, seconds, times = self.ranks[rank].host, round(work[rank], 4), round(slow[rank], 2)
                text = f"rank {rank} on {host} is slow: {seconds:.3f} s of its own work a step, {times:.1f} times the "
                values = {"rank": rank, "host": host, "seconds": seconds, "times": times}
                self._wires[0].send("straggler", text=text + "others' median", **values)
        self._sampled = (now, positions)
