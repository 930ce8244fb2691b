"""Checkpoints keyed by parameter name and global expert id: written by all ranks, read at any other number of them."""

from moe_dist.checkpoint.background import BackgroundSave
from moe_dist.checkpoint.best import best_step, mark_best
from moe_dist.checkpoint.errors import CheckpointError, NoSpaceError
from moe_dist.checkpoint.fingerprint import fingerprint
from moe_dist.checkpoint.format import FrozenBase, TensorInfo
from moe_dist.checkpoint.fragments import NOT_EXPERT, Fragment, Place, Range, wanted_for
from moe_dist.checkpoint.group import SINGLE, Group, TorchGroup
from moe_dist.checkpoint.reader import Checkpoint, open_checkpoint
from moe_dist.checkpoint.resume import Entry, Found, find_latest, ls
from moe_dist.checkpoint.retention import pin, prune
from moe_dist.checkpoint.verify import Problem, Report, verify
from moe_dist.checkpoint.writer import save

__all__ = [
    "NOT_EXPERT",
    "SINGLE",
    "BackgroundSave",
    "Checkpoint",
    "CheckpointError",
    "Entry",
    "Found",
    "Fragment",
    "FrozenBase",
    "Group",
    "NoSpaceError",
    "Place",
    "Problem",
    "Range",
    "Report",
    "TensorInfo",
    "TorchGroup",
    "best_step",
    "find_latest",
    "fingerprint",
    "ls",
    "mark_best",
    "open_checkpoint",
    "pin",
    "prune",
    "save",
    "verify",
    "wanted_for",
]
