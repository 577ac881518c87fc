"""Reading files in blocks and comparing them with their digests, several blocks at a time.

hashlib lets go of the interpreter's lock, so threads hash as many blocks at once as there are cores.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self

from megalrps.data.block_digests import (
    HEADER_BYTES,
    LEAF_BYTES,
    BlockDigests,
    DatasetDigests,
    LeafWriter,
    block_count,
    blocks_header,
    merged_ranges,
)
from megalrps.data.index_format import REMAKE, bin_path, blocks_path, idx_path
from megalrps.data.index_writer import locked_partial, partial_path
from megalrps.errors import InputError
from megalrps.files import sync_directory

Part = Literal["bin", "idx"]
_TASK_BLOCKS = 8
"""Blocks that a thread takes at once: to hand over one costs as much as hashing 50 KB."""
_AHEAD = 4


class RangeReader(Protocol):
    """A file, here or far, of which parts can be read by several threads at once."""

    name: str
    """What messages call it."""
    size: int
    threads: int
    """How many read from it at once with profit."""

    def read(self, start: int, size: int) -> bytes:
        """Exactly ``size`` bytes from ``start`` on; InputError, naming the file, where they cannot be had."""


class LocalFile:
    """A file of this machine; a context manager. InputError where it cannot be opened."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.threads = available_threads()
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; check the data path, or {REMAKE}") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); check the data path") from error
        self.size = os.fstat(self._descriptor).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def read(self, start: int, size: int) -> bytes:
        """See :class:`RangeReader`."""
        try:
            content = os.pread(self._descriptor, size, start)
            while len(content) < size and (
                more := os.pread(self._descriptor, size - len(content), start + len(content))
            ):
                content += more
        except OSError as error:
            raise InputError(f"{self.name}: cannot be read ({error.strerror}); check the data path") from error
        if len(content) != size:
            raise InputError(f"{self.name}: ends before byte {start + size}: cut short; {REMAKE}")
        return content


class Leaves:
    """The digests of single blocks out of ``PREFIX.blocks``, each group compared with the manifest's before it is used.

    A file of the wrong size or header is an InputError at once, a group that was changed when it is asked for.
    """

    def __init__(self, file: RangeReader, blocks: BlockDigests, bin_bytes: int, idx_bytes: int) -> None:
        self._file = file
        self._groups = {"bin": blocks.bin_groups, "idx": blocks.idx_groups}
        self._per_group = blocks.group_blocks
        self._counts = {
            "bin": block_count(bin_bytes, blocks.block_bytes),
            "idx": block_count(idx_bytes, blocks.block_bytes),
        }
        header = blocks_header(self._counts["bin"], self._counts["idx"])
        if file.size != blocks.file_bytes(bin_bytes, idx_bytes) or file.read(0, HEADER_BYTES) != header:
            raise InputError(
                f"{file.name}: not the digests of these blocks: cut short, or of another dataset; {REMAKE}"
            )

    def offset(self, part: Part, block: int) -> int:
        """Where the leaf of ``block`` stands in the file."""
        return HEADER_BYTES + LEAF_BYTES * (block + (self._counts["bin"] if part == "idx" else 0))

    def group(self, part: Part, number: int) -> bytes:
        """All leaves of one group, end to end. InputError where they were changed."""
        first = number * self._per_group
        count = min(self._per_group, self._counts[part] - first)
        start = self.offset(part, first)
        leaves = self._file.read(start, LEAF_BYTES * count)
        if hashlib.sha256(leaves).hexdigest() != self._groups[part][number]:
            raise InputError(
                f"{self._file.name}: changed since its manifest was written (bytes {start} to {start + len(leaves)} do "
                f"not have its SHA-256); {REMAKE}"
            )
        return leaves

    def of_blocks(self, part: Part, blocks: Iterable[int]) -> dict[int, bytes]:
        """The leaves of some blocks; InputError as :meth:`group`."""
        found: dict[int, bytes] = {}
        groups: dict[int, bytes] = {}
        for block in blocks:
            number, place = divmod(block, self._per_group)
            if number not in groups:
                groups[number] = self.group(part, number)
            found[block] = groups[number][LEAF_BYTES * place : LEAF_BYTES * (place + 1)]
        return found


