"""An audit hook that refuses the same as the kernel would. It stops code that means no harm, not code that does."""

import os
import sys

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_REFUSED = (
    "socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "pty.",
    "os.kill", "os.killpg", "os.chmod", "os.chown", "os.lchown", "os.utime", "os.setxattr", "os.removexattr",
    "_thread.start_new_thread", "ctypes.", "signal.pthread_kill", "resource.prlimit",
)  # fmt: skip
_CHANGING = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate")


def install(folder: str) -> None:
    """Refuse network, processes, threads, and changes of files outside `folder`, from now on."""
    root = os.path.realpath(folder) + os.sep

    def inside(path) -> bool:
        return isinstance(path, int) or (os.path.realpath(os.fsdecode(path)) + os.sep).startswith(root)

    def refuse(event: str, arguments: tuple) -> None:
        if event.startswith(_REFUSED):
            raise PermissionError(f"{event} is refused")
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
        if writes and not inside(arguments[0]):
            raise PermissionError(f"writing {arguments[0]!r} is refused")
        if event in _CHANGING:
            paths = arguments[:2] if event in ("os.rename", "os.link", "os.symlink") else arguments[:1]
            if not all(inside(path) for path in paths):
                raise PermissionError(f"{event} of {paths!r} is refused")

    sys.addaudithook(refuse)
