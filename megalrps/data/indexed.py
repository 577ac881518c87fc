"""The indexed dataset: token ids in ``PREFIX.bin``, where each sequence and document starts in ``PREFIX.idx``.

Both files are byte for byte those of Megatron-LM's ``IndexedDataset`` (``megatron/core/datasets/indexed_dataset.py``),
so datasets go both ways. All numbers are little-endian; an index has these parts, nothing between and nothing after:

====== ===== ==========================================================================================
offset bytes content
====== ===== ==========================================================================================
0      9     magic ``MMIDIDX\\0\\0``
9      8     version 1, uint64
17     1     dtype code of the tokens, uint8
18     8     number of sequences S, uint64
26     8     number of entries of the document array D = documents + 1, uint64
34     4 S   length of each sequence in tokens, int32
..     8 S   byte offset of each sequence in ``PREFIX.bin``, int64
..     8 D   index of the first sequence of each document, int64, then S
====== ===== ==========================================================================================

Every one of these numbers is checked on opening: a wrong one that is trusted reads other documents' tokens in silence.
"""

import mmap
import os
import struct
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from megalrps.errors import InputError
from megalrps.files import replacing, sync_directory

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPE_CODES: dict[str, int] = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}
"""Codes of the integer token types. 6 and 7 are floats, in an order that differs between versions: refused."""
REMAKE = "run tools/preprocess_data.py again"
"""The mend for a damaged dataset, in every message about one."""

_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_NAMES = {code: name for name, code in DTYPE_CODES.items()}
_LONGEST_SEQUENCE = 2**31 - 1
_UINT16_VOCABULARY = 65500
_CHECKED_AT_ONCE = 1 << 20


def bin_path(prefix: Path | str) -> Path:
    """The file of the token ids of the dataset ``prefix``."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path | str) -> Path:
    """The index of the dataset ``prefix``; a dataset exists when this file does."""
    return Path(f"{prefix}.idx")


def manifest_path(prefix: Path | str) -> Path:
    """The increment manifest of the dataset ``prefix`` (see :mod:`megalrps.data.manifest`)."""
    return Path(f"{prefix}.json")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type Megatron stores the ids of ``vocab_size`` tokens in: uint16 for fewer than 65500, else int32."""
    return np.dtype(np.uint16 if vocab_size < _UINT16_VOCABULARY else np.int32)


