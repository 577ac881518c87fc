"""The indexed dataset, opened: token ids in ``PREFIX.bin``, where each sequence and document starts in ``PREFIX.idx``.

:mod:`megalrps.data.index_format` has the layout, :mod:`megalrps.data.index_writer` writes it. Every number of an index
is checked on opening or where it is used: a wrong one that is trusted reads other documents' tokens in silence.
"""

import mmap
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megalrps.data import windows
from megalrps.data.index_format import (
    DTYPE_CODES,
    HEADER_BYTES,
    REMAKE,
    bin_path,
    blocks_path,
    idx_path,
    manifest_path,
    parse_header,
    token_dtype,
)
from megalrps.data.index_writer import IndexedDatasetWriter
from megalrps.errors import InputError

__all__ = [
    "DTYPE_CODES",
    "REMAKE",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "bin_path",
    "blocks_path",
    "idx_path",
    "manifest_path",
    "token_dtype",
]

_CHECKED_AT_ONCE = 1 << 20
_ANY_TOKEN = 2**63 - 1


class BlockCache(Protocol):
    """Which parts of a mapped ``PREFIX.bin`` are there; :mod:`megalrps.data.remote` fetches the others."""

    def need(self, starts: npt.NDArray[np.int64], size: int) -> None:
        """Return when the bytes [start, start + size) of all ``starts`` [n] are there, whole; InputError otherwise."""


