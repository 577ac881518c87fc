"""How a program of ours ends other than well: in one line, with an exit status that a launcher can tell apart.

docs/reliability.md has the table of statuses. torchrun turns every one of them into 1; ``run_state.json`` keeps it.
"""

from typing import ClassVar

EXIT_INPUT_ERROR = 2
"""A flag, a file or an environment that only the user can mend."""
EXIT_PREEMPTED = 20
"""Asked to stop (SIGTERM, SIGUSR1, --exit-duration-in-mins): the state is committed, start again to go on."""
EXIT_HELD = 21
"""Another launch trains this path, or has taken it over: this one has committed nothing since."""
EXIT_DAMAGED = 22
"""A checkpoint or reference is not the bytes that were saved, and nothing whole may take its place."""
EXIT_LOST = 23
"""Something that was acknowledged is not there: a checkpoint, its parent, or what a reference points to."""
EXIT_UNKNOWN_FORMAT = 24
"""A whole file in a format that this version does not read."""
EXIT_NO_SPACE = 25
"""The file system refused to be written to: full, over quota, read-only."""
EXIT_DIVERGED = 26
"""A loss or gradient that is no number, or a spike of the loss, and the policy is to stop."""
EXIT_STUCK = 27
"""A rank did not come to where the others waited for it, or did not go on; the message names it and its phase."""


class ToldError(Exception):
    """An end that is told in one line on standard error, with an exit status of its own and without a traceback.

    Every exception that is not one of these is a defect of ours and keeps its traceback.
    """

    exit_status: ClassVar[int] = EXIT_INPUT_ERROR


class InputError(ToldError, ValueError):
    """A mistake in a flag, a file or an environment that only the user can mend.

    The message names the flag or the file and says what to do about it, before any accelerator time is spent.
    """


class RepeatedError(InputError):
    """What another rank reports: this one ends with the same ``status`` and says nothing."""

    def __init__(self, message: str, status: int = EXIT_INPUT_ERROR) -> None:
        super().__init__(message)
        self.status = status


class PreemptedError(ToldError):
    """The run was asked to stop by ``reason``, and has: what was trained is committed."""

    exit_status = EXIT_PREEMPTED

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason


class DivergedError(ToldError):
    """Training that is stopped because its numbers are none, or leap."""

    exit_status = EXIT_DIVERGED


class StuckError(ToldError):
    """A collective that some rank never joined."""

    exit_status = EXIT_STUCK


def exit_status_of(error: BaseException) -> int:
    """The status a program ends with for ``error``; 1 for a defect."""
    if isinstance(error, RepeatedError):
        return error.status
    return error.exit_status if isinstance(error, ToldError) else 1
