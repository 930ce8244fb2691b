"""The rank's side: start the watcher, say where this rank is and how it ends, and hear of the others' end."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

from moe_dist.errors import HostFailure, PeerFailure, PolicyStop, UserError, is_peer_failure
from moe_dist.launch.exit_file import leave_exit_code
from moe_dist.launch.guard.beat import SIZE, Heartbeat
from moe_dist.launch.guard.wire import Wire

LOGS = "logs"  # folder of the run folder: attempt-N/rank-R.log, where a start has failed
VERDICT = 8.0  # seconds that a rank which has lost another waits to hear what has happened
_ROOT = str(Path(__file__).parents[3])
# Without site and environment it starts in some ten milliseconds and imports nothing of the user's.
_START = """import sys
sys.path.insert(0, sys.argv[1])
from moe_dist.launch.guard.watcher import main
main(int(sys.argv[2]))"""


class Guard:
    """What a training loop holds: see `guarded`. verdict: what has ended the run. watcher: process id."""

    def __init__(self, memory: int | None = None):
        self.heart = Heartbeat(memory)
        self.beat = self.heart.beat
        self.worked = self.heart.worked
        self.verdict = ""
        self.watcher: int | None = None
        self._notices: list[dict] = []

    def notices(self) -> list[dict]:
        """What has been found out since the last call: 'text' for people, and rank, host, seconds, times."""
        found, self._notices = self._notices, []
        return found


NO_GUARD = Guard()


class _Watched(Guard):
    """A guard with a watcher. wire: to it."""

    def __init__(self, memory: int, wire: Wire, process: subprocess.Popen):
        super().__init__(memory)
        self.watcher = process.pid
        self._wire, self._process, self._told = wire, process, threading.Event()
        self._listener = threading.Thread(target=self._listen, name="guard", daemon=True)

    def listen(self) -> None:
        self._listener.start()

    def _listen(self) -> None:
        self._wire.sock.settimeout(None)
        while self._wire.open:
            for message in self._wire.receive():
                if message["kind"] == "end":
                    self.verdict = message["text"]
                    self._told.set()
                elif message["kind"] == "straggler":
                    self._notices.append({name: value for name, value in message.items() if name != "kind"})
                elif message["kind"] == "exit":
                    leave_exit_code(message["code"])
                    os._exit(message["code"])
        self._told.set()
        self._process.wait()
        self._wire.close()

    def done(self) -> None:
        self._wire.send("done")

    def failed(self, error: BaseException) -> None:
        """Tell the others. Where this rank has only lost one of them, wait for what that one has died of."""
        sort = "own"
        if is_peer_failure(error):
            sort = "peer"
        elif isinstance(error, (UserError, PolicyStop, HostFailure, KeyboardInterrupt, SystemExit)):
            sort = "user"
        text = next(iter(str(error).splitlines()), "")[:400]
        cause = f"failed: {type(error).__name__}: {text}" if text else f"failed: {type(error).__name__}"
        self._wire.send("failed", sort=sort, cause=cause, trace=traceback.format_exc())
        if sort == "peer":
            self._told.wait(VERDICT)


@contextlib.contextmanager
def guarded(
    *, rank: int, world: int, local_rank: int, store, run_dir: str | os.PathLike, hang_timeout: float | None
) -> Iterator[Guard]:
    """Context in which the ranks are watched; with one rank, or hang_timeout=0, nothing is started. Collective.

    store: set, get: what the ranks already share (a torch Store). run_dir: gets `logs/attempt-N` where they fail.
    hang_timeout: seconds without progress, anywhere, after which all are ended; None: by the run's own pace.
    Leaving by an exception ends all other ranks, unless they leave by theirs. A rank that has only noticed that
    another is gone leaves by PeerFailure, which says what that one has died of.
    """
    if world == 1 or hang_timeout == 0:
        yield NO_GUARD
        return
    with tempfile.TemporaryFile() as memory, tempfile.TemporaryFile() as stacks:
        memory.write(bytes(SIZE))
        memory.flush()
        guard = _start(memory.fileno(), stacks.fileno(), rank, world, local_rank, store, run_dir, hang_timeout)
        was_enabled = faulthandler.is_enabled()
        faulthandler.enable(stacks)
        if hasattr(signal, "SIGQUIT"):
            faulthandler.register(signal.SIGQUIT, file=stacks)
        try:
            yield guard
            guard.done()
        except BaseException as error:
            guard.failed(error)
            if guard.verdict and is_peer_failure(error):
                raise PeerFailure(guard.verdict) from error
            raise
        finally:
            guard.heart.close()
            faulthandler.unregister(signal.SIGQUIT)
            faulthandler.disable()
            if was_enabled:
                with contextlib.suppress(OSError):  # whoever called may have put something else in stderr's place
                    faulthandler.enable(2)  # the descriptor, whatever stands for stderr now


def _start(memory, stacks, rank, world, local_rank, store, run_dir, hang_timeout) -> _Watched:
    ours, theirs = socket.socketpair()
    # A process that says RANK is taken for a rank by whoever wants to signal one.
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _START, _ROOT, str(theirs.fileno())],
            pass_fds=(theirs.fileno(), memory, stacks),
            stdin=subprocess.DEVNULL,
            cwd="/",
            env=environment,
            start_new_session=True,
        )
    settings = {"rank": rank, "world": world, "local_rank": local_rank, "host": socket.gethostname()}
    settings |= {"pid": os.getpid(), "memory": memory, "stacks": stacks, "hang_timeout": hang_timeout}
    wire, meeting = Wire(ours), None
    if rank == 0:
        meeting = {"token": secrets.token_hex(16), "folder": str(_next_attempt(Path(run_dir).absolute()))}
        wire.send("start", **settings, **meeting, address=None)
        wire.sock.settimeout(60)
        port = next((message["port"] for message in wire.receive() if message["kind"] == "port"), None)
        assert port is not None, "the watcher of rank 0 has not started"
        store.set("guard", json.dumps({**meeting, "address": [_own_address(), port]}))
    else:
        wire.send("start", **settings, **json.loads(store.get("guard")))
    guard = _Watched(memory, wire, process)
    guard.listen()
    return guard


def _next_attempt(run: Path) -> Path:
    numbers = [path.name.rpartition("-")[2] for path in (run / LOGS).glob("attempt-*")]
    return run / LOGS / f"attempt-{1 + max((int(number) for number in numbers if number.isdecimal()), default=0)}"


def _own_address() -> str:
    """The address of this host in the network in which the ranks meet."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))  # sends nothing
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostname()
