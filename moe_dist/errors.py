"""Errors meant for people, and the exit codes of the command line.

A `UserError` says what is wrong, where, and what to do. The command line prints its message without a traceback and
exits with `EXIT_USER`; as a library it is an ordinary `ValueError`.
"""

import sys

EXIT_OK = 0
EXIT_NOT_PROVED = 1
EXIT_USER = 2
EXIT_PREEMPTED = 85
EXIT_TRANSIENT = 86
EXIT_POLICY = 87


class UserError(ValueError):
    """Wrong input of the user's: a config key, a path, a file's content, a layout that cannot work."""


class PolicyStop(RuntimeError):
    """The run stopped itself by a stated policy (bad data, NaN); running it again would stop again."""


class PeerFailure(RuntimeError):
    """Another rank of this launch has failed; the message says which and why. Starting again goes on from here."""


class HostFailure(RuntimeError):
    """A host, its network or its place in the launch does not work, as all ranks have found together; starting again,
    without it where it is named, may."""


def is_peer_failure(error: BaseException) -> bool:
    """Whether a collective failed because another rank or the network went away. Does not import torch."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and isinstance(error, torch.distributed.DistError):
        return True
    if isinstance(error, PeerFailure):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and "gloo" in text and ("onnection" in text or "Timed out" in text)