def check_blocks(file: RangeReader, leaves: dict[int, bytes], block_bytes: int) -> None:
    """Read the blocks that have ``leaves`` and compare; InputError names the file and those that were changed."""
    if not leaves:
        return
    with ThreadPoolExecutor(min(file.threads, len(leaves))) as pool:
        found = pool.map(lambda block: block_leaf(file, block, block_bytes), leaves)
        wrong = [block for block, leaf in zip(leaves, found, strict=True) if leaf != leaves[block]]
    if wrong:
        raise InputError(f"{changed_words(file.name, wrong, block_bytes, file.size)}; {REMAKE}")


def differing_blocks(found: bytes, stored: bytes) -> list[int]:
    """Places at which two rows of leaves differ."""
    places = range(0, len(found), LEAF_BYTES)
    return [at // LEAF_BYTES for at in places if found[at : at + LEAF_BYTES] != stored[at : at + LEAF_BYTES]]


def changed_words(name: str, blocks: list[int], block_bytes: int, size: int) -> str:
    """What to say of changed blocks (sorted)."""
    ranges = [f"{start}-{end - 1}" for start, end in merged_ranges(sorted(blocks), block_bytes, size)]
    told = ", ".join(ranges[:8]) + (f" and {len(ranges) - 8} more" if len(ranges) > 8 else "")
    return f"{name}: changed since its manifest was written (SHA-256 of bytes {told} differs)"


def block_leaf(file: RangeReader, block: int, block_bytes: int) -> bytes:
    """SHA-256 of one block of a file."""
    start = block * block_bytes
    return hashlib.sha256(file.read(start, min(block_bytes, file.size - start))).digest()


def group_leaves(file: RangeReader, number: int, blocks: BlockDigests, pool: ThreadPoolExecutor) -> Iterator[bytes]:
    """The leaves of group ``number`` of a file, computed from its bytes by the threads of ``pool``, in order."""
    first = number * blocks.group_blocks
    end = min(first + blocks.group_blocks, block_count(file.size, blocks.block_bytes))

    def some(start: int) -> bytes:
        numbers = range(start, min(start + _TASK_BLOCKS, end))
        return b"".join(block_leaf(file, block, blocks.block_bytes) for block in numbers)

    return pool.map(some, range(first, end, _TASK_BLOCKS))


def available_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def digest_dataset(
    prefix: Path | str, block_bytes: int, group_blocks: int, inspect: Callable[[bytes], None]
) -> DatasetDigests:
    """Read both files of ``prefix`` once for all their digests, and write its ``PREFIX.blocks``.

    ``inspect`` is called with each block of ``PREFIX.bin``, in no order, by several threads; what it raises is raised.
    """
    path = blocks_path(prefix)
    with locked_partial(path) as descriptor, ThreadPoolExecutor(available_threads()) as pool:
        leaves = LeafWriter(descriptor, group_blocks)
        bin_digest = _digest_file(bin_path(prefix), block_bytes, leaves, pool, inspect)
        bin_groups = leaves.end_file()
        idx_digest = _digest_file(idx_path(prefix), block_bytes, leaves, pool, None)
        idx_groups = leaves.end_file()
        leaves.finish()
        partial_path(path).replace(path)
        sync_directory(path.parent)
    return DatasetDigests(bin_digest, idx_digest, BlockDigests(block_bytes, group_blocks, bin_groups, idx_groups))


def _digest_file(
    path: Path, block_bytes: int, leaves: LeafWriter, pool: ThreadPoolExecutor, inspect: Callable[[bytes], None] | None
) -> str:
    """Add the leaves of ``path`` to ``leaves``: the digest of the whole file."""

    def leaf(block: bytes) -> bytes:
        if inspect is not None:
            inspect(block)
        return hashlib.sha256(block).digest()

    whole = hashlib.sha256()
    waiting: deque[Future[bytes]] = deque()
    with open(path, "rb") as file:
        while block := file.read(block_bytes):
            waiting.append(pool.submit(leaf, block))
            whole.update(block)  # one after the other by its nature; the threads do the rest meanwhile
            if len(waiting) > _AHEAD * available_threads():
                leaves.add(waiting.popleft().result())
    for future in waiting:
        leaves.add(future.result())
    return whole.hexdigest()
