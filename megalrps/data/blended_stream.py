"""Sample sources made of sample sources: in fixed shares (a blend, a replay), or one after the other (a union).

As with the plain stream, sample i is a pure function of content, weights, seed and i. Nothing is stored but one period
of the shares.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from megalrps.data.apportionment import Apportionment
from megalrps.data.blend import OpenBlend, OpenData
from megalrps.data.increment import OpenIncrement
from megalrps.data.packing import Packing
from megalrps.data.permutation import EpochOrders
from megalrps.data.stream import Reading, SampleBatch, SampleSource, SampleStream
from megalrps.data.tally import tally
from megalrps.errors import InputError

Places = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


class BlendedSource:
    """Samples of ``parts`` in the exact shares of their ``weights``, each part in its own order and own epochs.

    Over every prefix of the samples, each part has its share to less than one sample.
    """

    samples_per_epoch: int
    """The least, over the parts, of a part's samples divided by its share: so many first ones repeat no sample."""

    def __init__(self, parts: Sequence[SampleSource], weights: Sequence[Fraction]) -> None:
        """InputError for weights that no order can be made of; ValueError unless there is one for each part."""
        if len(parts) != len(weights):
            raise ValueError(f"{len(weights)} weights for {len(parts)} parts")
        self.parts = tuple(parts)
        self.order = Apportionment(weights)
        self.sequence_length = parts[0].sequence_length
        self.increments = _leaves(self.parts)
        self.notes = _notes(self.parts)
        shares = zip(parts, self.order.shares, strict=True)
        self.samples_per_epoch = min(int(part.samples_per_epoch / share) for part, share in shares)

    def locate(self, indices: npt.NDArray[np.int64]) -> Places:
        """Where samples ``indices`` [n] (int64, >= 0) lie: ordinal in ``increments`` and place in that one, [n]."""
        return _located(self.parts, *self.order(indices))

    def batch(self, indices: npt.NDArray[np.int64]) -> SampleBatch:
        """Samples ``indices`` [n] (int64, >= 0), in their order."""
        return _gathered(self.parts, *self.order(indices))

    def consumed(self, count: int, start: int = 0) -> dict[str, int]:
        """Of the samples ``start`` to ``count - 1``, how many lie in each increment, by its name."""
        total: Counter[str] = Counter()
        for part, first, last in zip(self.parts, self.order.counts(start), self.order.counts(count), strict=True):
            total.update(part.consumed(last, first))
        return dict(total)


class UnionSource:
    """One epoch of every part, in one keyed permutation of all their samples; each epoch has another.

    What the plain stream is for increments, this is where a blend is among them. The samples of the parts are numbered
    one after the other, those of a part in the part's own order. ``key`` is what the order follows from: JSON values.
    """

    samples_per_epoch: int

    def __init__(self, parts: Sequence[SampleSource], key: Mapping[str, Any]) -> None:
        self.parts = tuple(parts)
        self.sequence_length = parts[0].sequence_length
        self.increments = _leaves(self.parts)
        self.notes = _notes(self.parts)
        sizes = [part.samples_per_epoch for part in parts]
        self._starts = np.cumsum([0, *sizes[:-1]], dtype=np.int64)
        self.samples_per_epoch = sum(sizes)
        self._drawn = EpochOrders(self.samples_per_epoch, key)
        # A part is always drawn from its beginning here, so each epoch has the same samples of each increment.
        drawn = [part.consumed(size) for part, size in zip(parts, sizes, strict=True)]
        counts = [count for of_part in drawn for count in of_part.values()]
        self._names = [name for of_part in drawn for name in of_part]
        self._per_epoch = np.array(counts, np.int64)

    def locate(self, indices: npt.NDArray[np.int64]) -> Places:
        """Where samples ``indices`` [n] (int64, >= 0) lie: ordinal in ``increments`` and place in that one, [n]."""
        return _located(self.parts, *self._numbered(indices))

    def batch(self, indices: npt.NDArray[np.int64]) -> SampleBatch:
        """Samples ``indices`` [n] (int64, >= 0), in their order."""
        return _gathered(self.parts, *self._numbered(indices))

    def consumed(self, count: int, start: int = 0) -> dict[str, int]:
        """Of the samples ``start`` to ``count - 1``, how many lie in each increment, by its name."""
        counts = tally(self.locate, self._per_epoch, start, count).tolist()
        return dict(zip(self._names, counts, strict=True))

    def _numbered(self, indices: npt.NDArray[np.int64]) -> Places:
        """The part of each sample, and its number in the part's own order."""
        numbers = self._drawn(indices)
        members = np.searchsorted(self._starts, numbers, side="right") - 1
        return members, numbers - self._starts[members]


