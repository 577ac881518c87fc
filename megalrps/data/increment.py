"""An increment, opened: the data that became available since the last version, and what is known about it."""

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megalrps.data.block_digests import BlockDigests, block_count
from megalrps.data.block_reading import Leaves, LocalFile, Part, check_blocks
from megalrps.data.index_format import REMAKE, bin_path, blocks_path, idx_path, manifest_path
from megalrps.data.indexed import IndexedDataset
from megalrps.data.manifest import IncrementManifest, read_manifest
from megalrps.data.remote import DEFAULT_FETCHING, CachedIncrement, cached_increment, is_url, remote_file
from megalrps.data.whole_check import OpenFile, changed_files
from megalrps.errors import InputError
from megalrps.fingerprint import file_digest

Blocks = range | npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class OpenIncrement:
    """A manifest and the dataset that was found to fit it."""

    manifest: IncrementManifest
    dataset: IndexedDataset


@dataclass(frozen=True)
class OpeningChecks:
    """How much of an increment is read when it is opened."""

    whole_bytes: int = 1 << 24
    """Files of up to so many bytes are compared with their digests whole (16 MiB: 10 ms), larger ones by samples."""
    sampled_blocks: int = 4
    """Blocks of a larger file that are compared: 4 of each take 15 ms."""
    draw: int | None = None
    """Which blocks: a number of the caller's. Unset: the clock, so that each opening, of each rank, looks at others and
    a damage anywhere is found in the end; the same blocks every time would leave the rest unread for ever."""


DEFAULT_CHECKS = OpeningChecks()


def open_increment(
    prefix: Path | str,
    verify: bool = False,
    cache: Path | str | None = None,
    checks: OpeningChecks = DEFAULT_CHECKS,
) -> OpenIncrement:
    """Open the increment at ``prefix``, a path or a URL (``s3://...``), and check that its manifest describes it.

    Always checked: the size of both files, all counts, the ends of the index. Of files of up to ``checks.whole_bytes``
    every entry of the index and every byte; of larger ones blocks drawn at random, entries and digests (a manifest of
    version 1 has none: then the whole index, and not the tokens). With ``verify`` all is read. Entries of an index that
    were not checked are checked where they are used.

    The files of a URL are kept in the folder ``cache``: the index at once, the tokens block by block as they are read.
    Raises InputError, naming the file and the mend.
    """
    if not is_url(prefix):
        manifest = read_manifest(prefix)
        if verify:
            _check_everything(str(prefix), manifest, lambda suffix: LocalFile(Path(f"{prefix}{suffix}")))
        return OpenIncrement(manifest, _opened(prefix, manifest, checks, None))
    url = str(prefix)
    if cache is None:
        raise InputError(
            f"{url}: data elsewhere is kept in a folder of a local disk while it is used; add --data-cache-path"
        )
    kept = cached_increment(url, Path(cache), DEFAULT_FETCHING)
    if verify:
        _check_everything(url, kept.manifest, lambda suffix: remote_file(url + suffix))
    try:
        return OpenIncrement(kept.manifest, _opened(kept.prefix, kept.manifest, checks, kept))
    except InputError as error:
        raise InputError(str(error).replace(REMAKE, f"remove {kept.prefix.parent}: it is fetched again")) from None


def _check_everything(prefix: str, manifest: IncrementManifest, open_file: OpenFile) -> None:
    for bad in changed_files(manifest, prefix, open_file, lambda size: None):
        raise InputError(bad.complaint)


def _opened(
    prefix: Path | str, manifest: IncrementManifest, checks: OpeningChecks, kept: CachedIncrement | None
) -> IndexedDataset:
    """The dataset of local files, checked as :func:`open_increment` says."""
    checked_bytes = None if manifest.blocks is None else checks.whole_bytes
    dataset = IndexedDataset(prefix, checked_bytes=checked_bytes, cache=kept)
    _check_counts(manifest, dataset)
    if manifest.blocks is None or dataset.index_bytes <= checks.whole_bytes:
        _check_whole(idx_path(prefix), manifest.idx_digest)
    else:
        for block in _check_some("idx", prefix, manifest, manifest.blocks, checks, None):
            start = block * manifest.blocks.block_bytes
            dataset.check_entries(start, start + manifest.blocks.block_bytes)
        dataset.read_at_random()
    if kept is None and manifest.bin_bytes <= checks.whole_bytes:
        _check_whole(bin_path(prefix), manifest.bin_digest)
    elif manifest.blocks is not None:
        _check_some("bin", prefix, manifest, manifest.blocks, checks, kept)
    return dataset


def _check_counts(manifest: IncrementManifest, dataset: IndexedDataset) -> None:
    found = {
        "tokens": dataset.tokens_count,
        "documents": dataset.document_count,
        "sequences": len(dataset),
        "dtype": dataset.dtype.name,
    }
    for field, value in found.items():
        expected = getattr(manifest, field)
        if value != expected:
            raise InputError(
                f"{manifest_path(dataset.prefix)}: says {field} {expected}, but the dataset has {value}: "
                f"they do not belong together; {REMAKE}"
            )


def _check_some(
    part: Part,
    prefix: Path | str,
    manifest: IncrementManifest,
    digests: BlockDigests,
    checks: OpeningChecks,
    kept: CachedIncrement | None,
) -> list[int]:
    """Compare some blocks of a file, of those that are ``kept``, with their digests: which ones."""
    size = manifest.bin_bytes if part == "bin" else manifest.idx_bytes
    there: Blocks = range(block_count(size, digests.block_bytes)) if kept is None else kept.blocks_there()
    draw = time.time_ns() if checks.draw is None else checks.draw
    blocks = _drawn(f"{part} {draw} {manifest.fingerprint}", there, checks.sampled_blocks)
    path = bin_path(prefix) if part == "bin" else idx_path(prefix)
    with LocalFile(blocks_path(prefix)) as leaf_file, LocalFile(path) as file:
        leaves = Leaves(leaf_file, digests, manifest.bin_bytes, manifest.idx_bytes)
        check_blocks(file, leaves.of_blocks(part, blocks), digests.block_bytes)
    return blocks


def _drawn(key: str, choices: Blocks, count: int) -> list[int]:
    """``count`` of ``choices``, or all, by hashes of ``key``, sorted."""
    if len(choices) <= count:
        return [int(block) for block in choices]
    drawn: set[int] = set()
    number = 0
    while len(drawn) < count:
        digest = hashlib.sha256(f"{key} {number}".encode()).digest()
        drawn.add(int(choices[int.from_bytes(digest[:16]) % len(choices)]))
        number += 1
    return sorted(drawn)


def _check_whole(path: Path, expected: str) -> None:
    if file_digest(path) != expected:
        raise InputError(f"{path}: changed since its manifest was written (SHA-256 differs); {REMAKE}")
