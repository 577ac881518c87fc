"""The sample stream: which tokens are sample i, for every i, for ever.

Sample i is a pure function of (content of the increments, seed, i): the horizon, the world size, the batch size, the
path that asks and the plan it belongs to do not enter. So a branch and the main path see the same samples over their
overlap.

The tokens of an increment are one line, cut into windows at multiples of the sequence length; or its documents are
packed whole (:mod:`megalrps.data.packing`). The samples of all increments of the stream are numbered one after the
other, and each epoch draws every one once, in the order of a keyed permutation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megalrps.data.increment import OpenIncrement
from megalrps.data.index_format import bin_path
from megalrps.data.packing import PackedDocuments, Packing, damaged_index, outside_vocabulary
from megalrps.data.permutation import EpochOrders
from megalrps.data.tally import tally
from megalrps.data.windows import IndexDamagedError, TokenOutsideError
from megalrps.errors import InputError

_Rows = tuple[npt.NDArray[np.int64], npt.NDArray[np.int32] | None, npt.NDArray[np.bool_] | None]


@dataclass(frozen=True)
class Reading:
    """What samples are made of, and what is said of them beside their tokens."""

    documents: bool = False
    """Say where in a sample documents begin."""
    mask_eod: bool = False
    """Labels that follow an end-of-document token do not count in the loss (Megatron's ``--eod-mask-loss``)."""
    pack: bool = False
    """Whole documents, packed; unset: windows that cross documents. Packed samples always say their documents."""
    cache: Path | None = None
    """Folder for the counts of packed samples; unset: beside the data. It changes no sample."""


@dataclass(frozen=True, eq=False)
class SampleBatch:
    """Some samples, one a row: S inputs, ``tokens_BS[:, :-1]``, and S labels, ``tokens_BS[:, 1:]``."""

    tokens_BS: npt.NDArray[np.int64]  # noqa: N815
    """int64 [n, S + 1]."""
    starts_BS: npt.NDArray[np.int32] | None = None  # noqa: N815
    """int32 [n, S]: the place in its sample where the document of each input begins; None: nobody asked."""
    counted_BS: npt.NDArray[np.bool_] | None = None  # noqa: N815
    """bool [n, S]: which labels count in the loss; None: all."""


class SampleSource(Protocol):
    """What a run draws its samples from: one stream, or several in fixed shares."""

    sequence_length: int
    """Inputs of a sample (S)."""
    increments: tuple[OpenIncrement, ...]
    """What the samples come from, in order; ``locate`` counts in it."""
    samples_per_epoch: int
    """So many first samples repeat none."""
    notes: tuple[str, ...]
    """What the user should know of how the data were opened."""

    def locate(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Where samples ``indices`` [n] (int64, >= 0) lie: ordinal of increment, number of sample in it, both [n]."""

    def batch(self, indices: npt.NDArray[np.int64]) -> SampleBatch:
        """Samples ``indices`` [n] (int64, >= 0), in their order."""

    def consumed(self, count: int, start: int = 0) -> dict[str, int]:
        """Of the samples ``start`` to ``count - 1``, how many lie in each increment, by its name."""


class SampleStream:
    """Samples of the union of ``increments``, each ``sequence_length`` tokens and the token after them.

    Neighbouring windows of an increment share one token: the last target of one is the first input of the next. The
    tokens after the last full window are not drawn. The order of packed samples is one of its own: the key of the
    permutation holds the rule of the packing and S as well. Both orders are for ever.
    """

    samples_per_epoch: int
    """Samples of all increments together; sample i belongs to epoch ``i // samples_per_epoch``."""
    notes: tuple[str, ...]
    """What the user should know of how the stream was opened."""

    def __init__(
        self, increments: Sequence[OpenIncrement], sequence_length: int, seed: int, reading: Reading | None = None
    ) -> None:
        """InputError where there is no increment, one holds no sample, or they were made by different tokenizers."""
        if not increments:
            raise InputError("--increments: no increment to draw samples from; name at least one")
        if sequence_length < 1:
            raise InputError(f"--seq-length {sequence_length}: must be at least 1")
        self.increments = tuple(increments)
        self.sequence_length = sequence_length
        self.seed = seed
        self.reading = reading or Reading()
        _check_one_tokenizer(self.increments)
        self._parts: list[_Windows | PackedDocuments] = []
        key: dict[str, object] = {"increments": [each.manifest.fingerprint for each in increments], "seed": seed}
        self.notes = ()
        if self.reading.pack:
            packing = Packing.of_length(sequence_length)
            packed = [PackedDocuments(each, packing, self.reading.cache) for each in increments]
            self.notes = tuple(each.note for each in packed if each.note is not None)
            self._parts += packed
            key["packing"] = packing.identity()
        else:
            self._parts += [_Windows(each, sequence_length, self.reading.documents) for each in increments]
        counts = [part.count for part in self._parts]
        self._counts = np.array(counts, np.int64)
        self._firsts = np.cumsum([0, *counts[:-1]], dtype=np.int64)
        self.samples_per_epoch = sum(counts)
        self._drawn = EpochOrders(self.samples_per_epoch, key)

    def locate(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Where samples ``indices`` [n] (int64, >= 0) lie: ordinal of increment and number of sample in it, both [n].

        The number is that of the window, or of the packed sample.
        """
        drawn = self._drawn(indices)
        ordinals = np.searchsorted(self._firsts, drawn, side="right") - 1
        return ordinals, drawn - self._firsts[ordinals]

    def batch(self, indices: npt.NDArray[np.int64]) -> SampleBatch:
        """Samples ``indices`` [n] (int64, >= 0), in their order.

        Raises InputError where a token lies outside the vocabulary or the index contradicts itself: a file was changed.
        """
        if len(self._parts) == 1:
            tokens_BS, starts_BS, counted_BS = self._parts[0].rows(self._drawn(indices))
        else:
            tokens_BS, starts_BS, counted_BS = self._joined(*self.locate(indices))
        if self.reading.mask_eod:
            follows_none_BS = tokens_BS[:, :-1] != self.increments[0].manifest.tokenizer.eod
            counted_BS = follows_none_BS if counted_BS is None else counted_BS & follows_none_BS
        return SampleBatch(tokens_BS, starts_BS, counted_BS)

    def samples(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens of samples ``indices`` [n] (int64, >= 0): int64 [n, sequence_length + 1]; raises as :meth:`batch`."""
        return self.batch(indices).tokens_BS

    def consumed(self, count: int, start: int = 0) -> dict[str, int]:
        """Of the samples ``start`` to ``count - 1``, how many belong to each increment, by its name."""
        counts = tally(self.locate, self._counts, start, count).tolist()
        return dict(zip((increment.manifest.name for increment in self.increments), counts, strict=True))

    def _joined(self, ordinals: npt.NDArray[np.int64], numbers: npt.NDArray[np.int64]) -> _Rows:
        """Rows out of several increments, in the order of the samples."""
        count, length = len(ordinals), self.sequence_length
        if count and (ordinals == ordinals[0]).all():
            return self._parts[int(ordinals[0])].rows(numbers)
        tokens_BS = np.empty((count, length + 1), np.int64)
        starts_BS = np.empty((count, length), np.int32) if self.reading.documents or self.reading.pack else None
        counted_BS = np.empty((count, length), np.bool_) if self.reading.pack else None
        for ordinal, part in enumerate(self._parts):
            rows = np.flatnonzero(ordinals == ordinal)
            if rows.size:
                tokens_BS[rows], starts, counted = part.rows(numbers[rows])
                if starts_BS is not None and starts is not None:
                    starts_BS[rows] = starts
                if counted_BS is not None and counted is not None:
                    counted_BS[rows] = counted
        return tokens_BS, starts_BS, counted_BS


class _Windows:
    """The windows of one increment, numbered from 0."""

    def __init__(self, increment: OpenIncrement, sequence_length: int, documents: bool) -> None:
        self._increment, self._dataset = increment, increment.dataset
        self._length, self._documents = sequence_length, documents
        self._vocab_size = increment.manifest.tokenizer.vocab_size
        tokens = increment.dataset.tokens_count
        self.count = (tokens - 1) // sequence_length
        if self.count < 1:
            raise InputError(
                f"{bin_path(increment.dataset.prefix)}: increment {increment.manifest.name} has {tokens} tokens, "
                f"not one sample of {sequence_length} + 1; add data or lower --seq-length"
            )

    def rows(self, numbers: npt.NDArray[np.int64]) -> _Rows:
        """Windows ``numbers`` [n]: tokens [n, S + 1], starts [n, S] if they are asked for, all labels counted."""
        starts = numbers * self._length
        try:
            tokens_BS = self._dataset.gather(starts, self._length + 1, self._vocab_size)
            if not self._documents:
                return tokens_BS, None, None
            return tokens_BS, self._dataset.document_starts(starts, self._length), None
        except TokenOutsideError:
            raise outside_vocabulary(self._increment) from None
        except IndexDamagedError as error:
            raise damaged_index(self._increment, error) from None


def sequential_windows(increment: OpenIncrement, sequence_length: int) -> Iterator[npt.NDArray[np.int64]]:
    """The tokens of ``increment`` in order, for evaluation: int64 windows [sequence_length + 1], the last one shorter.

    Each window starts with the last token of the one before, so every token but the first is a target exactly once.
    Raises InputError for an increment of fewer than two tokens: it has no target.
    """
    dataset = increment.dataset
    count = dataset.tokens_count
    if count < 2:
        raise InputError(f"{bin_path(dataset.prefix)}: too short to evaluate on: no token has one before it")

    def window(start: int) -> npt.NDArray[np.int64]:
        length = min(sequence_length + 1, count - start)
        try:
            rows = dataset.gather(np.array([start], np.int64), length, increment.manifest.tokenizer.vocab_size)
        except TokenOutsideError:
            raise outside_vocabulary(increment) from None
        return rows[0]

    return map(window, range(0, count - 1, sequence_length))


def _check_one_tokenizer(increments: Sequence[OpenIncrement]) -> None:
    first = increments[0].manifest
    for increment in increments[1:]:
        if increment.manifest.tokenizer != first.tokenizer:
            raise InputError(
                f"--increments: {first.name} and {increment.manifest.name} were made by different "
                "tokenizers; preprocess them with the same one"
            )
