"""Whole documents packed into samples: no sample mixes documents without saying so, and none is cut without need.

A sample has S + 1 slots for S inputs and S labels. The documents of an increment are taken in blocks of a fixed number,
in their order, and each block is packed on its own:

1. A document of more than S + 1 tokens is cut into pieces of S + 1, each beginning with the last token of the one
   before, so every token of a document but its first is a label exactly once. Documents of fewer than two tokens have
   no label and are left out.
2. Pieces of S + 1 tokens are samples, in the order of the documents.
3. The others follow by best fit (Johnson, Demers, Ullman, Garey, Graham, SIAM J. Comput. 3, 1974), the longest first
   and equal ones in the order of the documents: each goes where it leaves the least room; of samples with the same
   room, to the one that came to it last; to a new sample where it fits none. The pieces of a sample lie in that order.

So a sample is known from its block alone, which is packed when a sample of it is drawn. All that is kept is how many
samples there are up to and with each block: 8 bytes for 512 documents. The rule is for ever, as the order is.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megalrps.data.increment import OpenIncrement
from megalrps.data.index_format import REMAKE, bin_path, idx_path
from megalrps.data.windows import (
    IMPLEMENTATION,
    IndexDamagedError,
    IndexOffsets,
    TokenOutsideError,
    gather,
    native_module,
)
from megalrps.errors import InputError
from megalrps.files import replacing
from megalrps.fingerprint import fingerprint

VERSION = 1
"""Of the rule; it enters the order, so a change of the rule is a change of the order."""
LONGEST = 1 << 24
"""Largest S that can be packed."""

_DOCUMENTS = 512
_TOKENS = 2048
_DIGEST_BYTES = 32
_FROM_0 = np.zeros(1, np.int64)

Pieces = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]
Rows = tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class Packing:
    """How documents are packed: into samples of ``sequence_length`` (S) + 1 slots, ``block`` of them at a time."""

    sequence_length: int
    block: int

    @classmethod
    def of_length(cls, sequence_length: int) -> "Packing":
        """512 documents for each 2048 tokens of a sample, so that the last samples of a block weigh little anywhere."""
        if not 1 <= sequence_length <= LONGEST:
            raise InputError(f"--seq-length {sequence_length}: --pack-documents takes 1 to {LONGEST} tokens")
        return cls(sequence_length, _DOCUMENTS * -(-sequence_length // _TOKENS))

    def identity(self) -> dict[str, int]:
        """What samples depend on beside the data."""
        return {"block": self.block, "sequence_length": self.sequence_length, "version": VERSION}


class PackedDocuments:
    """The packed samples of one increment, numbered from 0."""

    count: int
    """How many there are."""
    note: str | None
    """What the user should know of how they were counted; None: nothing."""

    def __init__(
        self,
        increment: OpenIncrement,
        packing: Packing,
        cache: Path | None = None,
        *,
        implementation: str = IMPLEMENTATION,
    ) -> None:
        """Count the samples, in one pass over the index, unless a file in ``cache``, or beside the data, says them.

        That file, ``PREFIX.packed-S``, is written after the count; it is believed where it is whole and of this data.
        Raises InputError for a damaged index and where no document has two tokens.
        """
        self._increment, self._dataset = increment, increment.dataset
        self._packing, self._implementation = packing, implementation
        self._native = native_module(implementation)
        self._index = (
            self._dataset.sequence_pointers,
            self._dataset.sequence_lengths,
            self._dataset.document_indices,
            self._dataset.dtype.itemsize,
        )
        self._ends, self.note = self._counted(_counts_path(increment, packing, cache))
        self.count = int(self._ends[-1]) if self._ends.size else 0
        if self.count < 1:
            raise InputError(
                f"{bin_path(self._dataset.prefix)}: increment {increment.manifest.name} has no document of two "
                "tokens to pack; add data or leave out --pack-documents"
            )

    def rows(self, numbers: npt.NDArray[np.int64]) -> Rows:
        """Samples ``numbers`` [n] (int64): tokens int64 [n, S + 1], starts int32 [n, S], counted bool [n, S].

        What is left of a sample is filled with the end-of-document token, a document of its own. ``starts`` says where
        the document of each input begins, ``counted`` which labels are of their input's document.
        """
        bounds, starts, lengths = self.pieces(numbers)
        begins, ends = starts.tolist(), (starts + lengths).tolist()
        read = [self._dataset.read(begin, end) for begin, end in zip(begins, ends, strict=True)]
        identity = self._increment.manifest.tokenizer
        stored = np.concatenate(read) if read else np.empty(0, self._dataset.dtype)
        try:
            flat = gather(stored, _FROM_0, stored.size, identity.vocab_size, implementation=self._implementation)[0]
        except TokenOutsideError:
            raise outside_vocabulary(self._increment) from None
        if self._native is not None:
            rows: Rows = self._native.fill_packed(flat, bounds, lengths, self._packing.sequence_length, identity.eod)
            return rows
        return _fill(flat, bounds, lengths, self._packing.sequence_length, identity.eod)

    def pieces(self, numbers: npt.NDArray[np.int64]) -> Pieces:
        """What samples ``numbers`` [n] are made of: bounds int64 [n + 1], starts and lengths int64 [pieces].

        Sample i has the pieces [bounds[i], bounds[i + 1]); ``starts`` and ``lengths`` are in tokens of the dataset.
        Raises ValueError for a number that no sample has, InputError for a damaged index.
        """
        packing = self._packing
        numbers = np.require(numbers, np.int64, requirements=("C", "A"))
        try:
            if self._native is None:
                return _pieces(IndexOffsets(*self._index), packing, self._ends, numbers)
            found: Pieces = self._native.packed_pieces(
                *self._index, packing.block, packing.sequence_length, self._ends, numbers
            )
        except (IndexError, IndexDamagedError) as error:
            raise damaged_index(self._increment, error) from None
        return found

    def _counted(self, path: Path) -> tuple[npt.NDArray[np.int64], str | None]:
        """Samples up to and with each block, int64 [blocks], and what there is to say about it."""
        blocks = -(-self._dataset.document_count // self._packing.block)
        identity = bytes.fromhex(
            fingerprint({**self._packing.identity(), "data": self._increment.manifest.fingerprint})
        )
        ends = _read_counts(path, identity, blocks)
        if ends is not None:
            return ends, None
        ends = self._count()
        content = ends.astype("<i8", copy=False).tobytes()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                file.write(hashlib.sha256(identity + content).digest() + content)
        except OSError as error:
            return ends, (
                f"{path}: cannot be written ({error.strerror}): the packed samples of {self._increment.manifest.name} "
                "are counted again at every start; choose a writable --data-cache-path"
            )
        return ends, None

    def _count(self) -> npt.NDArray[np.int64]:
        packing = self._packing
        try:
            if self._native is None:
                blocks = _blocks(IndexOffsets(*self._index), packing)
                return np.cumsum([len(block) for block in blocks], dtype=np.int64)
            ends: npt.NDArray[np.int64] = self._native.count_packed(
                *self._index, packing.block, packing.sequence_length
            )
        except (IndexError, IndexDamagedError) as error:
            raise damaged_index(self._increment, error) from None
        return ends


def outside_vocabulary(increment: OpenIncrement) -> InputError:
    """What to raise for a token outside the vocabulary of ``increment``."""
    path, size = bin_path(increment.dataset.prefix), increment.manifest.tokenizer.vocab_size
    return InputError(f"{path}: holds a token outside its vocabulary of {size}: damaged; {REMAKE}")


def damaged_index(increment: OpenIncrement, error: Exception) -> InputError:
    """What to raise for numbers of an index that contradict one another, found by ``error``."""
    return InputError(f"{idx_path(increment.dataset.prefix)}: {error}: damaged; {REMAKE}")


def _counts_path(increment: OpenIncrement, packing: Packing, cache: Path | None) -> Path:
    prefix = Path(increment.dataset.prefix)
    if cache is None:
        return prefix.with_name(f"{prefix.name}.packed-{packing.sequence_length}")
    name = f"{increment.manifest.name}-{increment.manifest.fingerprint[:16]}"
    return cache / f"{name}.packed-{packing.sequence_length}"


def _read_counts(path: Path, identity: bytes, blocks: int) -> npt.NDArray[np.int64] | None:
    """The counts in ``path``, which follow their digest; None unless that is the one of ``identity`` and them."""
    try:
        with open(path, "rb") as file:
            content = file.read(_DIGEST_BYTES + 8 * blocks + 1)
    except OSError:
        return None
    digest, counts = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if len(counts) != 8 * blocks or hashlib.sha256(identity + counts).digest() != digest:
        return None
    return np.frombuffer(counts, "<i8").astype(np.int64)


# ---- The reference: csrc/packing.cpp gives the same numbers. ----


def _blocks(offsets: IndexOffsets, packing: Packing) -> Iterator[list[list[tuple[int, int]]]]:
    for first in range(0, offsets.documents, packing.block):
        yield _pack(offsets, first, min(first + packing.block, offsets.documents), packing.sequence_length)


def _pack(offsets: IndexOffsets, first: int, last: int, sequence_length: int) -> list[list[tuple[int, int]]]:
    """The samples of documents [first, last), each a list of pieces: start in the dataset and length, in tokens."""
    begins = [offsets.joined(document) for document in range(first, last + 1)]
    samples: list[list[tuple[int, int]]] = []
    rest: list[tuple[int, int]] = []
    for begin, end in pairwise(begins):
        if end < begin:
            raise IndexDamagedError("a document ends before it begins")
        start, stop = begin // offsets.token_bytes, end // offsets.token_bytes
        while stop - start > sequence_length:
            samples.append([(start, sequence_length + 1)])
            start += sequence_length
        if stop - start > 1:
            rest.append((start, stop - start))
    open_samples: list[list[list[tuple[int, int]]]] = [[] for _ in range(sequence_length + 2)]  # by room
    for start, length in sorted(rest, key=lambda piece: -piece[1]):  # stable: equal ones stay in order
        room = next((room for room in range(length, sequence_length + 1) if open_samples[room]), None)
        if room is None:
            sample: list[tuple[int, int]] = []
            samples.append(sample)
            room = sequence_length + 1
        else:
            sample = open_samples[room].pop()
        sample.append((start, length))
        open_samples[room - length].append(sample)
    return samples


def _pieces(
    offsets: IndexOffsets, packing: Packing, ends: npt.NDArray[np.int64], numbers: npt.NDArray[np.int64]
) -> Pieces:
    count = int(ends[-1]) if ends.size else 0
    if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) < count:
        raise ValueError("there is no packed sample of this number")
    bounds, pieces = [0], []
    for number in numbers.tolist():
        block = int(np.searchsorted(ends, number, side="right"))
        before = int(ends[block - 1]) if block else 0
        last = min((block + 1) * packing.block, offsets.documents)
        samples = _pack(offsets, block * packing.block, last, packing.sequence_length)
        if len(samples) != int(ends[block]) - before:
            raise IndexDamagedError(f"block {block} has other samples than were counted")
        pieces += samples[number - before]
        bounds.append(len(pieces))
    starts, lengths = np.array(pieces, np.int64).reshape(-1, 2).T
    return np.array(bounds, np.int64), starts.copy(), lengths.copy()


def _fill(
    tokens: npt.NDArray[np.int64],
    bounds: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    sequence_length: int,
    padding: int,
) -> Rows:
    rows = len(bounds) - 1
    tokens_BS = np.full((rows, sequence_length + 1), padding, np.int64)
    starts_BS = np.zeros((rows, sequence_length), np.int32)
    counted_BS = np.zeros((rows, sequence_length), np.bool_)
    used = 0
    for row in range(rows):
        place = 0
        for length in lengths[bounds[row] : bounds[row + 1]].tolist():
            tokens_BS[row, place : place + length] = tokens[used : used + length]
            starts_BS[row, place : place + length] = place
            counted_BS[row, place : place + length - 1] = True
            used, place = used + length, place + length
        starts_BS[row, place:] = place
    return tokens_BS, starts_BS, counted_BS
