"""How every command line of the project ends: status 0, or one line and a status of megalrps.errors, or a traceback."""

import errno
import io
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from megalrps.errors import (
    EXIT_INPUT_ERROR,
    EXIT_NO_SPACE,
    PreemptedError,
    RepeatedError,
    ToldError,
    exit_status_of,
)

EXIT_INTERRUPTED = 130
"""What a shell reports for a program ended by the interrupt key."""
EXIT_BROKEN_PIPE = 141
"""What a shell reports for a program whose output nobody reads any more."""

_SECONDS_TO_REPORT = 1.0

_NO_SPACE = frozenset({errno.EROFS, errno.ENOSPC, errno.EDQUOT})
_ENVIRONMENT_ERRORS = _NO_SPACE | {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR}
"""Failures of the operating system that only the user can mend; any other one may well be a defect of ours."""


def run_tool(main: Callable[[], None], program: str) -> NoReturn:
    """Run ``main`` and leave the process: ``PROGRAM: error: ...`` on standard error and the status of a ToldError.

    The operating system's refusals (no permission, full disk, ...) are told so too; any other exception is a defect and
    passes through with its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # where the encoding lacks a character, a '?' beats a traceback
            stream.reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
    except RepeatedError as error:
        # torchrun ends all ranks as soon as one has ended: let the one that reports the mistake do so first.
        time.sleep(_SECONDS_TO_REPORT)
        sys.exit(error.status)
    except PreemptedError as error:
        sys.stderr.write(f"{program}: {error}\n")
        sys.exit(error.exit_status)
    except ToldError as error:
        _fail(program, str(error), error.exit_status)
    except BrokenPipeError:
        # The reader of our output has left (`... | head`): what is still buffered goes nowhere, without a complaint
        # when the interpreter flushes it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BROKEN_PIPE)
    except OSError as error:
        if error.errno not in _ENVIRONMENT_ERRORS:
            raise
        _fail(
            program,
            f"{error.filename or 'a file'}: {error.strerror}; check the path, its permissions and the space left",
            exit_status(error),
        )
    except KeyboardInterrupt:
        sys.stderr.write(f"{program}: interrupted\n")
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(0)


def exit_status(error: BaseException) -> int:
    """The status that :func:`run_tool` leaves the process with for ``error``; 1 for a defect."""
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, OSError) and error.errno in _ENVIRONMENT_ERRORS:
        return EXIT_NO_SPACE if error.errno in _NO_SPACE else EXIT_INPUT_ERROR
    return exit_status_of(error)


def _fail(program: str, message: str, status: int) -> NoReturn:
    sys.stderr.write(f"{program}: error: {' '.join(message.split())}\n")
    sys.exit(status)
