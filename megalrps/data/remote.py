"""Increments that lie elsewhere, under an fsspec URL: fetched block by block into a folder of a local disk.

``CACHE/KEY/increment.*``, where KEY is of the content: manifest, index and block digests are fetched whole and
compared with their digests before they are put in place. ``increment.bin`` is a sparse file; a block of it is fetched
when it is first needed, compared with its digest before it is written, and marked as there once it is on the disk. A
mark is the first 8 bytes of the block's digest, in ``increment.present``: no zeros, nor a mark of other content, can
pass a hole off as data.

Several processes of one host can share the folder: they fetch the index one after the other, and a block twice at
worst. The folder must not be shared between hosts: file systems of a network do not keep the order of writes.
"""

import hashlib
import mmap
import os
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from megalrps.data.block_digests import HEADER_BYTES, BlockDigests, block_count
from megalrps.data.block_reading import Leaves, LocalFile, Part, RangeReader
from megalrps.data.index_format import bin_path, blocks_path, idx_path, manifest_path
from megalrps.data.index_writer import locked_partial, partial_path
from megalrps.data.manifest import LARGEST_MANIFEST, IncrementManifest, parse_manifest
from megalrps.errors import InputError
from megalrps.files import locked, sync_directory, write_json
from megalrps.fingerprint import fingerprint

_Result = TypeVar("_Result")
_MARK_BYTES = 8
_FETCHED_AT_ONCE = 64
"""Blocks that are made durable together: a call of fdatasync for each would wait for the disk."""


@dataclass(frozen=True)
class Fetching:
    """How files elsewhere are read."""

    threads: int = 8
    attempts: int = 4
    pause_seconds: float = 0.5
    """Before the second attempt; twice as long before each later one."""


DEFAULT_FETCHING = Fetching()


def is_url(prefix: Path | str) -> bool:
    """Whether a prefix names data elsewhere."""
    return "://" in str(prefix)


class RemoteFile:
    """A file under an fsspec URL (see :class:`megalrps.data.block_reading.RangeReader`)."""

    def __init__(self, url: str, fetching: Fetching = DEFAULT_FETCHING) -> None:
        """InputError, naming the URL, where it cannot be reached or is not there."""
        import fsspec

        self.name = url
        self.threads = fetching.threads
        self._fetching = fetching
        try:
            self._system, self._path = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise InputError(f"{url}: needs a package that is not installed ({error}); install it") from None
        except ValueError as error:
            raise InputError(f"{url}: no such kind of URL ({error}); check the data path") from None
        self.size = int(self._attempt(lambda: self._system.size(self._path)))

    def read(self, start: int, size: int) -> bytes:
        """See :class:`megalrps.data.block_reading.RangeReader`."""

        def fetch() -> bytes:
            content = bytes(self._system.cat_file(self._path, start=start, end=start + size))
            if len(content) != size:
                raise OSError(f"{len(content)} bytes came instead of {size}")
            return content

        return self._attempt(fetch) if size else b""

    def read_checked(self, start: int, size: int, leaf: bytes) -> bytes:
        """The same, with this SHA-256; what differs is read again, for the way here may have changed it."""

        def fetch() -> bytes:
            content = bytes(self._system.cat_file(self._path, start=start, end=start + size))
            if hashlib.sha256(content).digest() != leaf:
                raise OSError(
                    f"bytes {start}-{start + size - 1} changed since the manifest was written: SHA-256 differs"
                )
            return content

        return self._attempt(fetch)

    def _attempt(self, fetch: Callable[[], _Result]) -> _Result:
        """The result of ``fetch``, tried several times; InputError after the last one."""
        pause = self._fetching.pause_seconds
        for attempt in range(1, self._fetching.attempts + 1):
            try:
                return fetch()
            except FileNotFoundError:
                raise InputError(f"{self.name}: no such file; check the data path") from None
            except Exception as error:  # each kind of storage has exceptions of its own
                if attempt == self._fetching.attempts:
                    raise InputError(
                        f"{self.name}: cannot be fetched after {attempt} attempts ({str(error) or repr(error)}); "
                        "check network, credentials and the file"
                    ) from None
            time.sleep(pause)
            pause *= 2
        raise AssertionError("no attempt was made")


@contextmanager
def remote_file(url: str, fetching: Fetching = DEFAULT_FETCHING) -> Iterator[RangeReader]:
    """The file at ``url``, as :class:`megalrps.data.block_reading.LocalFile` is one."""
    yield RemoteFile(url, fetching)


