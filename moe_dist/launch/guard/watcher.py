"""The watcher: a process beside a rank, of the standard library alone, that sees it live, hang and die.

It is started by the rank (`guard.rank`), reads its heartbeat, tells the hub of it, and ends the rank on the hub's word:
first by asking, then, where it holds the GIL or is stopped, by SIGKILL. It ends soon after its rank.
"""

import json
import mmap
import os
import selectors
import signal
import socket
import sys
import time
from pathlib import Path

from moe_dist.errors import EXIT_TRANSIENT
from moe_dist.launch.exit_file import leave_exit_code
from moe_dist.launch.guard.beat import SIZE, read
from moe_dist.launch.guard.hub import KEEPALIVE, SILENCE, SUSPENDED, Hub
from moe_dist.launch.guard.postmortem import cause_of, exit_status, read_stack, state_and_status
from moe_dist.launch.guard.wire import Wire

LOOK = 0.5  # seconds between two looks at the rank
GRACE = 10.0  # what a rank gets to end by itself once another has failed
ASKED = 2.0  # what it gets after it was asked to end at once
DUMP = 2.0  # what faulthandler gets to write the stacks
CONNECT = 60.0


class Watcher:
    """One rank's watcher. settings: what the rank's first message says (see `guard.rank`)."""

    def __init__(self, rank: Wire, settings: dict):
        self.to_rank, self.settings = rank, settings
        self.rank, self.pid = settings["rank"], settings["pid"]
        self.memory = mmap.mmap(settings["memory"], SIZE, prot=mmap.PROT_READ)
        self.stacks = settings["stacks"]
        self.selector = selectors.DefaultSelector()
        self.hub: Hub | None = None
        self.to_hub: Wire | None = None
        self.position, self.told_at = read(self.memory), 0.0
        self.heard_at = self.looked_at = time.monotonic()
        self.left = False  # the rank has said how it ended, and is none of our business any more
        self.end_at: float | None = None
        self.ended: dict | None = None
        self.asked_at: float | None = None
        self.trace = ""
        self.pidfd: int | None = None
        self.dead_at: float | None = None
        self.over = False  # all ranks are done

    def run(self) -> None:
        address = self.settings["address"]
        if self.rank == 0:
            self.hub = Hub(
                world=self.settings["world"],
                token=self.settings["token"],
                folder=self.settings["folder"],
                hang_timeout=self.settings["hang_timeout"],
                say=_say,
            )
            self.selector.register(self.hub.listener, selectors.EVENT_READ, self._accept)
            self.to_rank.send("port", port=self.hub.port)
            address = ["127.0.0.1", self.hub.port]
        self._connect(address)
        self.selector.register(self.to_rank, selectors.EVENT_READ, self._from_rank)
        if hasattr(os, "pidfd_open"):
            try:
                self.pidfd = os.pidfd_open(self.pid)
                self.selector.register(self.pidfd, selectors.EVENT_READ, lambda _: self._died())
            except OSError:
                self._died()
        while not self._finished():
            for key, _ in self.selector.select(LOOK):
                key.data(key.fileobj)
            if time.monotonic() - self.looked_at >= LOOK / 2:
                self._look()
        self._keep_stacks()

    def _connect(self, address: list) -> None:
        end = time.monotonic() + CONNECT
        while True:
            try:
                self.to_hub = Wire(socket.create_connection(tuple(address), timeout=5))
                break
            except OSError as error:
                if time.monotonic() > end or self._rank_is_gone():
                    _say(f"warning: rank {self.rank} is not watched: {address[0]}:{address[1]} of rank 0: {error}")
                    return
                time.sleep(0.2)
        self.to_hub.send("hello", rank=self.rank, host=self.settings["host"], token=self.settings["token"])
        self.selector.register(self.to_hub, selectors.EVENT_READ, self._from_hub)

    def _accept(self, _) -> None:
        wire = self.hub.accept()
        if wire is not None:
            self.selector.register(wire, selectors.EVENT_READ, self._from_watcher)

    def _from_watcher(self, wire: Wire) -> None:
        for message in wire.receive():
            self.hub.hear(wire, message)
        if not wire.open:
            self.selector.unregister(wire)
            self.hub.lost(wire)
            wire.close()

    def _from_rank(self, wire: Wire) -> None:
        for message in wire.receive():
            if message["kind"] == "done":
                self.left = True
                self._tell_hub("done")
            elif message["kind"] == "failed":
                self.left = True
                self.trace = message["trace"]
                self._tell_hub("failed", cause=message["cause"], sort=message["sort"])
        if not wire.open:
            self.selector.unregister(wire)

    def _from_hub(self, wire: Wire) -> None:
        self.heard_at = time.monotonic()
        for message in wire.receive():
            if message["kind"] == "stacks":
                waiting, top = read_stack(self._fresh_stack())
                wire.send("stack", waiting=waiting, top=top)
            elif message["kind"] == "end":
                self._end(message)
            elif message["kind"] == "straggler":
                self.to_rank.send(**message)
            elif message["kind"] == "over":
                self.left = self.over = True
        if not wire.open:
            self.selector.unregister(wire)
            self._hub_is_gone()

    def _hub_is_gone(self) -> None:
        if self.ended is None and not self.left:
            text = f"the host of rank 0 ({self.settings['address'][0]}) is gone, or what watched over it"
            if self.settings["local_rank"] == 0 or self.rank == 1:
                _say(f"{text}: rank {self.rank} ends")
            self._end({"text": text, "code": EXIT_TRANSIENT, "grace": True})

    def _end(self, message: dict) -> None:
        if self.ended is None:
            self.ended = message
            self.end_at = time.monotonic() + (GRACE if message["grace"] else 0)
            self.to_rank.send(**{"kind": "end", **message})

    def _look(self) -> None:
        now = time.monotonic()
        if now - self.looked_at > SUSPENDED:
            self.heard_at = now
        self.looked_at = now
        if now - self.heard_at > SILENCE and self.to_hub is not None:
            self._hub_is_gone()
        if not self.dead and self._rank_is_gone():
            self._died()
        if self.hub is not None:
            self.hub.look()
        if not self.dead:
            position = read(self.memory)
            if position != self.position or now - self.told_at > KEEPALIVE:
                self.position, self.told_at = position, now
                self._beat()
        if self.ended is not None and not self.left and not self.dead and now > self.end_at:
            if self.asked_at is None:
                self.asked_at = now
                self._dump()
                self.to_rank.send("exit", code=self.ended["code"])
            elif now > self.asked_at + ASKED:
                leave_exit_code(self.ended["code"])
                os.kill(self.pid, signal.SIGKILL)

    def _beat(self) -> None:
        place = self.position
        position = [place.beats, place.step, place.timed, place.phase, place.work, place.team]
        self._tell_hub("beat", position=position, state=state_and_status(self.pid)[0])

    def _tell_hub(self, kind: str, **values) -> None:
        if self.to_hub is not None:
            if kind != "beat":
                self.position = read(self.memory)
                self._beat()
            self.to_hub.send(kind, **values)

    def _rank_is_gone(self) -> bool:
        return os.getppid() != self.pid

    def _died(self) -> None:
        if self.dead:
            return
        status = exit_status(self.pid, self.pidfd)
        if self.pidfd is not None:
            self.selector.unregister(self.pidfd)
        self.dead_at = time.monotonic()
        if self.to_rank.open:  # what it has said just before it died
            self.to_rank.sock.settimeout(0.05)
            self._from_rank(self.to_rank)
        if not self.left:
            self._tell_hub("failed", cause=cause_of(status), sort="own")

    @property
    def dead(self) -> bool:
        return self.dead_at is not None

    def _finished(self) -> bool:
        if not (self.dead or self.left):
            return False
        if self.hub is not None:
            return self.hub.over
        deaf = self.to_hub is None or not self.to_hub.open
        return deaf or self.over or self.ended is not None or (self.dead and time.monotonic() - self.dead_at > GRACE)

    # Stacks

    def _dump(self) -> None:
        """Have faulthandler write the stacks of all threads: a signal handler in C, whoever holds the GIL."""
        if not self.dead and not self.left:
            os.kill(self.pid, signal.SIGQUIT)

    def _fresh_stack(self) -> str:
        """A dump of now, once it is written; '' of a process that does not write one, being stopped."""
        start, end = os.fstat(self.stacks).st_size, time.monotonic() + DUMP
        self._dump()
        before, text = None, ""
        while time.monotonic() < end and not (text and text == before):
            time.sleep(0.1)
            before, text = text, self._stack_text(start)
        return text

    def _stack_text(self, start: int = 0) -> str:
        try:
            return os.pread(self.stacks, 1 << 20, start).decode(errors="replace")
        except OSError:
            return ""

    def _keep_stacks(self) -> None:
        """Where something has gone wrong, put what is known of this rank's end into its log."""
        text = "".join(part for part in (self.trace, self._stack_text()) if part)
        if self.ended is None:
            return
        folder = Path(self.settings["folder"])
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = [self.ended["text"], f"rank {self.rank} on {self.settings['host']}: {self.position}", text, ""]
            (folder / f"rank-{self.rank}.log").write_text("\n".join(lines))
        except OSError as error:
            _say(f"warning: the stack of rank {self.rank} cannot be written to {folder}: {error.strerror}\n{text}")


def _say(text: str) -> None:
    print(f"moe-dist: {text}", file=sys.stderr, flush=True)


def main(descriptor: int) -> None:
    """The process: `descriptor` is its socket to the rank."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # meant for ranks; this one ends with its rank
    wire = Wire(socket.socket(fileno=descriptor))
    wire.sock.settimeout(CONNECT)
    first = b""
    while not first.endswith(b"\n"):
        data = wire.sock.recv(1)
        if not data:
            return
        first += data
    Watcher(wire, json.loads(first)).run()
