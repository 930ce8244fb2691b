"""Messages between rank, watcher and hub: one JSON object a line over a socket."""

import json
import socket

LONGEST = 1 << 20  # bytes of one message; a peer that sends more is not one of ours
PATIENCE = 5.0  # seconds that a message may take on its way into the socket


class Wire:
    """A socket and what of the next message has come already. `open` is False once the other side is gone."""

    def __init__(self, sock: socket.socket):
        sock.settimeout(PATIENCE)
        self.sock, self.open, self._rest = sock, True, b""

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, kind: str, **values) -> None:
        """Send a message; where the other side is gone, only note that."""
        try:
            self.sock.sendall(json.dumps({"kind": kind, **values}).encode() + b"\n")
        except (OSError, ValueError):
            self.open = False

    def receive(self) -> list[dict]:
        """The messages that have come. To be called when there is something to be read; else it waits."""
        try:
            data = self.sock.recv(1 << 16)
        except TimeoutError:
            return []
        except (OSError, ValueError):
            data = b""
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        if not data or len(self._rest) > LONGEST:
            self.open = False
        return [message for message in map(_parsed, lines) if message is not None]

    def close(self) -> None:
        self.open = False
        self.sock.close()


def _parsed(line: bytes) -> dict | None:
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) and isinstance(message.get("kind"), str) else None
