"""The input files themselves: whether they are the same as last time, and their digests, made while they are read."""

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from megalrps.errors import InputError

_READ_BYTES = 1 << 20

FileState = tuple[int, int, int, int]
"""Size, times of the last change of content and of inode, inode: equal where nobody has touched the file."""


def input_states(paths: Sequence[Path]) -> tuple[FileState, ...]:
    """The state of each file."""
    found = [path.stat() for path in paths]
    return tuple((each.st_size, each.st_mtime_ns, each.st_ctime_ns, each.st_ino) for each in found)


def check_unchanged(paths: Sequence[Path], states: Sequence[FileState]) -> None:
    """Raise InputError where a file is no longer in the state that it was in when the work began."""
    for path, before, now in zip(paths, states, input_states(paths), strict=True):
        if before != now:
            raise InputError(f"{path}: changed while it was read; run again when nobody writes it")


class FollowingDigests:
    """SHA-256 of the input files, computed by a thread that stays close to where the files are read; a context manager.

    Behind the readers it finds every byte still in the system's cache: no disk is asked twice.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        self._numbers = {str(path): number for number, path in enumerate(paths)}
        self._goal = (0, 0)  # number of a file, and a position in it
        self._goal_moves = threading.Condition()
        self._left = False
        self._digests: list[dict[str, Any]] = []
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="input digests", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._left = True
        self._move(len(self._paths), 0)
        self._thread.join()

    def reach(self, path: str, position: int) -> None:
        """The files before ``path``, and ``path`` up to ``position``, are being read or have been."""
        self._move(self._numbers[path], position)

    def finish(self) -> list[dict[str, Any]]:
        """Size and SHA-256 of each file; waits for the rest of them."""
        self._move(len(self._paths), 0)
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._digests

    def _move(self, number: int, position: int) -> None:
        with self._goal_moves:
            self._goal = max(self._goal, (number, position))
            self._goal_moves.notify()

    def _run(self) -> None:
        try:
            for number, path in enumerate(self._paths):
                with open(path, "rb", buffering=0) as file:
                    self._digests.append(self._digest(number, file))
        except Exception as error:  # told to whoever asks for the digests
            self._error = error

    def _digest(self, number: int, file: IO[bytes]) -> dict[str, Any]:
        digest, position = hashlib.sha256(), 0
        while not self._left:
            with self._goal_moves:
                while self._goal <= (number, position):
                    self._goal_moves.wait()
                goal = self._goal
            most = _READ_BYTES if goal[0] > number else min(_READ_BYTES, goal[1] - position)
            block = file.read(most)
            if not block:
                break
            digest.update(block)
            position += len(block)
        return {"bytes": position, "sha256": digest.hexdigest()}
