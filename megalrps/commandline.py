"""How every command line of the project ends: status 0, or one line for the user and status 2, or our own traceback."""

import errno
import io
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from megalrps.errors import EXIT_INPUT_ERROR, InputError, RepeatedError

EXIT_INTERRUPTED = 130
"""What a shell reports for a program ended by the interrupt key."""
EXIT_BROKEN_PIPE = 141
"""What a shell reports for a program whose output nobody reads any more."""

_SECONDS_TO_REPORT = 1.0

_ENVIRONMENT_ERRORS = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.ENAMETOOLONG,
        errno.EISDIR,
        errno.ENOTDIR,
    }
)
"""Failures of the operating system that only the user can mend; any other one may well be a defect of ours."""


def run_tool(main: Callable[[], None], program: str) -> NoReturn:
    """Run ``main`` and leave the process: ``PROGRAM: error: ...`` on standard error and status 2 for the user's errors.

    Those are InputError and the operating system's refusals (no permission, full disk, ...); any other exception is a
    defect and passes through with its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # where the encoding lacks a character, a '?' beats a traceback
            stream.reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
    except RepeatedError:
        # torchrun ends all ranks as soon as one has ended: let the one that reports the mistake do so first.
        time.sleep(_SECONDS_TO_REPORT)
        sys.exit(EXIT_INPUT_ERROR)
    except InputError as error:
        _fail(program, str(error))
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
        )
    except KeyboardInterrupt:
        sys.stderr.write(f"{program}: interrupted\n")
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(0)


def _fail(program: str, message: str) -> NoReturn:
    sys.stderr.write(f"{program}: error: {' '.join(message.split())}\n")
    sys.exit(EXIT_INPUT_ERROR)
