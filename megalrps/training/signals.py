"""What a rank does when the world around it ends."""

import ctypes
import os
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


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
