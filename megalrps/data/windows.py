"""Windows of tokens, and where documents begin in them: the two reads that a sample is made of.

Each exists twice, in numpy here and in C++ (csrc/windows.cpp), with the same numbers. The C++ one runs without the GIL
and reads the index where it lies: no array of the size of the index is made, and each number of it that is used is
checked, so an index that nobody has read through can give an error, never a read outside the mapping.
"""

from bisect import bisect_right
from typing import Any

import numpy as np
import numpy.typing as npt

from megalrps.errors import InputError

try:
    import megalrps._native as _native
except ImportError:  # not built: see setup.py
    _native = None

IMPLEMENTATION = "numpy" if _native is None else "native"
"""What reads windows here: ``native`` (csrc/windows.cpp) where it was built, else ``numpy``."""

TOKEN_TYPES = ("uint8", "int8", "uint16", "int16", "int32", "int64")


class TokenOutsideError(ValueError):
    """A window, number ``row`` of those asked for, holds a token outside the vocabulary."""

    def __init__(self, row: int) -> None:
        super().__init__(f"window {row} holds a token outside the vocabulary")
        self.row = row


class IndexDamagedError(ValueError):
    """Numbers of an index that contradict one another: the file is damaged."""


def gather(
    tokens: npt.NDArray[Any],
    starts: npt.NDArray[np.int64],
    length: int,
    vocabulary: int,
    *,
    implementation: str = IMPLEMENTATION,
) -> npt.NDArray[np.int64]:
    """Windows of ``tokens``, flat, of a stored type: int64 [n, length], row i from ``starts[i]`` (flat int64 [n]) on.

    Raises ValueError if a window leaves the array, TokenOutsideError if an id is outside [0, ``vocabulary``).
    """
    starts = _checked_starts(starts)
    native = native_module(implementation)
    read = _gather if native is None else native.gather
    rows, outside = read(tokens, starts, length, vocabulary)
    if outside >= 0:
        raise TokenOutsideError(outside)
    windows: npt.NDArray[np.int64] = rows
    return windows


def document_starts(
    pointers: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int32],
    documents: npt.NDArray[np.int64],
    token_bytes: int,
    starts: npt.NDArray[np.int64],
    length: int,
    *,
    implementation: str = IMPLEMENTATION,
) -> npt.NDArray[np.int32]:
    """For each token of each window the place in the window where its document begins, 0 where before it.

    ``pointers`` [S], ``lengths`` [S] and ``documents`` [D + 1] are the arrays of an index (:mod:`megalrps.data.indexed`
    has the format), at any address; windows are given as in :func:`gather`. Returns int32 [n, length].
    Raises ValueError if a window leaves the tokens, IndexDamagedError where numbers used contradict one another.
    """
    starts = _checked_starts(starts)
    native = native_module(implementation)
    if native is None:
        return _document_starts(pointers, lengths, documents, token_bytes, starts, length)
    try:
        places: npt.NDArray[np.int32] = native.document_starts(
            pointers, lengths, documents, token_bytes, starts, length
        )
        return places
    except IndexError as error:
        raise IndexDamagedError(str(error)) from None


def native_module(implementation: str) -> Any:
    """The extension to call, None for ``numpy``; ValueError for an unknown name, InputError where it is missing."""
    if implementation == "numpy":
        return None
    if implementation != "native":
        raise ValueError(f"implementation {implementation!r} is neither numpy nor native")
    if _native is None:
        raise InputError("the compiled extension is missing: run python setup.py build_ext --inplace")
    return _native


