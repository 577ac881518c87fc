"""kill -9 of this process at a place in a save: a byte of its shard, a file operation, a step of the protocol."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from megalrps.checkpoint import garbage, publication, references, shards, storage, store

OPERATIONS = ("mkdir", "open", "write", "fsync", "replace", "rename", "unlink", "rmdir", "close")


def die() -> NoReturn:
    """End this process as ``kill -9`` does: nothing of Python runs any more."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


class DiesAtByte:
    """Once :meth:`arm` is called, the process dies when it has written ``bytes_`` more bytes of shard files."""

    def __init__(self) -> None:
        self._left: int | None = None
        self._shards: set[int] = set()
        self._open, self._write = os.open, os.write
        os.open, os.write = self._opening, self._writing  # type: ignore[assignment]

    def arm(self, bytes_: int) -> None:
        """Die after so many bytes of shards from here on."""
        self._left = bytes_

    def _opening(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        descriptor = self._open(path, flags, *args, **kwargs)
        if flags & os.O_WRONLY and Path(path).suffix == ".bin":
            self._shards.add(descriptor)
        else:
            self._shards.discard(descriptor)
        return descriptor

    def _writing(self, descriptor: int, content: Any) -> int:
        if self._left is None or descriptor not in self._shards:
            return self._write(descriptor, content)
        if self._left <= len(content):
            self._write(descriptor, memoryview(content)[: self._left])
            die()
        self._left -= len(content)
        return self._write(descriptor, content)


class DiesAtOperation:
    """Once :meth:`arm` is called, the process dies before its n-th file operation, or after it.

    After a write: after half of it.
    """

    def __init__(self) -> None:
        self.done, self._at, self._after, self._pausing = 0, 0, False, False
        for name in OPERATIONS:
            setattr(os, name, self._wrapped(name, getattr(os, name)))

    def arm(self, operation: int, after: bool) -> None:
        """Die at the ``operation``-th operation from here on (counted from 1)."""
        self.done, self._at, self._after = 0, operation, after

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Neither count nor die at what the block does."""
        self._pausing = True
        yield
        self._pausing = False

    def _wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operate(*args: Any, **kwargs: Any) -> Any:
            self.done += not self._pausing
            if self._pausing or self.done != self._at:
                return original(*args, **kwargs)
            if self._after and name == "write":
                original(args[0], args[1][: max(1, len(args[1]) // 2)])
            elif self._after:
                original(*args, **kwargs)
            die()

        return operate


POINTS: dict[str, tuple[Any, str]] = {
    "after the shard": (shards.ShardWriter, "finish"),
    "after the manifest": (storage, "write_text"),
    "after the rename": (storage.CheckpointWriter, "_commit"),
    "after the references of forks and releases": (publication.Publisher, "_keep"),
    "after the reference": (references.LockedReferences, "move"),
    "after the save": (store.Store, "save"),
    "after a removal's rename": (garbage, "hide"),
}
"""The steps of the protocol, by what has just returned when the process dies."""


def die_at(point: str) -> None:
    """Let this process die as soon as the function that ``point`` names returns."""
    owner, name = POINTS[point]
    original = getattr(owner, name)

    def reach(*args: Any, **kwargs: Any) -> Any:
        original(*args, **kwargs)
        die()

    setattr(owner, name, reach)