def source_over(
    data: Sequence[OpenData], sequence_length: int, seed: int, reading: Reading | None = None
) -> SampleSource:
    """The samples of the union of ``data``: increments, blends, or both.

    Raises InputError as :class:`SampleStream` does.
    """
    reading = reading or Reading()
    _check_one_tokenizer(data)
    plain = [each for each in data if isinstance(each, OpenIncrement)]
    if len(plain) == len(data):
        return SampleStream(plain, sequence_length, seed, reading)
    parts = [_source_of(each, sequence_length, seed, reading) for each in data]
    if len(parts) == 1:
        return parts[0]
    key: dict[str, Any] = {"increments": [each.manifest.fingerprint for each in data], "seed": seed}
    if reading.pack:
        key["packing"] = Packing.of_length(sequence_length).identity()
    return UnionSource(parts, key)


def _source_of(data: OpenData, sequence_length: int, seed: int, reading: Reading) -> SampleSource:
    if not isinstance(data, OpenBlend):
        return SampleStream([data], sequence_length, seed, reading)
    members = [SampleStream([member], sequence_length, seed, reading) for member in data.members]
    return BlendedSource(members, data.manifest.weights)


def _check_one_tokenizer(data: Sequence[OpenData]) -> None:
    for each in data[1:]:
        if each.manifest.tokenizer != data[0].manifest.tokenizer:
            raise InputError(
                f"--increments: {data[0].manifest.name} and {each.manifest.name} were made by different tokenizers; "
                "preprocess them with the same one"
            )


def _notes(parts: Sequence[SampleSource]) -> tuple[str, ...]:
    return tuple(note for part in parts for note in part.notes)


def _leaves(parts: Sequence[SampleSource]) -> tuple[OpenIncrement, ...]:
    return tuple(increment for part in parts for increment in part.increments)


def _located(parts: Sequence[SampleSource], members: npt.NDArray[np.int64], own: npt.NDArray[np.int64]) -> Places:
    """Sample ``own`` of part ``members``, both [n]: ordinal of its increment among those of all parts, and place."""
    ordinals, places = np.empty_like(members), np.empty_like(own)
    before = 0
    for member, part in enumerate(parts):
        rows = np.flatnonzero(members == member)
        if rows.size:
            of_part, places[rows] = part.locate(own[rows])
            ordinals[rows] = before + of_part
        before += len(part.increments)
    return ordinals, places


def _gathered(parts: Sequence[SampleSource], members: npt.NDArray[np.int64], own: npt.NDArray[np.int64]) -> SampleBatch:
    """Sample ``own`` of part ``members``, both [n]: row by row."""
    rows_of = [np.flatnonzero(members == member) for member in range(len(parts))]
    drawn = [(rows, part.batch(own[rows])) for part, rows in zip(parts, rows_of, strict=True) if rows.size]
    if len(drawn) < 2:
        return drawn[0][1] if drawn else parts[0].batch(own)
    length = parts[0].sequence_length
    tokens_BS = np.empty((members.size, length + 1), np.int64)
    starts_BS = np.empty((members.size, length), np.int32) if drawn[0][1].starts_BS is not None else None
    counted_BS = np.ones((members.size, length), np.bool_) if any(b.counted_BS is not None for _, b in drawn) else None
    for rows, batch in drawn:
        tokens_BS[rows] = batch.tokens_BS
        if starts_BS is not None and batch.starts_BS is not None:
            starts_BS[rows] = batch.starts_BS
        if counted_BS is not None and batch.counted_BS is not None:
            counted_BS[rows] = batch.counted_BS
    return SampleBatch(tokens_BS, starts_BS, counted_BS)
