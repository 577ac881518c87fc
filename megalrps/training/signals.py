"""What a rank does when it is asked to stop, and when the world around it ends."""

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

STOP_REASONS: tuple[str | None, ...] = (None, "--exit-interval", "--exit-duration-in-mins", "SIGUSR1", "SIGTERM")
"""Why a run saves and leaves before its plan is done; where ranks have several, the last of them counts."""

GRACE_SECONDS = 30
"""After so many seconds torchrun kills the ranks that it has passed a SIGTERM on to."""
SAFE_GRACE_SECONDS = 25
"""What one update and one save may take together to fit into it."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StopRequest:
    """Whether this process was asked to save and leave, by a signal or by its time being up.

    A batch system sends SIGTERM, or SIGUSR1 some time before a job's end; torchrun passes SIGTERM on and kills what is
    still there 30 seconds later. The handler only takes note: the loop acts on it after the update, with all ranks.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self._signal: str | None = None
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def reason(self) -> str | None:
        """One of STOP_REASONS."""
        if self._signal is None and self._deadline is not None and time.monotonic() >= self._deadline:
            return "--exit-duration-in-mins"
        return self._signal

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Take note of the signals while the block runs, instead of dying of them; for the main thread."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name


def die_with_launcher() -> None:
    """Have the kernel kill this rank when the launcher that started it dies, however it dies.

    torchrun gives its workers sessions of their own: killed with -9, or by a batch system's hard limit, it leaves them
    training, and they would write beside the next launch on the same directory. Linux only, as the project is.
    """
    launcher = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != launcher or not _is_python(launcher):  # it died before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)


def _is_python(process: int) -> bool:
    """Whether the process is a Python program, as torchrun is; what adopts orphans (init, systemd, tini) is not one.

    Its number does not tell: in a container torchrun itself may be process 1.
    """
    try:
        program = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")[0]
    except OSError:
        return False
    return b"python" in program or b"torch" in program
