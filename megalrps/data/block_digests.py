"""SHA-256 digests of every block of a dataset's two files: what lets a part of a large file be checked alone.

``PREFIX.blocks`` holds a 32-byte digest (a leaf) of every block of ``PREFIX.bin``, then of ``PREFIX.idx``; the
increment manifest holds one digest of each group of leaves (a Merkle tree of two levels). With blocks of 1 MiB and
groups of 4096, one block of a file of any size is checked by reading 128 KiB of leaves and the block.

====== ====== ==================================================
offset bytes  content
====== ====== ==================================================
0      16     magic ``megalrps blocks\\0``
16     8      blocks of ``PREFIX.bin`` B, uint64, little-endian
24     8      blocks of ``PREFIX.idx`` I, uint64, little-endian
32     32 B   SHA-256 of each block of ``PREFIX.bin``
..     32 I   SHA-256 of each block of ``PREFIX.idx``
====== ====== ==================================================

The last block of a file is as long as what is left of it; an empty file has no block.
"""

import hashlib
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from megalrps.files import write_all

BLOCK_BYTES = 1 << 20
"""Large enough that the leaves are 0.003 % of the data, small enough to be fetched alone."""
GROUP_BLOCKS = 4096
LEAF_BYTES = 32

Bytes = bytes | bytearray | memoryview

_HEADER = struct.Struct("<16sQQ")
_MAGIC = b"megalrps blocks\x00"
HEADER_BYTES = _HEADER.size


@dataclass(frozen=True)
class BlockDigests:
    """The digests of all groups of leaves, as the manifest holds them (64 hexadecimal digits each)."""

    block_bytes: int
    """Bytes of one block, but for the last of a file."""
    group_blocks: int
    """Leaves of one group, but for the last of a file."""
    bin_groups: tuple[str, ...]
    idx_groups: tuple[str, ...]

    def file_bytes(self, bin_bytes: int, idx_bytes: int) -> int:
        """Size of ``PREFIX.blocks`` for files of these sizes."""
        return HEADER_BYTES + LEAF_BYTES * sum(block_count(size, self.block_bytes) for size in (bin_bytes, idx_bytes))

    def check(self, bin_bytes: int, idx_bytes: int) -> None:
        """Raise ValueError for values that no pair of files of these sizes can have."""
        if not 64 <= self.block_bytes <= 1 << 26 or self.block_bytes % 8 or not 1 <= self.group_blocks <= 1 << 20:
            raise ValueError(f"blocks of {self.block_bytes} bytes in groups of {self.group_blocks} are not usable")
        for name, size, groups in (("bin", bin_bytes, self.bin_groups), ("idx", idx_bytes, self.idx_groups)):
            expected = -(-block_count(size, self.block_bytes) // self.group_blocks)
            if len(groups) != expected:
                raise ValueError(f"{len(groups)} digests of groups for a .{name} of {size} bytes, not {expected}")


@dataclass(frozen=True)
class DatasetDigests:
    """All digests of a dataset."""

    bin_digest: str
    """SHA-256 of the whole ``PREFIX.bin``, 64 hexadecimal digits."""
    idx_digest: str
    """SHA-256 of the whole ``PREFIX.idx``."""
    blocks: BlockDigests


def block_count(size: int, block_bytes: int) -> int:
    """Blocks of a file of ``size`` bytes."""
    return -(-size // block_bytes)


def blocks_header(bin_blocks: int, idx_blocks: int) -> bytes:
    """The first bytes of ``PREFIX.blocks``."""
    return _HEADER.pack(_MAGIC, bin_blocks, idx_blocks)


def group_digests(leaves: bytes, group_blocks: int) -> tuple[str, ...]:
    """Digests of the groups of ``leaves``, those of one file end to end."""
    step = group_blocks * LEAF_BYTES
    return tuple(hashlib.sha256(leaves[at : at + step]).hexdigest() for at in range(0, len(leaves), step))


class LeafWriter:
    """Writes a ``PREFIX.blocks`` to an open file, from its start: the leaves of ``.bin``, then those of ``.idx``.

    Memory: the leaves of one group.
    """

    def __init__(self, descriptor: int, group_blocks: int = GROUP_BLOCKS) -> None:
        self._descriptor = descriptor
        self._group_bytes = group_blocks * LEAF_BYTES
        self._pending = bytearray()
        self._groups: list[str] = []
        self._counts: list[int] = []
        self._count = 0
        write_all(descriptor, bytes(HEADER_BYTES))

    def add(self, leaves: Bytes) -> None:
        """Append leaves, 32 bytes each."""
        self._pending += memoryview(leaves)
        while len(self._pending) >= self._group_bytes:
            self._put(self._group_bytes)

    def end_file(self) -> tuple[str, ...]:
        """End the leaves of one file: the digests of its groups."""
        if self._pending:
            self._put(len(self._pending))
        groups, self._groups = tuple(self._groups), []
        self._counts.append(self._count)
        self._count = 0
        return groups

    def finish(self) -> None:
        """After both files have ended: write the header, and flush all to the disk."""
        os.pwrite(self._descriptor, blocks_header(*self._counts), 0)
        os.fsync(self._descriptor)

    def _put(self, size: int) -> None:
        group = bytes(self._pending[:size])
        self._groups.append(hashlib.sha256(group).hexdigest())
        write_all(self._descriptor, group)
        self._count += size // LEAF_BYTES
        del self._pending[:size]


class DigestingFile:
    """A file written from its start to its end, with both kinds of digests computed from the bytes on their way."""

    def __init__(self, descriptor: int, leaves: LeafWriter, block_bytes: int = BLOCK_BYTES) -> None:
        self._descriptor = descriptor
        self._leaves = leaves
        self._block_bytes = block_bytes
        self._whole = hashlib.sha256()
        self._pending = bytearray()

    def write(self, content: Bytes) -> None:
        """Append ``content``."""
        view = memoryview(content)
        view = view.cast("B") if view.nbytes else memoryview(b"")  # a view of no bytes cannot be cast
        if self._pending:
            missing = self._block_bytes - len(self._pending)
            self._pending += view[:missing]
            view = view[missing:]
            if len(self._pending) < self._block_bytes:
                return
            self._put(self._pending)
            self._pending = bytearray()
        full = len(view) - len(view) % self._block_bytes
        for at in range(0, full, self._block_bytes):
            self._put(view[at : at + self._block_bytes])
        self._pending += view[full:]

    def finish(self) -> tuple[str, tuple[str, ...]]:
        """Flush all to the disk: the digest of the whole file, and those of its groups."""
        if self._pending:
            self._put(self._pending)
            self._pending = bytearray()
        os.fsync(self._descriptor)
        return self._whole.hexdigest(), self._leaves.end_file()

    def _put(self, block: Bytes) -> None:
        write_all(self._descriptor, block)
        self._whole.update(block)
        self._leaves.add(hashlib.sha256(block).digest())


def merged_ranges(numbers: Iterable[int], block_bytes: int, size: int) -> tuple[tuple[int, int], ...]:
    """Byte ranges [start, end) of the blocks ``numbers`` (sorted) of a file of ``size`` bytes, neighbours joined."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        start, end = number * block_bytes, min((number + 1) * block_bytes, size)
        if ranges and ranges[-1][1] == start:
            start, _ = ranges.pop()
        ranges.append((start, end))
    return tuple(ranges)