class IndexedDataset:
    """A finished dataset, memory-mapped and read-only; ``dataset[i]`` is the tokens of sequence i.

    Opening checks the index against itself and against the size of ``PREFIX.bin`` and raises InputError, naming the
    file and the mend, for whatever does not fit. Entries that were not looked at then are checked where they are used:
    no access can leave the mappings. Tokens are not looked at.
    """

    sequence_lengths: npt.NDArray[np.int32]
    """Tokens of each sequence, [S]."""
    sequence_pointers: npt.NDArray[np.int64]
    """Byte offset of each sequence in ``PREFIX.bin``, [S]."""
    document_indices: npt.NDArray[np.int64]
    """First sequence of each document, then S: [documents + 1]; equal neighbours are a document without tokens."""

    def __init__(
        self, prefix: Path | str, *, checked_bytes: int | None = None, cache: BlockCache | None = None
    ) -> None:
        """Open ``prefix``; where ``PREFIX.bin`` has holes, ``cache`` fills them.

        An index of up to ``checked_bytes`` (None: of any size) is checked entry by entry; of a larger one header, sizes
        and ends are, and :meth:`check_entries` looks at parts.
        """
        self.prefix = str(prefix)
        index = self._index = _map_file(idx_path(prefix))
        dtype, sequences, document_entries = parse_header(index[:HEADER_BYTES], len(index), idx_path(prefix))
        at = HEADER_BYTES
        self.sequence_lengths = np.frombuffer(index, "<i4", sequences, at)
        self.sequence_pointers = np.frombuffer(index, "<i8", sequences, at + 4 * sequences)
        self.document_indices = np.frombuffer(index, "<i8", document_entries, at + 12 * sequences)
        self.index_bytes = len(index)
        content = _map_file(bin_path(prefix))
        self._dtype = dtype
        self._content_bytes = len(content)
        self._cache = cache
        if checked_bytes is None or len(index) <= checked_bytes:
            self._check_sequences()
            self._check_documents()
        self._check_ends()
        self._array = np.frombuffer(content, dtype)

    @property
    def tokens(self) -> npt.NDArray[Any]:
        """All tokens of the dataset, in order: one flat mapped array [T] of the stored integer type.

        RuntimeError where parts of it are still elsewhere: their places hold zeros.
        """
        if self._cache is not None:
            raise RuntimeError(f"{self.prefix}: its tokens are fetched as they are needed; read() and gather() do")
        return self._array

    @property
    def tokens_count(self) -> int:
        """Number of tokens (T)."""
        return self._content_bytes // self._dtype.itemsize

    @property
    def dtype(self) -> np.dtype[Any]:
        """The integer type the tokens are stored in."""
        return self._dtype

    @property
    def document_count(self) -> int:
        """Number of documents, those without tokens included."""
        return len(self.document_indices) - 1

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def __getitem__(self, sequence: int) -> npt.NDArray[Any]:
        """Tokens of one sequence, a view of the mapping; IndexError outside [-S, S), InputError if it is damaged."""
        start, rest = divmod(int(self.sequence_pointers[sequence]), self._dtype.itemsize)
        stop = start + int(self.sequence_lengths[sequence])
        if rest or not 0 <= start <= stop <= self.tokens_count:
            raise InputError(f"{idx_path(self.prefix)}: sequence {sequence} lies outside the tokens: damaged; {REMAKE}")
        return self.read(start, stop)

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Tokens [start, stop) in the stored type, a view of the mapping; ValueError outside [0, T]."""
        if not 0 <= start <= stop <= self.tokens_count:
            raise ValueError(f"tokens {start} to {stop} of {self.tokens_count}")
        self._need(np.array([start], np.int64), stop - start)
        return self._array[start:stop]

    def gather(
        self, starts: npt.NDArray[np.int64], length: int, vocabulary: int | None = None
    ) -> npt.NDArray[np.int64]:
        """``length`` tokens from each of ``starts`` [n] (token offsets) on: int64 [n, length].

        ValueError where a window leaves the dataset; TokenOutsideError for an id outside [0, ``vocabulary``).
        """
        self._need(starts, length)
        return windows.gather(self._array, starts, length, _ANY_TOKEN if vocabulary is None else vocabulary)

    def document_starts(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int32]:
        """For each token of the windows of :meth:`gather` the place in it where its document begins: int32 [n, length].

        0 where it began before the window. IndexDamagedError where entries of the index lead outside.
        """
        return windows.document_starts(
            self.sequence_pointers,
            self.sequence_lengths,
            self.document_indices,
            self._dtype.itemsize,
            starts,
            length,
        )

    def check_entries(self, start: int, stop: int) -> None:
        """Check the entries of the index in its bytes [start, stop): order and bounds, from these bytes alone."""
        sequences = len(self)
        arrays = ((4, 0, sequences), (8, 4 * sequences, sequences), (8, 12 * sequences, len(self.document_indices)))
        lengths, pointers, documents = (
            slice(*_entries_within(start - HEADER_BYTES - at, stop - HEADER_BYTES - at, width, count))
            for width, at, count in arrays
        )
        if (self.sequence_lengths[lengths] < 0).any():
            raise self._negative()
        if not _in_order(self.sequence_pointers[pointers], self._content_bytes, self._dtype.itemsize):
            raise self._disjointed()
        if not _in_order(self.document_indices[documents], sequences):
            raise self._disordered()

    def read_at_random(self) -> None:
        """Give back the memory of the parts of the index that were looked at, and expect reads of single pages."""
        if isinstance(self._index, mmap.mmap):
            self._index.madvise(mmap.MADV_DONTNEED)
            self._index.madvise(mmap.MADV_RANDOM)

    def _need(self, starts: npt.NDArray[np.int64], length: int) -> None:
        if self._cache is None or not len(starts) or length < 1:
            return
        if int(starts.min()) < 0 or int(starts.max()) > self.tokens_count - length:
            raise ValueError(f"windows of {length} tokens leave the {self.tokens_count} of {self.prefix}")
        self._cache.need(starts * self._dtype.itemsize, length * self._dtype.itemsize)

    def _check_ends(self) -> None:
        """Check what fits into no time: the first and last entries, and the total against ``PREFIX.bin``."""
        total = 0
        if len(self):
            if int(self.sequence_pointers[0]) != 0:
                raise self._disjointed()
            total = int(self.sequence_pointers[-1]) + int(self.sequence_lengths[-1]) * self._dtype.itemsize
        uneven = self._content_bytes % self._dtype.itemsize
        if uneven or total != self._content_bytes or int(self.sequence_lengths[-1:].sum()) < 0:
            raise self._of_other_size()
        if int(self.document_indices[0]) != 0 or int(self.document_indices[-1]) != len(self):
            raise self._disordered()

    def _check_sequences(self) -> None:
        """Check that the sequences lie end to end and fill ``PREFIX.bin``."""
        total = 0
        # In blocks, so that no size needs memory; a total beyond the file ends the loop before it can overflow 64 bits.
        for start in range(0, len(self), _CHECKED_AT_ONCE):
            lengths = self.sequence_lengths[start : start + _CHECKED_AT_ONCE]
            if int(lengths.min()) < 0:
                raise self._negative()
            ends = total + self._dtype.itemsize * np.cumsum(lengths, dtype=np.int64)
            pointers = self.sequence_pointers[start : start + _CHECKED_AT_ONCE]
            if int(pointers[0]) != total or not np.array_equal(pointers[1:], ends[:-1]):
                raise self._disjointed()
            total = int(ends[-1])
            if total > self._content_bytes:
                break
        if total != self._content_bytes:
            raise self._of_other_size()

    def _check_documents(self) -> None:
        for start in range(0, len(self.document_indices), _CHECKED_AT_ONCE):
            if not _in_order(self.document_indices[start : start + _CHECKED_AT_ONCE + 1], len(self)):
                raise self._disordered()

    def _negative(self) -> InputError:
        return InputError(f"{idx_path(self.prefix)}: holds a negative sequence length: the file is damaged; {REMAKE}")

    def _disjointed(self) -> InputError:
        return InputError(
            f"{idx_path(self.prefix)}: byte offsets are not the running sum of the lengths: damaged; {REMAKE}"
        )

    def _of_other_size(self) -> InputError:
        return InputError(
            f"{bin_path(self.prefix)}: its {self._content_bytes} bytes are not what {idx_path(self.prefix).name} "
            f"describes: cut short, or of another dataset; {REMAKE}"
        )

    def _disordered(self) -> InputError:
        return InputError(
            f"{idx_path(self.prefix)}: its documents do not run from 0 to {len(self)} in order: damaged; {REMAKE}"
        )


def _entries_within(start: int, stop: int, width: int, count: int) -> tuple[int, int]:
    """First and end of the entries of ``width`` bytes, ``count`` in all, that lie whole in bytes [start, stop)."""
    first = min(max(-(-start // width), 0), count)
    return first, max(min(stop // width, count), first)


def _in_order(values: npt.NDArray[np.int64], highest: int, step: int = 1) -> bool:
    """Whether ``values`` [n] do not fall, and are multiples of ``step`` from 0 to ``highest``."""
    if not values.size:
        return True
    bounded = int(values[0]) >= 0 and int(values[-1]) <= highest
    return bounded and bool(np.all(values[1:] >= values[:-1])) and (step == 1 or not (values % step).any())


def _map_file(path: Path) -> mmap.mmap | bytes:
    """The bytes of ``path``, mapped read-only; an empty file, which cannot be mapped, is no bytes."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return b""
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the data path, or {REMAKE}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the data path") from error
