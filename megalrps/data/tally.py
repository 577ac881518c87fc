"""How many of a range of samples lie in each increment, without looking at more of them than must be."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

_AT_ONCE = 1 << 20

Locate = Callable[[npt.NDArray[np.int64]], tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]


def tally(locate: Locate, per_epoch: npt.NDArray[np.int64], start: int, stop: int) -> npt.NDArray[np.int64]:
    """Of the samples ``start`` to ``stop - 1``, how many lie in each increment: int64 [increments].

    ``locate`` says in which one each sample of a list lies, first of its two answers; ``per_epoch`` how many samples of
    each an epoch holds, in some order of its own. Whole epochs and a lone increment are counted by that alone. Of an
    epoch that is drawn in part, the smaller of the two parts is looked at.
    """
    if not 0 <= start <= stop:
        raise ValueError(f"no samples from {start} to {stop}")
    if len(per_epoch) == 1:
        return np.array([stop - start], np.int64)
    size = int(per_epoch.sum())
    first, last = start // size, stop // size
    if first == last:
        return _of_part(locate, per_epoch, first * size, start, stop)
    return (
        _of_part(locate, per_epoch, first * size, start, (first + 1) * size)
        + (last - first - 1) * per_epoch
        + _of_part(locate, per_epoch, last * size, last * size, stop)
    )


def _of_part(
    locate: Locate, per_epoch: npt.NDArray[np.int64], begin: int, start: int, stop: int
) -> npt.NDArray[np.int64]:
    """The counts of ``start`` to ``stop - 1``, all in the epoch that begins at sample ``begin``."""
    end = begin + int(per_epoch.sum())
    if 2 * (stop - start) > end - begin:
        left_out = _looked_at(locate, len(per_epoch), begin, start) + _looked_at(locate, len(per_epoch), stop, end)
        return per_epoch - left_out
    return _looked_at(locate, len(per_epoch), start, stop)


def _looked_at(locate: Locate, increments: int, start: int, stop: int) -> npt.NDArray[np.int64]:
    counts = np.zeros(increments, np.int64)
    for first in range(start, stop, _AT_ONCE):
        block = np.arange(first, min(first + _AT_ONCE, stop), dtype=np.int64)
        counts += np.bincount(locate(block)[0], minlength=increments)
    return counts