class IndexedDataset:
    """A finished dataset, memory-mapped and read-only; ``dataset[i]`` is the tokens of sequence i.

    Opening checks the whole index against itself and against the size of ``PREFIX.bin`` and raises InputError, naming
    the file and the mend, for whatever does not fit; no later access can leave the mappings. Tokens are not looked at.
    """

    tokens: npt.NDArray[Any]
    """All tokens of the dataset, in order: one flat array [T] of the stored integer type."""
    sequence_lengths: npt.NDArray[np.int32]
    """Tokens of each sequence, [S]."""
    sequence_pointers: npt.NDArray[np.int64]
    """Byte offset of each sequence in ``PREFIX.bin``, [S]."""
    document_indices: npt.NDArray[np.int64]
    """First sequence of each document, then S: [documents + 1]; equal neighbours are a document without tokens."""

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = str(prefix)
        index = _map_file(idx_path(prefix))
        dtype, sequences, document_entries = _parse_header(index, idx_path(prefix))
        at = _HEADER.size
        self.sequence_lengths = np.frombuffer(index, "<i4", sequences, at)
        self.sequence_pointers = np.frombuffer(index, "<i8", sequences, at + 4 * sequences)
        self.document_indices = np.frombuffer(index, "<i8", document_entries, at + 12 * sequences)
        content = _map_file(bin_path(prefix))
        self._check_sequences(dtype.itemsize, len(content))
        self._check_documents()
        self.tokens = np.frombuffer(content, dtype)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The integer type the tokens are stored in."""
        return self.tokens.dtype

    @property
    def document_count(self) -> int:
        """Number of documents, those without tokens included."""
        return len(self.document_indices) - 1

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def __getitem__(self, sequence: int) -> npt.NDArray[Any]:
        """Tokens of one sequence, a view of the mapping; IndexError outside [-S, S)."""
        start = int(self.sequence_pointers[sequence]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.sequence_lengths[sequence])]

    def _check_sequences(self, token_bytes: int, content_bytes: int) -> None:
        """Check that the sequences lie end to end and fill the ``content_bytes`` of ``PREFIX.bin``."""
        path = idx_path(self.prefix)
        total = 0
        # In blocks, so that no size needs memory; a total beyond the file ends the loop before it can overflow 64 bits.
        for start in range(0, len(self), _CHECKED_AT_ONCE):
            lengths = self.sequence_lengths[start : start + _CHECKED_AT_ONCE]
            if int(lengths.min()) < 0:
                raise InputError(f"{path}: holds a negative sequence length: the file is damaged; {REMAKE}")
            ends = total + token_bytes * np.cumsum(lengths, dtype=np.int64)
            pointers = self.sequence_pointers[start : start + _CHECKED_AT_ONCE]
            if int(pointers[0]) != total or not np.array_equal(pointers[1:], ends[:-1]):
                raise InputError(f"{path}: byte offsets are not the running sum of the lengths: damaged; {REMAKE}")
            total = int(ends[-1])
            if total > content_bytes:
                break
        if total != content_bytes:
            raise InputError(
                f"{bin_path(self.prefix)}: its {content_bytes} bytes are not what {path.name} describes: "
                f"cut short, or of another dataset; {REMAKE}"
            )

    def _check_documents(self) -> None:
        documents = self.document_indices
        bounded = int(documents[0]) == 0 and int(documents[-1]) == len(self)
        if not bounded or not _is_sorted(documents):
            path = idx_path(self.prefix)
            raise InputError(f"{path}: its documents do not run from 0 to {len(self)} in order: damaged; {REMAKE}")


class IndexedDatasetWriter:
    """Writes a dataset, document after document; a context manager.

    Tokens stream into a partial file beside ``PREFIX.bin``. Only when the block ends without an exception are both
    files flushed to the disk and renamed into place, the index last: a dataset that can be opened is whole.
    Memory: 12 bytes a document.
    """

    def __init__(self, prefix: Path | str, dtype: npt.DTypeLike, *, overwrite: bool = False) -> None:
        """Prepare to write ``prefix``; InputError where a finished dataset stands, unless it may be replaced."""
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        if self.dtype.name not in DTYPE_CODES:
            raise InputError(
                f"{prefix}: tokens cannot be stored as {self.dtype}; choose one of {', '.join(DTYPE_CODES)}"
            )
        if not overwrite and idx_path(prefix).exists():
            raise InputError(
                f"{idx_path(prefix)}: a finished dataset is already there; remove it or choose another --output-prefix"
            )
        self._highest_token = int(np.iinfo(self.dtype).max)
        self._lengths = array("i")
        self._document_indices = array("q", [0])
        self._token_count = 0
        self._stack = ExitStack()
        self._file: IO[bytes] | None = None

    @property
    def document_count(self) -> int:
        """Documents added so far."""
        return len(self._document_indices) - 1

    @property
    def sequence_count(self) -> int:
        """Sequences added so far."""
        return len(self._lengths)

    @property
    def token_count(self) -> int:
        """Tokens added so far."""
        return self._token_count

    def __enter__(self) -> Self:
        path = bin_path(self.prefix)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._stack.enter_context(replacing(path))
        except OSError as error:
            raise InputError(
                f"{path}: cannot be written ({error.strerror}); choose another output directory"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file = None
        if error is not None:
            self._stack.__exit__(kind, error, traceback)
            return
        # A dataset that is being replaced disappears first: its index or manifest must never describe the new tokens.
        idx_path(self.prefix).unlink(missing_ok=True)
        manifest_path(self.prefix).unlink(missing_ok=True)
        sync_directory(bin_path(self.prefix).parent)
        self._stack.close()
        with replacing(idx_path(self.prefix)) as index:
            self._write_index(index)

    def add_document(self, tokens: npt.ArrayLike, sequence_lengths: Sequence[int] | None = None) -> None:
        """Append one document, token ids ``tokens`` [T], cut into sequences of ``sequence_lengths`` (their sum is T).

        By default a document is one sequence; one without tokens is then a document without a sequence, as Megatron's
        ``preprocess_data.py`` writes it. Raises InputError for ids that the dataset's type cannot hold.
        """
        if self._file is None:
            raise RuntimeError("add_document belongs inside the writer's with-block")
        stored = self._to_stored(np.asarray(tokens))
        if sequence_lengths is None:
            sequence_lengths = (stored.size,) if stored.size else ()
        elif sum(sequence_lengths) != stored.size or min(sequence_lengths, default=0) < 0:
            raise ValueError(f"sequence lengths {list(sequence_lengths)} do not cut a document of {stored.size} tokens")
        if max(sequence_lengths, default=0) > _LONGEST_SEQUENCE:
            raise InputError(
                f"{self.prefix}: a document of {stored.size} tokens is too long for one sequence; split it"
            )
        self._file.write(stored.data)
        self._lengths.extend(sequence_lengths)
        self._document_indices.append(len(self._lengths))
        self._token_count += stored.size

    def _to_stored(self, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """``tokens`` in the stored type, checked: an id out of range would wrap round to another token."""
        if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
            raise ValueError(f"tokens of a document must be a flat array of integers, not {tokens.dtype}{tokens.shape}")
        if tokens.size and not (int(tokens.min()) >= 0 and int(tokens.max()) <= self._highest_token):
            raise InputError(
                f"{self.prefix}: token ids {int(tokens.min())}..{int(tokens.max())} do not fit {self.dtype} "
                f"(0..{self._highest_token}); check the tokenizer's vocabulary size"
            )
        return np.ascontiguousarray(tokens, dtype=self.dtype.newbyteorder("<"))

    def _write_index(self, index: IO[bytes]) -> None:
        lengths = np.frombuffer(self._lengths, np.int32)
        pointers = np.zeros(len(lengths), "<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])  # int32 would overflow at 2 GiB
        pointers *= self.dtype.itemsize
        documents = np.frombuffer(self._document_indices, np.int64)
        index.write(_HEADER.pack(MAGIC, VERSION, DTYPE_CODES[self.dtype.name], len(lengths), len(documents)))
        index.write(lengths.astype("<i4", copy=False).data)
        index.write(pointers.data)
        index.write(documents.astype("<i8", copy=False).data)


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


def _parse_header(index: mmap.mmap | bytes, path: Path) -> tuple[np.dtype[Any], int, int]:
    """Token type, number of sequences and of document entries of an index; InputError if its size does not fit them."""
    if len(index) < _HEADER.size or index[: len(MAGIC)] != MAGIC:
        raise InputError(f"{path}: not an index of token data (bad magic bytes); check the data path, or {REMAKE}")
    _, version, code, sequences, document_entries = _HEADER.unpack(index[: _HEADER.size])
    if version != VERSION:
        raise InputError(f"{path}: index version {version}, where only {VERSION} is known; {REMAKE}")
    if code not in _DTYPE_NAMES:
        kind = "tokens of a floating-point type" if code in (6, 7) else f"an unknown token type (code {code})"
        raise InputError(f"{path}: holds {kind}; {REMAKE}")
    expected = _HEADER.size + 12 * sequences + 8 * document_entries  # Python integers: no count can overflow
    if sequences and len(index) == expected + sequences:
        raise InputError(f"{path}: a multimodal index (a mode for each sequence); write the text without --multimodal")
    if len(index) != expected or document_entries == 0:
        raise InputError(
            f"{path}: has {len(index)} bytes where its header says {expected}: cut short or damaged; {REMAKE}"
        )
    return np.dtype(_DTYPE_NAMES[code]).newbyteorder("<"), sequences, document_entries


def _is_sorted(values: npt.NDArray[np.int64]) -> bool:
    """Whether no value is smaller than the one before it; in blocks, to need no memory of the size of ``values``."""
    blocks = (values[start : start + _CHECKED_AT_ONCE + 1] for start in range(0, len(values), _CHECKED_AT_ONCE))
    return all(bool(np.all(block[1:] >= block[:-1])) for block in blocks)
