"""Writing an indexed dataset, document after document, in constant memory, with all its digests on the way."""

import errno
import fcntl
import os
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from megalrps.data.block_digests import (
    BLOCK_BYTES,
    GROUP_BLOCKS,
    BlockDigests,
    DatasetDigests,
    DigestingFile,
    LeafWriter,
)
from megalrps.data.index_format import (
    DTYPE_CODES,
    LONGEST_SEQUENCE,
    bin_path,
    blocks_path,
    idx_path,
    index_header,
    manifest_path,
)
from megalrps.errors import InputError
from megalrps.files import sync_directory

_COPIED_AT_ONCE = 1 << 20


class IndexedDatasetWriter:
    """Writes a dataset, document after document; a context manager.

    Tokens stream into partial files beside their places, of fixed names (``.NAME.partial``): what a killed run leaves,
    the next one replaces. Only when the block ends without an exception are all files flushed to the disk and renamed
    into place, the index last: a dataset that can be opened is whole. The index's arrays are spooled to unnamed files
    in the same folder. Memory: a few MiB, whatever the size.
    """

    def __init__(
        self,
        prefix: Path | str,
        dtype: npt.DTypeLike,
        *,
        overwrite: bool = False,
        block_bytes: int = BLOCK_BYTES,
        group_blocks: int = GROUP_BLOCKS,
    ) -> None:
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
        self._largest = int(np.iinfo(self.dtype).max)
        self._block_bytes, self._group_blocks = block_bytes, group_blocks
        self._document_count = self._sequence_count = self._token_count = 0
        self._highest_token = -1
        self._digests: DatasetDigests | None = None
        self._stack = ExitStack()
        self._open: _OpenFiles | None = None

    @property
    def document_count(self) -> int:
        """Documents added so far."""
        return self._document_count

    @property
    def sequence_count(self) -> int:
        """Sequences added so far."""
        return self._sequence_count

    @property
    def token_count(self) -> int:
        """Tokens added so far."""
        return self._token_count

    @property
    def highest_token(self) -> int:
        """The highest token id added so far; -1 before the first."""
        return self._highest_token

    @property
    def digests(self) -> DatasetDigests:
        """Digests of both files; known once the with-block has ended well."""
        if self._digests is None:
            raise RuntimeError("the digests are known after the writer's with-block has ended")
        return self._digests

    def __enter__(self) -> Self:
        path = bin_path(self.prefix)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with ExitStack() as stack:
                self._open = _OpenFiles(stack, self.prefix, self._block_bytes, self._group_blocks)
                self._stack = stack.pop_all()
        except OSError as error:
            raise InputError(
                f"{path}: cannot be written ({error.strerror}); choose another output directory"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        files, self._open = self._open, None
        with self._stack:
            if error is None and files is not None:
                self._finish(files)

    def add_document(self, tokens: npt.ArrayLike, sequence_lengths: Sequence[int] | None = None) -> None:
        """Append one document, token ids ``tokens`` [T], cut into sequences of ``sequence_lengths`` (their sum is T).

        By default a document is one sequence; one without tokens is then a document without a sequence, as Megatron's
        ``preprocess_data.py`` writes it. Raises InputError for ids that the dataset's type cannot hold.
        """
        stored = self._to_stored(np.asarray(tokens))
        if sequence_lengths is None:
            sequence_lengths = (stored.size,) if stored.size else ()
        elif sum(sequence_lengths) != stored.size or min(sequence_lengths, default=0) < 0:
            raise ValueError(f"sequence lengths {list(sequence_lengths)} do not cut a document of {stored.size} tokens")
        files = self._files()
        self._check_longest(max(sequence_lengths, default=0))
        files.lengths.write(struct.pack(f"<{len(sequence_lengths)}i", *sequence_lengths))
        self._count(1, len(sequence_lengths), stored.size)
        files.documents.write(struct.pack("<q", self._sequence_count))
        files.content.write(stored.data)

    def add_documents(self, tokens: npt.NDArray[Any], lengths: npt.NDArray[np.int64]) -> None:
        """Append n documents end to end, ``tokens`` [T] and ``lengths`` [n] (their sum is T), each one sequence.

        A length of 0 is a document without a sequence. Raises as :meth:`add_document`.
        """
        stored = self._to_stored(tokens)
        self._add_lengths(lengths, stored.size)
        self._files().content.write(stored.data)

    def copy_documents(self, tokens_file: IO[bytes], tokens_bytes: int, lengths: npt.NDArray[np.int64]) -> None:
        """Append documents of ``lengths`` [n] whose tokens are the next ``tokens_bytes`` of a file of this very type.

        As :meth:`add_documents`; copied in blocks. EOFError where the file ends before.
        """
        if tokens_bytes % self.dtype.itemsize:
            raise ValueError(f"{tokens_bytes} bytes are not a whole number of {self.dtype} tokens")
        self._add_lengths(lengths, tokens_bytes // self.dtype.itemsize)
        content = self._files().content
        buffer = bytearray(min(_COPIED_AT_ONCE, tokens_bytes))
        left = tokens_bytes
        while left:
            block = memoryview(buffer)[: min(left, len(buffer))]
            _read_all(tokens_file, block)
            self._to_stored(np.frombuffer(block, self.dtype.newbyteorder("<")))
            content.write(block)
            left -= len(block)

    def _files(self) -> "_OpenFiles":
        if self._open is None:
            raise RuntimeError("documents are added inside the writer's with-block")
        return self._open

    def _to_stored(self, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """``tokens`` in the stored type, checked: an id out of range would wrap round to another token."""
        if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
            raise ValueError(f"tokens of a document must be a flat array of integers, not {tokens.dtype}{tokens.shape}")
        if tokens.size:
            low, high = 0 if tokens.dtype.kind == "u" else int(tokens.min()), int(tokens.max())
            if low < 0 or high > self._largest:
                raise InputError(
                    f"{self.prefix}: token ids {low}..{high} do not fit {self.dtype} "
                    f"(0..{self._largest}); check the tokenizer's vocabulary size"
                )
            self._highest_token = max(self._highest_token, high)
        return np.ascontiguousarray(tokens, dtype=self.dtype.newbyteorder("<"))

    def _add_lengths(self, lengths: npt.NDArray[np.int64], tokens: int) -> None:
        lengths = np.asarray(lengths, np.int64)
        if lengths.ndim != 1 or (lengths.size and int(lengths.min()) < 0) or int(lengths.sum()) != tokens:
            raise ValueError(f"the lengths of {lengths.size} documents do not cut {tokens} tokens")
        files = self._files()
        self._check_longest(int(lengths.max()) if lengths.size else 0)
        has_tokens = lengths > 0
        files.lengths.write(lengths[has_tokens].astype("<i4").tobytes())
        files.documents.write((self._sequence_count + np.cumsum(has_tokens)).astype("<i8").tobytes())
        self._count(lengths.size, int(np.count_nonzero(has_tokens)), tokens)

    def _check_longest(self, tokens: int) -> None:
        if tokens > LONGEST_SEQUENCE:
            raise InputError(f"{self.prefix}: a document of {tokens} tokens is too long for one sequence; split it")

    def _count(self, documents: int, sequences: int, tokens: int) -> None:
        self._document_count += documents
        self._sequence_count += sequences
        self._token_count += tokens

    def _finish(self, files: "_OpenFiles") -> None:
        """Write the index, flush everything and put it in place."""
        bin_digest, bin_groups = files.content.finish()
        files.index.write(index_header(self.dtype, self._sequence_count, self._document_count))
        for block in _blocks_of(files.lengths):
            files.index.write(block)
        end = 0
        for block in _blocks_of(files.lengths):
            lengths = np.frombuffer(block, "<i4")
            ends = end + np.cumsum(lengths, dtype=np.int64)  # int32 would overflow at 2 GiB
            files.index.write(((ends - lengths) * self.dtype.itemsize).astype("<i8", copy=False).data)
            end = int(ends[-1])
        files.index.write(bytes(8))
        for block in _blocks_of(files.documents):
            files.index.write(block)
        idx_digest, idx_groups = files.index.finish()
        files.leaves.finish()
        # A dataset that is being replaced disappears first: its index or manifest must never describe the new tokens.
        idx_path(self.prefix).unlink(missing_ok=True)
        manifest_path(self.prefix).unlink(missing_ok=True)
        sync_directory(bin_path(self.prefix).parent)
        for path in (bin_path(self.prefix), blocks_path(self.prefix), idx_path(self.prefix)):
            partial_path(path).replace(path)
            sync_directory(path.parent)
        blocks = BlockDigests(self._block_bytes, self._group_blocks, bin_groups, idx_groups)
        self._digests = DatasetDigests(bin_digest, idx_digest, blocks)


class _OpenFiles:
    """The files of a dataset that is being written, open until ``stack`` ends; then the partial ones are gone."""

    def __init__(self, stack: ExitStack, prefix: str, block_bytes: int, group_blocks: int) -> None:
        folder = bin_path(prefix).parent
        content = stack.enter_context(locked_partial(bin_path(prefix)))
        self.leaves = LeafWriter(stack.enter_context(locked_partial(blocks_path(prefix))), group_blocks)
        index = stack.enter_context(locked_partial(idx_path(prefix)))
        self.content = DigestingFile(content, self.leaves, block_bytes)
        self.index = DigestingFile(index, self.leaves, block_bytes)
        self.lengths: IO[bytes] = stack.enter_context(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115 (it is)
        self.documents: IO[bytes] = stack.enter_context(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115 (it is)


def partial_path(path: Path) -> Path:
    """Where ``path`` is written until it is whole."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def locked_partial(path: Path) -> Iterator[int]:
    """Descriptor of the empty, locked partial file of ``path``; when the block ends, what was not renamed is removed.

    InputError where another process writes it: two runs would mix their bytes.
    """
    partial = partial_path(path)
    descriptor = _opened_and_locked(partial)
    try:
        os.ftruncate(descriptor, 0)
        yield descriptor
    finally:
        if _is_file(descriptor, partial):
            partial.unlink()
        os.close(descriptor)


def _opened_and_locked(partial: Path) -> int:
    while True:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise InputError(f"{partial}: another run is writing it; wait for it, or choose another output") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                os.close(descriptor)
                raise
            # A file system without locks: there, two runs at once remain the user's to avoid.
        # What was locked may have been renamed or removed by the run that held it, between opening and locking.
        if _is_file(descriptor, partial):
            return descriptor
        os.close(descriptor)


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether ``path`` is still the name of the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _blocks_of(spool: IO[bytes]) -> Iterator[bytes]:
    """All bytes of a spooled array, from its start."""
    spool.seek(0)
    while block := spool.read(_COPIED_AT_ONCE):
        yield block


def _read_all(file: IO[bytes], block: memoryview) -> None:
    """Fill ``block`` from ``file``."""
    filled = 0
    while filled < len(block):
        content = file.read(len(block) - filled)
        if not content:
            raise EOFError("the file of the tokens ends before all of them were read")
        block[filled : filled + len(content)] = content
        filled += len(content)
