"""How the culprit is found: pure functions, and a hub with watchers that are sockets of this test."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from moe_dist.launch.guard import hub as hub_module
from moe_dist.launch.guard.beat import SIZE, Heartbeat, Position, read
from moe_dist.launch.guard.hub import Hub
from moe_dist.launch.guard.judge import Known, hang_line, limit, stragglers
from moe_dist.launch.guard.postmortem import cause_of, exit_status, read_stack, state_and_status
from moe_dist.launch.guard.wire import Wire

WAITING = """\
Thread 0x1 (most recent call first):
  File "/x/moe_dist/launch/guard/rank.py", line 70 in _listen

Current thread 0x2 (most recent call first):
  File "/v/torch/distributed/distributed_c10d.py", line 3000 in all_reduce
  File "/x/moe_dist/train/agree.py", line 30 in agree
"""
WORKING = """\
Current thread 0x2 (most recent call first):
  File "/usr/lib/json.py", line 12 in loads
  File "/x/moe_dist/data/loader.py", line 113 in next_batch
"""


def known(beats: int, *, state="S", waiting=None, since=0.0, top="") -> Known:
    return Known("n1", Position(beats, 4, 4, "forward"), since, state, waiting, top)


@pytest.mark.parametrize(
    ("ranks", "culprit", "text"),
    [
        ([known(9), known(8), known(9)], 1, "it is behind the others"),
        ([known(9), known(9, state="T"), known(9)], 1, "rank 1 on n1 is stopped (SIGSTOP): no progress for 30 s"),
        ([known(9, waiting=True), known(9, waiting=False), known(9, waiting=True)], 1, "where the others wait for it"),
        ([known(9), known(8, waiting=True), known(8, waiting=False)], 2, "it is behind the others"),
        ([known(9, waiting=True), known(9, waiting=True)], None, "all 2 ranks have hung for 30 s at the same place"),
        ([known(9), known(9)], None, "(step 5, forward): the network, or collectives that do not match"),
        ([known(9), known(8), known(8)], 1, "; so do ranks 2"),
        ([known(9, waiting=False), known(8, waiting=True)], 0, "where the others wait for it"),
        ([known(9, waiting=True), known(8, waiting=True)], 1, "it is behind the others"),
    ],
)
def test_who_hangs(ranks, culprit, text):
    found, line = hang_line(dict(enumerate(ranks)), now=30.0)
    assert found == culprit
    assert text in line


def test_limits_follow_the_pace_and_the_phase():
    assert limit("forward", hang_timeout=None, longest=1.0) == 600
    assert limit("forward", hang_timeout=None, longest=100.0) == 2000
    assert limit("saving", hang_timeout=None, longest=1.0) == 7200
    assert limit("the preflight", hang_timeout=None, longest=1.0) == 60
    assert limit("forming groups", hang_timeout=None, longest=1.0) == 180
    assert limit("saving", hang_timeout=5.0, longest=1.0) == 5


def test_stragglers_are_measured_by_the_others():
    together = dict.fromkeys(range(4), 0)
    assert stragglers({0: 1.0, 1: 1.1, 2: 0.9, 3: 3.0}, together) == {3: 3.0}
    assert stragglers({0: 1.0, 1: 2.5}, together) == {1: 2.5}  # of two, half the mean would hide it
    assert stragglers({0: 1.0, 1: 1.9}, together) == {}
    assert stragglers({0: 1.0}, together) == {}
    # Pipeline stages have more or less to do.
    assert stragglers({0: 1.0, 1: 1.1, 2: 3.0, 3: 9.0}, {0: 0, 1: 0, 2: 1, 3: 1}) == {3: 3.0}


def test_stacks_tell_who_waits_and_where():
    assert read_stack(WAITING) == (True, "train/agree.py:30 in agree")
    assert read_stack(WAITING.replace("torch/distributed/distributed_c10d", "moe_dist/parallel/collectives"))[0]
    assert read_stack(WORKING) == (False, "data/loader.py:113 in next_batch")
    assert read_stack("") == (None, "")


@pytest.mark.parametrize("waited", [False, True], ids=["not waited for", "waited for"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_what_a_process_died_of(number, waited):
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    pidfd = os.pidfd_open(process.pid)
    process.send_signal(number)
    if waited:
        process.wait()
    else:
        end = time.monotonic() + 10
        while state_and_status(process.pid)[0] != "Z" and time.monotonic() < end:
            time.sleep(0.01)
    status = exit_status(process.pid, pidfd)
    process.wait()
    os.close(pidfd)
    if waited and status is None:
        pytest.skip("this kernel does not tell of a process that has been waited for (Linux 6.15 does)")
    assert number.name in cause_of(status)


def test_a_heartbeat_is_read_as_it_was_written(tmp_path):
    import mmap

    with open(tmp_path / "memory", "w+b") as file:
        file.write(bytes(SIZE))
        file.flush()
        heart = Heartbeat(file.fileno())
        heart.beat("forward", 7)
        heart.worked(0.5, team=3)
        heart.beat("backward")
        memory = mmap.mmap(file.fileno(), SIZE, prot=mmap.PROT_READ)
        assert read(memory) == heart.position == Position(2, 7, 1, "backward", 0.5, 3)
        assert str(heart.position) == "step 8, backward"
        heart.close()


class Fleet:
    """A hub and its watchers, which only say what the test has them say."""

    def __init__(self, world: int, monkeypatch, **options):
        monkeypatch.setattr(hub_module, "WINDOW", 0.2)
        monkeypatch.setattr(hub_module, "STACKS", 0.2)
        self.lines: list[str] = []
        options = {"hang_timeout": 600.0, **options}
        self.hub = Hub(world=world, token="t", folder="/logs", say=self.lines.append, **options)
        self.wires, self.theirs = [], []
        for rank in range(world):
            self.theirs.append(Wire(socket.create_connection(("127.0.0.1", self.hub.port))))
            self.wires.append(self.hub.accept())
            self.hub.hear(self.wires[rank], {"kind": "hello", "rank": rank, "host": f"n{rank}", "token": "t"})

    def say(self, rank: int, kind: str, **values) -> None:
        self.hub.hear(self.wires[rank], {"kind": kind, **values})

    def heard(self, rank: int) -> list[str]:
        return [message["kind"] for message in self.theirs[rank].receive()]

    def later(self, seconds: float) -> None:
        time.sleep(seconds)
        self.hub.look()


def test_the_first_culprit_is_named_and_all_are_ended(monkeypatch):
    fleet = Fleet(3, monkeypatch)
    fleet.say(2, "failed", cause="lost a connection", sort="peer")  # the victim is quicker
    fleet.hub.look()
    assert fleet.lines == []
    fleet.say(1, "failed", cause="failed: ValueError: x", sort="own")
    assert fleet.lines == ["rank 1 on n1 failed: ValueError: x (the start); its stack: /logs/rank-1.log"]
    assert [fleet.heard(rank) for rank in range(3)] == [["end"]] * 3
    fleet.say(0, "failed", cause="another", sort="own")
    assert len(fleet.lines) == 1


def test_victims_alone_are_a_network(monkeypatch):
    fleet = Fleet(2, monkeypatch)
    for rank in range(2):
        fleet.say(rank, "failed", cause="failed: connection closed", sort="peer")
    fleet.later(0.3)
    assert len(fleet.lines) == 1
    assert "connection closed" in fleet.lines[0]


def test_an_error_of_all_ranks_points_at_nobody(monkeypatch):
    fleet = Fleet(2, monkeypatch)
    for rank in range(2):
        fleet.say(rank, "failed", cause="failed: UserError: lr", sort="user")
    fleet.later(0.3)
    assert fleet.lines == []
    assert fleet.heard(0) == ["over"]


def test_an_error_of_one_rank_ends_the_others(monkeypatch):
    fleet = Fleet(2, monkeypatch)
    fleet.say(1, "failed", cause="failed: UserError: no such file", sort="user")
    fleet.later(0.3)
    assert fleet.lines == ["rank 1 on n1 failed: UserError: no such file (the start); its stack: /logs/rank-1.log"]


def test_a_lost_watcher_is_a_lost_host_unless_somebody_knows_better(monkeypatch):
    fleet = Fleet(3, monkeypatch)
    fleet.hub.lost(fleet.wires[2])
    fleet.say(0, "failed", cause="failed: connection closed", sort="peer")
    fleet.later(0.3)
    assert len(fleet.lines) == 1
    assert fleet.lines[0].startswith("rank 2 on n2 is gone, and what watched over it")


def test_a_hang_asks_for_stacks_first(monkeypatch):
    fleet = Fleet(2, monkeypatch, hang_timeout=0.3)
    fleet.say(0, "beat", position=[5, 1, 1, "forward", 0.0], state="S")
    fleet.say(1, "beat", position=[5, 1, 1, "forward", 0.0], state="S")
    fleet.later(0.4)
    assert (fleet.heard(0), fleet.lines) == (["stacks"], [])
    fleet.say(0, "stack", waiting=True, top="a.py:1 in f")
    fleet.say(1, "stack", waiting=False, top="b.py:2 in g")
    fleet.hub.look()
    assert "rank 1 on n1 hangs" in fleet.lines[0]
    assert "in step 2, forward at b.py:2 in g" in fleet.lines[0]


def test_all_done_is_over(monkeypatch):
    fleet = Fleet(2, monkeypatch)
    fleet.say(0, "done")
    fleet.hub.look()
    assert fleet.hub.verdict is None
    fleet.say(1, "done")
    fleet.hub.look()
    assert fleet.heard(1) == ["over"]
    assert fleet.lines == []


def test_strangers_are_turned_away(monkeypatch):
    fleet = Fleet(1, monkeypatch)
    stranger = Wire(socket.create_connection(("127.0.0.1", fleet.hub.port)))
    wire = fleet.hub.accept()
    fleet.hub.hear(wire, {"kind": "hello", "rank": 0, "host": "evil", "token": "t"})  # is here already
    assert not wire.open
    stranger.close()
    other = Fleet(2, monkeypatch)
    assert set(other.hub.ranks) == {0, 1}
    wrong = Hub(world=2, token="t", folder="/logs", hang_timeout=1.0, say=print)
    socket.create_connection(("127.0.0.1", wrong.port))
    wire = wrong.accept()
    wrong.hear(wire, {"kind": "hello", "rank": 1, "host": "evil", "token": "guess"})
    assert not wire.open
    assert wrong.ranks == {}