def _checked_starts(starts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    if not isinstance(starts, np.ndarray) or starts.dtype != np.int64 or starts.ndim != 1:
        raise ValueError("starts must be a flat numpy array of int64")
    flags = starts.flags
    return starts if flags.c_contiguous and flags.aligned else np.require(starts, requirements=("C", "A"))


def _check_windows(starts: npt.NDArray[np.int64], length: int, count: int) -> None:
    if length < 0:
        raise ValueError(f"a window cannot have {length} tokens")
    if starts.size and (int(starts.min()) < 0 or int(starts.max()) > count - length):
        raise ValueError(f"a window of {length} leaves the {count} tokens")


def _gather(
    tokens: npt.NDArray[Any], starts: npt.NDArray[np.int64], length: int, vocabulary: int
) -> tuple[npt.NDArray[np.int64], int]:
    """The reference: csrc/windows.cpp gives the same rows and the same number of the first bad one, or -1."""
    if tokens.ndim != 1 or tokens.dtype.name not in TOKEN_TYPES:
        raise ValueError("tokens must be flat and have one of the types that datasets are stored in")
    if vocabulary < 1:
        raise ValueError("vocabulary must be at least 1")
    _check_windows(starts, length, tokens.size)
    rows = np.empty((len(starts), length), np.int64)
    for row, start in zip(rows, starts.tolist(), strict=True):
        row[:] = tokens[start : start + length]
    if rows.size == 0:
        return rows, -1
    # A negative id becomes a huge one, so one pass sees both.
    outside = np.flatnonzero(rows.view(np.uint64).max(axis=1) >= vocabulary)
    return rows, int(outside[0]) if outside.size else -1


class IndexOffsets:
    """Where documents begin, in bytes, each number checked when it is used: csrc's ``DatasetIndex`` in Python."""

    def __init__(
        self,
        pointers: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int32],
        documents: npt.NDArray[np.int64],
        token_bytes: int,
    ) -> None:
        """Check the shape of the arrays and both their ends."""
        if len(pointers) != len(lengths) or len(documents) == 0 or token_bytes not in (1, 2, 4, 8):
            raise ValueError("pointers and lengths must be of one length, documents not empty, token_bytes 1, 2, 4, 8")
        self._pointers, self._lengths, self._documents = pointers, lengths, documents
        self.token_bytes = token_bytes
        self.sequences = len(pointers)
        self.documents = len(documents) - 1
        if int(documents[0]) != 0 or int(documents[-1]) != self.sequences:
            raise IndexDamagedError("the documents do not run from 0 to the number of sequences")
        self.bytes = 0
        if self.sequences:
            last, length = int(pointers[-1]), int(lengths[-1])
            if int(pointers[0]) != 0 or not 0 <= last < 1 << 62 or last % token_bytes or length < 0:
                raise IndexDamagedError("the first or last sequence lies nowhere")
            self.bytes = last + length * token_bytes

    def __call__(self, document: int) -> int:
        """Byte offset of the first token of ``document``, in [0, bytes]."""
        sequence = int(self._documents[document])
        if sequence == self.sequences:
            return self.bytes
        if not 0 <= sequence < self.sequences:
            raise IndexDamagedError(f"document {document} begins with no sequence of the dataset")
        offset = int(self._pointers[sequence])
        if not 0 <= offset <= self.bytes or offset % self.token_bytes:
            raise IndexDamagedError(f"sequence {sequence} begins with no token of the dataset")
        return offset

    def joined(self, document: int) -> int:
        """The same; the sequence before it must end there."""
        offset, sequence = self(document), int(self._documents[document])
        if sequence > 0:
            end = int(self._pointers[sequence - 1]) + int(self._lengths[sequence - 1]) * self.token_bytes
            if end != offset or int(self._lengths[sequence - 1]) < 0:
                raise IndexDamagedError(f"sequence {sequence - 1} does not end where the next begins")
        return offset


def _document_starts(
    pointers: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int32],
    documents: npt.NDArray[np.int64],
    token_bytes: int,
    starts: npt.NDArray[np.int64],
    length: int,
) -> npt.NDArray[np.int32]:
    """The reference. Documents without tokens begin where the next one does, so they change nothing."""
    offsets = IndexOffsets(pointers, lengths, documents, token_bytes)
    _check_windows(starts, length, offsets.bytes // token_bytes)
    if length > np.iinfo(np.int32).max:
        raise ValueError("places in a window must fit 32 bits")
    places = np.zeros((len(starts), length), np.int32)
    for row, start in zip(places, starts.tolist(), strict=True):
        begin = start * token_bytes
        end = begin + length * token_bytes
        document = bisect_right(range(offsets.documents), begin, key=offsets) if length else offsets.documents
        previous = offsets.joined(document - 1) if length else 0
        while document < offsets.documents and (offset := offsets.joined(document)) < end:
            if offset < previous:
                raise IndexDamagedError(f"document {document - 1} ends before it begins")
            row[(offset - begin) // token_bytes :] = (offset - begin) // token_bytes
            previous = offset
            document += 1
    return places
