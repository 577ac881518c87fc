"""What can go wrong with a checkpoint, one class for each thing a caller may want to do about it."""

from megalrps.errors import (
    EXIT_DAMAGED,
    EXIT_HELD,
    EXIT_LOST,
    EXIT_NO_SPACE,
    EXIT_UNKNOWN_FORMAT,
    InputError,
    ToldError,
)


class CheckpointError(Exception):
    """Anything the store refuses or fails to do."""


class CheckpointExistsError(CheckpointError):
    """A save under a name that is committed already; a committed checkpoint is never written again."""


class SaveError(CheckpointError):
    """A rank could not write its part; nothing was committed, on any rank."""


class NoSpaceError(SaveError, InputError):
    """A save that the file system refused: full, over quota, too large a file, read-only. Nothing was committed."""

    exit_status = EXIT_NO_SPACE


class LoadError(CheckpointError):
    """A rank could not read its part for a reason that is not the checkpoint's; the tensors may be half loaded."""


class MissingCheckpointError(CheckpointError, InputError):
    """No committed checkpoint of that name."""


class LostCheckpointError(MissingCheckpointError):
    """A checkpoint that was acknowledged is not there: a reference or a child names it."""

    exit_status = EXIT_LOST


class CorruptCheckpointError(CheckpointError, InputError):
    """A committed checkpoint whose files are not the bytes that were saved; the message names each damaged file."""

    exit_status = EXIT_DAMAGED


class UnknownFormatError(CheckpointError, InputError):
    """A whole checkpoint, reference or lease, written in a format this version does not read."""

    exit_status = EXIT_UNKNOWN_FORMAT


class DamagedReferenceError(CheckpointError, InputError):
    """A reference or lease whose file is not what was written."""

    exit_status = EXIT_DAMAGED


class MovedReferenceError(CheckpointError, ToldError):
    """A reference is not where its mover thinks it is: somebody else has moved it, and nothing was changed."""

    exit_status = EXIT_HELD


class HeldError(CheckpointError, ToldError):
    """Another launch trains the path."""

    exit_status = EXIT_HELD


class FencedError(CheckpointError, ToldError):
    """Another launch has taken the path over: what this one trained since its last checkpoint is not committed."""

    exit_status = EXIT_HELD


class TensorMismatchError(CheckpointError, InputError):
    """The checkpoint holds the tensor, but with another shape or type than the one to be loaded."""


class MissingTensorError(TensorMismatchError):
    """The checkpoint does not hold a tensor that is to be loaded."""
