"""The sample stream: which tokens are sample i, for every i, for ever.

Sample i is a pure function of (content of the increments, seed, i): the horizon, the world size, the batch size, the
path that asks and the plan it belongs to do not enter. So a branch and the main path see the same samples over their
overlap.

The tokens of an increment are one line, cut into windows at multiples of the sequence length. The windows of all
increments of the stream are numbered one after the other, and each epoch draws every window once, in the order of a
keyed permutation.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from megalrps.data.increment import OpenIncrement
from megalrps.data.indexed import REMAKE, bin_path
from megalrps.data.permutation import KeyedPermutation
from megalrps.errors import InputError
from megalrps.fingerprint import canonical_json

_COUNTED_AT_ONCE = 1 << 20


class SampleStream:
    """Samples of the union of ``increments``, each ``sequence_length`` tokens and the token after them.

    Neighbouring windows of an increment share one token: the last target of one is the first input of the next. The
    tokens after the last full window are not drawn.
    """

    samples_per_epoch: int
    """Windows of all increments together; sample i belongs to epoch ``i // samples_per_epoch``."""

    def __init__(self, increments: Sequence[OpenIncrement], sequence_length: int, seed: int) -> None:
        """InputError where there is no increment, one holds no window, or they were made by different tokenizers."""
        if not increments:
            raise InputError("--increments: no increment to draw samples from; name at least one")
        if sequence_length < 1:
            raise InputError(f"--seq-length {sequence_length}: must be at least 1")
        self.increments = tuple(increments)
        self.sequence_length = sequence_length
        self.seed = seed
        _check_one_tokenizer(self.increments)
        windows = [_window_count(increment, sequence_length) for increment in self.increments]
        self._window_starts = np.cumsum([0, *windows[:-1]], dtype=np.int64)
        self.samples_per_epoch = sum(windows)
        self._fingerprints = [increment.manifest.fingerprint for increment in self.increments]
        self._permutations: dict[int, KeyedPermutation] = {}

    def locate(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Where samples ``indices`` [n] (int64, >= 0) lie: ordinal of increment and of window in it, both [n]."""
        epochs, places = np.divmod(indices, self.samples_per_epoch)
        drawn = np.empty_like(places)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            drawn[of_epoch] = self._permutation(int(epoch))(places[of_epoch])
        ordinals = np.searchsorted(self._window_starts, drawn, side="right") - 1
        return ordinals, drawn - self._window_starts[ordinals]

    def samples(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens of samples ``indices`` [n] (int64, >= 0): int64 [n, sequence_length + 1].

        Raises InputError where a token lies outside the vocabulary: the file was changed.
        """
        ordinals, windows = self.locate(indices)
        length = self.sequence_length
        tokens_NS = np.empty((len(ordinals), length + 1), np.int64)
        for row, ordinal, window in zip(tokens_NS, ordinals.tolist(), windows.tolist(), strict=True):
            start = window * length
            row[:] = self.increments[ordinal].dataset.tokens[start : start + length + 1]
        self._check_vocabulary(tokens_NS, ordinals)
        return tokens_NS

    def consumed(self, count: int) -> dict[str, int]:
        """Of the first ``count`` samples, how many belong to each increment, by its name.

        A full epoch draws every window once, so only the last, partial epoch is enumerated.
        """
        epochs = count // self.samples_per_epoch
        windows = np.diff([*self._window_starts, self.samples_per_epoch])
        counts = epochs * windows
        for start in range(epochs * self.samples_per_epoch, count, _COUNTED_AT_ONCE):
            block = np.arange(start, min(start + _COUNTED_AT_ONCE, count), dtype=np.int64)
            counts += np.bincount(self.locate(block)[0], minlength=len(windows))
        names = (increment.manifest.name for increment in self.increments)
        return dict(zip(names, counts.tolist(), strict=True))

    def _permutation(self, epoch: int) -> KeyedPermutation:
        if epoch < 0:
            raise ValueError("sample indices start at 0")
        if epoch not in self._permutations:
            text = canonical_json({"epoch": epoch, "increments": self._fingerprints, "seed": self.seed})
            key = hashlib.blake2b(text.encode()).digest()
            self._permutations[epoch] = KeyedPermutation(self.samples_per_epoch, key)
        return self._permutations[epoch]

    def _check_vocabulary(self, tokens_NS: npt.NDArray[np.int64], ordinals: npt.NDArray[np.int64]) -> None:
        vocab_size = self.increments[0].manifest.tokenizer.vocab_size
        unsigned_NS = tokens_NS.view(np.uint64)  # a negative id becomes a huge one, so one pass sees both
        if unsigned_NS.size and int(unsigned_NS.max()) >= vocab_size:
            row = int(np.argmax(unsigned_NS.max(axis=1) >= vocab_size))
            path = bin_path(self.increments[int(ordinals[row])].dataset.prefix)
            raise InputError(f"{path}: holds a token outside its vocabulary of {vocab_size}: damaged; {REMAKE}")


def sequential_windows(increment: OpenIncrement, sequence_length: int) -> Iterator[npt.NDArray[np.int64]]:
    """The tokens of ``increment`` in order, for evaluation: int64 windows [sequence_length + 1], the last one shorter.

    Each window starts with the last token of the one before, so every token but the first is a target exactly once.
    Raises InputError for an increment of fewer than two tokens: it has no target.
    """
    tokens = increment.dataset.tokens
    if tokens.size < 2:
        raise InputError(f"{bin_path(increment.dataset.prefix)}: too short to evaluate on: no token has one before it")
    starts = range(0, tokens.size - 1, sequence_length)
    return (tokens[start : start + sequence_length + 1].astype(np.int64) for start in starts)


def _window_count(increment: OpenIncrement, sequence_length: int) -> int:
    tokens = increment.dataset.tokens.size
    windows = (tokens - 1) // sequence_length
    if windows < 1:
        raise InputError(
            f"{bin_path(increment.dataset.prefix)}: increment {increment.manifest.name} has {tokens} tokens, "
            f"not one sample of {sequence_length} + 1; add data or lower --seq-length"
        )
    return windows


def _check_one_tokenizer(increments: Sequence[OpenIncrement]) -> None:
    first = increments[0].manifest
    for increment in increments[1:]:
        if increment.manifest.tokenizer != first.tokenizer:
            raise InputError(
                f"--increments: {first.name} and {increment.manifest.name} were made by different "
                "tokenizers; preprocess them with the same one"
            )
