"""``run_state.json``: how the launch that trains a run's paths stands, or how it ended, for scripts and people.

torchrun turns every exit status into 1; this file keeps the launch's own. Nothing is decided by it: who trains which
path is for the leases to say, what is trained for the lineage.
"""

import os
import socket
from collections.abc import Collection
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megalrps.checkpoint.errors import FencedError
from megalrps.checkpoint.publication import Publisher
from megalrps.commandline import exit_status
from megalrps.errors import PreemptedError
from megalrps.files import write_json
from megalrps.training.state import TrainState

FORMAT = 1


class RunState:
    """The file of one launch, kept by its first rank while it holds the leases of ``paths``, in a ``with`` block.

    Written when the block begins and by how it ends. A launch whose paths another has taken over leaves the file alone:
    it is the other's by then.
    """

    def __init__(self, file: Path, publisher: Publisher, paths: Collection[str], world_size: int) -> None:
        self._file = file
        self._publisher = publisher
        self.trained: TrainState | None = None
        """What ``path`` and ``step`` are told from, once there is one."""
        self._told: dict[str, Any] = {
            "format": FORMAT,
            "state": "running",
            "exit_status": None,
            "message": None,
            "reason": None,
            "paths": sorted(paths),
            "path": None,
            "step": None,
            "checkpoint": None,
            "launch": publisher.leases.owner,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "world_size": world_size,
            "started": _now(),
        }

    def ended(self, error: BaseException | None) -> None:
        """Write how the launch ends: by ``error``, or well."""
        status = 0 if error is None else exit_status(error)
        self._write(
            state="finished" if error is None else "preempted" if isinstance(error, PreemptedError) else "failed",
            exit_status=status,
            message=None if error is None else " ".join(str(error).split()) or type(error).__name__,
            reason=error.reason if isinstance(error, PreemptedError) else None,
        )

    def __enter__(self) -> Self:
        self._write()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.ended(None)
            return
        with suppress(OSError):  # a full disk may be why the block ends
            self.ended(error)

    def _write(self, **news: Any) -> None:
        if self.trained is not None and self.trained.path is not None:
            path = self.trained.path
            newest = self._publisher.heads.get(path) or self.trained.checkpoint  # where the path has none, its parent's
            news |= {"path": path, "step": self.trained.step, "checkpoint": newest}
        self._told |= {**news, "updated": _now()}
        with self._publisher.references.locked() as locked, suppress(FencedError):
            self._publisher.leases.check_all(locked)
            write_json(self._file, self._told)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
