"""What can go wrong with a checkpoint, one class for each thing a caller may want to do about it."""

from megalrps.errors import InputError


class CheckpointError(Exception):
    """Anything the store refuses or fails to do."""


class CheckpointExistsError(CheckpointError):
    """A save under a name that is committed already; a committed checkpoint is never written again."""


class SaveError(CheckpointError):
    """A rank could not write its part; nothing was committed, on any rank."""


class NoSpaceError(SaveError, InputError):
    """A save that the file system refused: full, over quota, too large a file, read-only. Nothing was committed."""


class LoadError(CheckpointError):
    """A rank could not read its part for a reason that is not the checkpoint's; the tensors may be half loaded."""


class MissingCheckpointError(CheckpointError, InputError):
    """No committed checkpoint of that name."""


class CorruptCheckpointError(CheckpointError, InputError):
    """A committed checkpoint whose files are not the bytes that were saved; the message names each damaged file."""


class UnknownFormatError(CheckpointError, InputError):
    """A whole checkpoint, written in a format this version does not read."""


class TensorMismatchError(CheckpointError, InputError):
    """The checkpoint holds the tensor, but with another shape or type than the one to be loaded."""


class MissingTensorError(TensorMismatchError):
    """The checkpoint does not hold a tensor that is to be loaded."""
