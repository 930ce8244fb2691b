"""Landlock and the other requests to a Linux kernel that are no system call of Python's.

Landlock: https://docs.kernel.org/userspace-api/landlock.html. The numbers are the kernel's interface and never change.
"""

import contextlib
import ctypes
import os
import signal
import struct
import sys

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on all architectures
_CAPSET = {"x86_64": 126, "aarch64": 91}
_CAPABILITY_VERSION_3 = 0x20080522

_READ = 1 << 2 | 1 << 3  # files, folders
_WRITE = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 12  # write; remove folder, file; make folder, file, link
_REFER, _TRUNCATE, _IOCTL = 1 << 13, 1 << 14, 1 << 15
_NET = 1 << 0 | 1 << 1  # bind, connect
_SCOPES = 1 << 0 | 1 << 1  # abstract sockets, signals


def die_with_parent() -> None:
    """Be killed when the thread that started this process ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def drop_privileges() -> None:
    """Give up all capabilities, which root has, and the chance to get any."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if (number := _CAPSET.get(_machine())) is not None:
        header = ctypes.create_string_buffer(struct.pack("Ii", _CAPABILITY_VERSION_3, 0))
        _syscall(number, header, ctypes.create_string_buffer(24))


def restrict_files(*, readable: list[str], writable: list[str]) -> bool:
    """Let this process see `readable` and change what is in the folders `writable`, and touch nothing else.

    False, and nothing is restricted, where the kernel has no Landlock.
    """
    version = _syscall(_CREATE_RULESET, None, 0, 1) if sys.platform == "linux" else -1
    if version < 1:
        return False
    known = (1 << 13) - 1
    known |= (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0) | (_IOCTL if version >= 5 else 0)
    fields = [known, _NET if version >= 4 else 0, _SCOPES if version >= 6 else 0]
    ruleset = struct.pack("3Q", *fields)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = _syscall(_CREATE_RULESET, ctypes.create_string_buffer(ruleset), len(ruleset), 0)
    if rules < 0:
        return False
    for path in readable:
        with contextlib.suppress(FileNotFoundError):
            _allow(rules, path, _READ if os.path.isdir(path) else 1 << 2)
    for path in writable:
        _allow(rules, path, (_READ | _WRITE | _REFER | _TRUNCATE) & known)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    restricted = _syscall(_RESTRICT_SELF, rules, 0) == 0
    os.close(rules)
    return restricted


def _allow(rules: int, path: str, access: int) -> None:
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = ctypes.create_string_buffer(struct.pack("=Qi", access, place))
        if _syscall(_ADD_RULE, rules, 1, rule, 0) != 0:
            raise OSError(f"Landlock does not take {path}")
    finally:
        os.close(place)


def _machine() -> str:
    return os.uname().machine


def _prctl(option: int, value: int) -> int:
    if sys.platform != "linux":
        return -1
    return ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), *(ctypes.c_ulong(0),) * 3)


def _syscall(number: int, *arguments) -> int:
    call = ctypes.CDLL(None).syscall
    call.restype = ctypes.c_long
    return call(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