def remote_manifest(url: str, fetching: Fetching = DEFAULT_FETCHING) -> IncrementManifest:
    """The manifest of the increment at the prefix ``url``."""
    file = RemoteFile(url + ".json", fetching)
    if file.size > LARGEST_MANIFEST:
        raise InputError(f"{file.name}: larger than any manifest; check the data path")
    return parse_manifest(file.read(0, file.size), file.name)


class CachedIncrement:
    """The local files of an increment elsewhere (see :class:`megalrps.data.indexed.BlockCache`)."""

    manifest: IncrementManifest
    prefix: Path
    """Of the local files."""

    def __init__(self, url: str, manifest: IncrementManifest, blocks: BlockDigests, prefix: Path, fetching: Fetching):
        self.manifest, self.prefix = manifest, prefix
        self._url, self._blocks, self._fetching = url, blocks, fetching
        self._remote: RemoteFile | None = None
        count = block_count(manifest.bin_bytes, blocks.block_bytes)
        self._content = os.open(bin_path(prefix), os.O_RDWR | os.O_CLOEXEC)
        self._present = os.open(_present_path(prefix), os.O_RDWR | os.O_CLOEXEC)
        for descriptor in (self._content, self._present):
            weakref.finalize(self, os.close, descriptor)
        self._marks = _mapped_marks(_present_path(prefix), count, 0, 1)
        # The mark that each block must have: the first of the four words of its leaf.
        self._wanted = _mapped_marks(blocks_path(prefix), count, HEADER_BYTES, 4)

    def blocks_there(self) -> npt.NDArray[np.int64]:
        """The blocks of ``PREFIX.bin`` that were fetched, in order."""
        return np.flatnonzero(self._are_there(np.arange(len(self._marks))))

    def need(self, starts: npt.NDArray[np.int64], size: int) -> None:
        """Fetch the blocks of the bytes [start, start + size) of all ``starts`` [n] that are not there yet.

        InputError where they cannot be had; then, what came before is kept.
        """
        firsts = starts // self._blocks.block_bytes
        most = (size - 1) // self._blocks.block_bytes + 1
        lasts = (starts + size - 1) // self._blocks.block_bytes
        needed = np.unique(np.concatenate([np.minimum(firsts + more, lasts) for more in range(most + 1)]))
        missing = needed[~self._are_there(needed)].tolist()
        for start in range(0, len(missing), _FETCHED_AT_ONCE):
            self._fetch(missing[start : start + _FETCHED_AT_ONCE])

    def _are_there(self, blocks: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        marks = self._marks[blocks]
        return (marks == self._wanted[blocks]) & (marks != 0)

    def _fetch(self, blocks: list[int]) -> None:
        if self._remote is None:
            self._remote = RemoteFile(self._url + ".bin", self._fetching)
        remote, block_bytes = self._remote, self._blocks.block_bytes
        if remote.size != self.manifest.bin_bytes:
            raise InputError(
                f"{remote.name}: has {remote.size} bytes where its manifest says {self.manifest.bin_bytes}; "
                "check the data path"
            )
        with LocalFile(blocks_path(self.prefix)) as file:
            leaves = Leaves(file, self._blocks, self.manifest.bin_bytes, self.manifest.idx_bytes).of_blocks(
                "bin", blocks
            )

        def fetch(block: int) -> None:
            start = block * block_bytes
            content = remote.read_checked(start, min(block_bytes, self.manifest.bin_bytes - start), leaves[block])
            _write_at(self._content, content, start)

        with _told(self.prefix), ThreadPoolExecutor(min(self._fetching.threads, len(blocks))) as pool:
            list(pool.map(fetch, blocks))
            # On the disk before it is marked: after a loss of power a mark must not stand before a hole.
            os.fdatasync(self._content)
            for block in blocks:
                _write_at(self._present, leaves[block][:_MARK_BYTES], block * _MARK_BYTES)


def cached_increment(url: str, cache: Path, fetching: Fetching = DEFAULT_FETCHING) -> CachedIncrement:
    """Fetch manifest, block digests and index of the increment at ``url`` into ``cache``, where they are not there yet.

    InputError, naming URL or folder, where they cannot be had or kept.
    """
    manifest = remote_manifest(url, fetching)
    blocks = manifest.blocks
    if blocks is None:
        raise InputError(
            f"{url}.json: has no digests of blocks (version 1), without which parts cannot be checked; remove it and "
            "adopt the dataset again with tools/adopt_dataset.py"
        )
    folder = cache / fingerprint([manifest.bin_digest, manifest.idx_digest, manifest.to_json()["blocks"]])[:32]
    prefix = folder / "increment"
    with _told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock"):
            _fetch_blocks_file(url, manifest, blocks, prefix, fetching)
            _fetch_index(url, manifest, blocks, prefix, fetching)
            _make_room(manifest, blocks, prefix)
            if not manifest_path(prefix).exists():  # for a person who wonders what this is; read from the URL each time
                write_json(manifest_path(prefix), manifest.to_json())
        return CachedIncrement(url, manifest, blocks, prefix, fetching)


def _fetch_blocks_file(
    url: str, manifest: IncrementManifest, blocks: BlockDigests, prefix: Path, fetching: Fetching
) -> None:
    path = blocks_path(prefix)
    if _has_size(path, blocks.file_bytes(manifest.bin_bytes, manifest.idx_bytes)):
        return
    remote = RemoteFile(url + ".blocks", fetching)
    leaves = Leaves(remote, blocks, manifest.bin_bytes, manifest.idx_bytes)
    places: list[tuple[Part, int]] = [("bin", number) for number in range(len(blocks.bin_groups))]
    places += [("idx", number) for number in range(len(blocks.idx_groups))]
    with _filling(path) as descriptor, ThreadPoolExecutor(fetching.threads) as pool:
        _write_at(descriptor, remote.read(0, HEADER_BYTES), 0)

        def fetch(place: tuple[Part, int]) -> None:
            part, number = place
            _write_at(descriptor, leaves.group(part, number), leaves.offset(part, number * blocks.group_blocks))

        list(pool.map(fetch, places))


def _fetch_index(url: str, manifest: IncrementManifest, blocks: BlockDigests, prefix: Path, fetching: Fetching) -> None:
    path = idx_path(prefix)
    if _has_size(path, manifest.idx_bytes):
        return
    remote = RemoteFile(url + ".idx", fetching)
    if remote.size != manifest.idx_bytes:
        raise InputError(
            f"{remote.name}: has {remote.size} bytes where its manifest says {manifest.idx_bytes}; check the data path"
        )
    count = block_count(manifest.idx_bytes, blocks.block_bytes)
    with (
        LocalFile(blocks_path(prefix)) as file,
        _filling(path) as descriptor,
        ThreadPoolExecutor(fetching.threads) as pool,
    ):
        leaves = Leaves(file, blocks, manifest.bin_bytes, manifest.idx_bytes)
        for first in range(0, count, blocks.group_blocks):
            known = leaves.of_blocks("idx", range(first, min(first + blocks.group_blocks, count)))

            def fetch(block: int, known: dict[int, bytes] = known) -> None:
                start = block * blocks.block_bytes
                size = min(blocks.block_bytes, manifest.idx_bytes - start)
                _write_at(descriptor, remote.read_checked(start, size, known[block]), start)

            list(pool.map(fetch, known))


def _make_room(manifest: IncrementManifest, blocks: BlockDigests, prefix: Path) -> None:
    """Make the sparse file of the tokens and, after it, the marks of the blocks that are there: none."""
    marks = _MARK_BYTES * block_count(manifest.bin_bytes, blocks.block_bytes)
    if _has_size(bin_path(prefix), manifest.bin_bytes) and _has_size(_present_path(prefix), marks):
        return
    _present_path(prefix).unlink(missing_ok=True)
    sync_directory(prefix.parent)
    for path, size in ((bin_path(prefix), manifest.bin_bytes), (_present_path(prefix), marks)):
        with _filling(path) as descriptor:
            os.ftruncate(descriptor, size)


@contextmanager
def _filling(path: Path) -> Iterator[int]:
    """Descriptor of a file that takes the place of ``path``, flushed to the disk, when the block ends well."""
    with locked_partial(path) as descriptor:
        yield descriptor
        os.fsync(descriptor)
        partial_path(path).replace(path)
        sync_directory(path.parent)


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Name the folder of the cache in an error of its disk that names no file."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(
            error.errno, f"{error.strerror}; make room, or choose another --data-cache-path", str(folder)
        ) from None


def _present_path(prefix: Path) -> Path:
    return Path(f"{prefix}.present")


def _has_size(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size


def _write_at(descriptor: int, content: bytes, start: int) -> None:
    view = memoryview(content)
    while len(view):
        written = os.pwrite(descriptor, view, start)
        view, start = view[written:], start + written


def _mapped_marks(path: Path, count: int, offset: int, stride: int) -> npt.NDArray[np.uint64]:
    """Every ``stride``-th of the 8-byte words of ``path`` from ``offset`` on, mapped and shared: [count]."""
    if not count:
        return np.zeros(0, np.uint64)
    with open(path, "rb") as file:
        mapped: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(mapped, "<u8", count * stride, offset)[::stride]
