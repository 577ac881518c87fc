"""Every byte of an increment's files against the digests in its manifest, by as many threads as there are cores."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass

from megalrps.data.block_digests import LEAF_BYTES, BlockDigests, block_count
from megalrps.data.block_reading import (
    Leaves,
    Part,
    RangeReader,
    changed_words,
    differing_blocks,
    group_leaves,
)
from megalrps.data.index_format import REMAKE
from megalrps.data.manifest import IncrementManifest
from megalrps.errors import InputError

_READ_BYTES = 1 << 20

OpenFile = Callable[[str], AbstractContextManager[RangeReader]]
"""Opens the file of the increment whose name ends so (``.bin``); InputError where that cannot be."""
Advance = Callable[[int], None]
"""Told the bytes that were read since the last call."""


@dataclass(frozen=True)
class BadFile:
    """A file that is missing, damaged, or not the one that the manifest describes."""

    path: str
    complaint: str
    """One line that names the file and the mend."""


def changed_files(manifest: IncrementManifest, prefix: str, open_file: OpenFile, advance: Advance) -> Iterator[BadFile]:
    """Read all files of the increment and name every one that is not what ``manifest`` describes, the index first.

    With digests of blocks the complaint names the bytes that were changed; without, the file is compared as a whole.
    """
    blocks = manifest.blocks
    if blocks is None:
        for suffix, expected in ((".idx", manifest.idx_digest), (".bin", manifest.bin_digest)):
            yield from _changed_whole(prefix, suffix, expected, open_file, advance)
        return
    yield from _damaged_leaves(manifest, blocks, prefix, open_file)
    parts: tuple[tuple[Part, int], ...] = (("idx", manifest.idx_bytes), ("bin", manifest.bin_bytes))
    for part, size in parts:
        name = f"{prefix}.{part}"
        try:
            with open_file(f".{part}") as file:
                wrong = _changed_blocks(file, part, manifest, blocks, open_file, advance)
                if wrong and file.size != size:
                    yield BadFile(name, f"{name}: has {file.size} bytes where its manifest says {size}; {REMAKE}")
                elif wrong:
                    yield BadFile(name, f"{changed_words(name, wrong, blocks.block_bytes, size)}; {REMAKE}")
        except InputError as error:
            yield BadFile(name, str(error))


def _changed_whole(prefix: str, suffix: str, expected: str, open_file: OpenFile, advance: Advance) -> Iterator[BadFile]:
    name = prefix + suffix
    digest = hashlib.sha256()
    try:
        with open_file(suffix) as file:
            for start in range(0, file.size, _READ_BYTES):
                block = file.read(start, min(_READ_BYTES, file.size - start))
                digest.update(block)
                advance(len(block))
    except InputError as error:
        yield BadFile(name, str(error))
        return
    if digest.hexdigest() != expected:
        yield BadFile(name, f"{name}: changed since its manifest was written (SHA-256 differs); {REMAKE}")


def _damaged_leaves(
    manifest: IncrementManifest, blocks: BlockDigests, prefix: str, open_file: OpenFile
) -> Iterator[BadFile]:
    try:
        with open_file(".blocks") as file:
            leaves = Leaves(file, blocks, manifest.bin_bytes, manifest.idx_bytes)
            for number in range(len(blocks.bin_groups)):
                leaves.group("bin", number)
            for number in range(len(blocks.idx_groups)):
                leaves.group("idx", number)
    except InputError as error:
        yield BadFile(f"{prefix}.blocks", str(error))


def _changed_blocks(
    file: RangeReader,
    part: Part,
    manifest: IncrementManifest,
    blocks: BlockDigests,
    open_file: OpenFile,
    advance: Advance,
) -> list[int]:
    """The blocks of ``file`` that were changed; where their own digests are lost, all of their group.

    A size that the manifest does not say is no reason yet: where the bytes have their digests, the manifest is wrong.
    """
    groups = blocks.bin_groups if part == "bin" else blocks.idx_groups
    if -(-block_count(file.size, blocks.block_bytes) // blocks.group_blocks) != len(groups):
        return [0]
    changed: list[int] = []
    with ThreadPoolExecutor(file.threads) as pool:
        for number, expected in enumerate(groups):
            found = bytearray()
            for some in group_leaves(file, number, blocks, pool):
                found += some
                advance(len(some) // LEAF_BYTES * blocks.block_bytes)
            if hashlib.sha256(found).hexdigest() == expected:
                continue
            try:
                with open_file(".blocks") as leaf_file:
                    leaves = Leaves(leaf_file, blocks, manifest.bin_bytes, manifest.idx_bytes)
                    stored = leaves.group(part, number)
            except InputError:
                stored = bytes(len(found))
            changed += [number * blocks.group_blocks + block for block in differing_blocks(bytes(found), stored)]
    return changed
