"""Files that are either whole or absent: written beside their place, flushed to the disk, then renamed into it."""

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def sync_file(path: Path) -> None:
    """Make what has been written to the file ``path``, by whomever, durable; not its name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Make the entries of ``directory`` durable (a rename is not, until its directory is synced)."""
    sync_file(directory)


def write_all(descriptor: int, content: bytes | bytearray | memoryview) -> None:
    """Write all of ``content`` where the open file stands; OSError where the disk takes no more."""
    view = memoryview(content).cast("B")
    while len(view):
        view = view[os.write(descriptor, view) :]


@contextmanager
def replacing(path: Path | str) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of ``path`` when the block ends, and leaves no trace when it raises.

    A reader sees the old file or the whole new one, never a part, also after a crash.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_directory(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path`` atomically and durably.

    By the calls of ``os`` alone: tests of power loss record those and replay what a disk may have kept of them.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        try:
            write_all(descriptor, text.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_json(path: Path | str, value: Any) -> None:
    """Write ``value`` as indented JSON to ``path`` atomically and durably."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def locked(path: Path | str) -> Iterator[None]:
    """Hold the lock file ``path`` (made where it is not) while the block runs; waits for who holds it.

    ``flock``: between processes, and threads, of one host, and over NFS from version 4 on where the server passes locks
    on.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
