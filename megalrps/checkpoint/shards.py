"""Shard files: the raw bytes of one rank's chunks, hashed while they are written, read back where they are wanted.

SHA-256 is as fast as one core, and of one file cannot be shared out over several: a rank writes files of a bounded
size, so that whoever loads them has several to hash at once.
"""

import hashlib
import os
import stat
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from megalrps.files import write_all

ALIGNMENT_BYTES = 64
"""Each chunk begins at a multiple of this, so that a mapped file can be read as an array of any type."""

FILE_BYTES = 128 << 20
"""A rank begins another file once the last holds this much; a chunk is never cut."""

_BLOCK_BYTES = 8 << 20
_HASHED_BYTES = 1 << 20  # what is read stays in a core's own cache until it is hashed
_INLINE_BYTES = 1 << 18


@dataclass(frozen=True)
class Shard:
    """One file of a checkpoint: its name, its size in bytes and the SHA-256 of its content in hexadecimal digits."""

    file: str
    bytes: int
    sha256: str


class ShardWriter:
    """Writes a new shard file, to be used in a ``with`` block; the file is durable once :meth:`finish` has returned.

    SHA-256 runs on a thread beside the write of the same block: both leave the interpreter lock, and neither is
    faster than a disk. Raises OSError as the file system does (FileExistsError: the file is there already).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self._position = 0
        self._hasher = ThreadPoolExecutor(max_workers=1)
        # Read-only from the first byte: no later open() for writing succeeds by mistake.
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._hasher.shutdown()
        os.close(self._descriptor)

    @property
    def position(self) -> int:
        """How many bytes it holds."""
        return self._position

    def append(self, content: memoryview) -> int:
        """Append ``content`` (bytes, one dimension) at the next aligned position and return that position."""
        self._write(memoryview(bytes(-self._position % ALIGNMENT_BYTES)))
        start = self._position
        for block in range(0, len(content), _BLOCK_BYTES):
            self._write(content[block : block + _BLOCK_BYTES])
        return start

    def finish(self) -> Shard:
        """Flush the file to the disk and say what it holds."""
        os.fsync(self._descriptor)
        return Shard(self._path.name, self._position, self._digest.hexdigest())

    def _write(self, block: memoryview) -> None:
        if len(block) < _INLINE_BYTES:
            self._digest.update(block)
            write_all(self._descriptor, block)
        else:
            hashed = self._hasher.submit(self._digest.update, block)
            try:
                write_all(self._descriptor, block)
            finally:
                hashed.result()
        self._position += len(block)


class ShardFiles:
    """Writes what one rank holds into new files, ``path`` and as many beside it as it takes; for a ``with`` block.

    While one file is written, the one before it is flushed to the disk on a thread.
    """

    def __init__(self, path: Path, file_bytes: int = FILE_BYTES) -> None:
        self._path = path
        self._file_bytes = file_bytes
        self._writer: ShardWriter | None = None
        self._flusher = ThreadPoolExecutor(max_workers=1)
        self._flushed: list[Future[Shard]] = []

    def __enter__(self) -> "ShardFiles":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flusher.shutdown()
        if self._writer is not None:
            self._writer.close()

    def append(self, content: memoryview) -> tuple[int, int]:
        """Append ``content`` (bytes, one dimension); which of the files holds it, from 0, and its position there."""
        if self._writer is not None and self._writer.position >= self._file_bytes:
            self._flush()
        number = len(self._flushed)
        if self._writer is None:
            place = self._path if number == 0 else self._path.with_suffix(f".{number:04d}{self._path.suffix}")
            self._writer = ShardWriter(place)
        return number, self._writer.append(content)

    def finish(self) -> list[Shard]:
        """What each file holds, once all are durable. Raises OSError as the file system does."""
        self._flush()
        return [flushed.result() for flushed in self._flushed]

    def _flush(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            self._flushed.append(self._flusher.submit(_finish, writer))


def _finish(writer: ShardWriter) -> Shard:
    with writer:
        return writer.finish()


@contextmanager
def open_shard(path: Path) -> Iterator[int]:
    """A descriptor of the regular file ``path``, for reading; a symbolic link, a pipe or a directory raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is not a regular file")
        yield descriptor
    finally:
        os.close(descriptor)


def read_into(descriptor: int, position: int, target: memoryview) -> None:
    """Fill ``target`` (writable bytes) from ``position`` on; raises OSError when the file ends before."""
    while len(target):
        count = os.preadv(descriptor, [target], position)
        if count == 0:
            raise OSError(f"the file ends at byte {position}, {len(target)} bytes short")
        position, target = position + count, target[count:]


def damage(directory: Path, shard: Shard, content: bool) -> str | None:
    """What is wrong with ``shard`` in ``directory``, in words that name the file, or None.

    Looks at the kind and size of the file, and with ``content`` also at every byte of it.
    """
    try:
        with open_shard(directory / shard.file) as descriptor:
            size = os.fstat(descriptor).st_size
            if size != shard.bytes:
                return f"{shard.file} has {size} bytes instead of {shard.bytes}"
            if content and _digest_of(descriptor) != shard.sha256:
                return f"{shard.file} does not have the SHA-256 it was saved with"
    except OSError as error:
        return f"{shard.file} cannot be read ({error.strerror or error})"
    return None


def _digest_of(descriptor: int) -> str:
    digest, block, position = hashlib.sha256(), bytearray(_HASHED_BYTES), 0
    while count := os.preadv(descriptor, [block], position):
        digest.update(memoryview(block)[:count])
        position += count
    return digest.hexdigest()
