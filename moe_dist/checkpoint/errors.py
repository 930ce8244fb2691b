"""What can go wrong with a checkpoint, as errors that name the file, the tensor and the range."""

from moe_dist.errors import UserError


class CheckpointError(UserError):
    """A checkpoint that cannot be written, or one that is torn, damaged, or not what was asked for."""


class NoSpaceError(CheckpointError):
    """The disk cannot hold the checkpoint. What was saved before is untouched, so a run may go on training."""
