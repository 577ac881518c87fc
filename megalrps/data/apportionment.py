"""In which order several sources are drawn from, so that each keeps its share over every prefix.

This is the chairman assignment problem: each year one of n states gives the chairman, and after every number of years
each state has given as many as its weight says, to less than one. R. Tijdeman (The chairman assignment problem,
Discrete Mathematics 32, 1980, 323-330) gives an order in which no state is ever further from its share than
1 - 1/(2n - 2), the best bound there is for all weights.

The order is defined here for ever: checkpoints refer to samples by their place in it. Integers only, so every machine
finds the same one.
"""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from megalrps.errors import InputError
from megalrps.exact import LARGEST_PERIOD


class Apportionment:
    """The order in which sources of exact ``shares`` are drawn: draw i is the ``rank``-th of source ``member``.

    Draws repeat with the common denominator of the shares as their period, after which every source has had its share
    exactly. One period is tabulated: 5 to 8 bytes a draw.
    """

    shares: tuple[Fraction, ...]
    """The weights, divided by their sum."""

    period: int

    def __init__(self, weights: Sequence[Fraction]) -> None:
        """InputError where a weight is not above 0 or the period would be too long; it says how to round."""
        self.shares = shares_of(weights)
        self.period = _period(self.shares)
        self._quotas = [int(share * self.period) for share in self.shares]
        self._quotas_M = np.array(self._quotas, np.int64)
        self._member_of_slot = _schedule(self._quotas, self.period)
        self._rank_of_slot = _ranks(self._member_of_slot, len(self._quotas))

    def __call__(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Draws ``indices`` [n] (int64, >= 0): the source of each and which of that source's own draws it is, [n]."""
        if indices.size and int(indices.min()) < 0:
            raise ValueError("sample indices start at 0")
        periods, slots = np.divmod(indices, self.period)
        members = self._member_of_slot[slots].astype(np.int64)
        return members, periods * self._quotas_M[members] + self._rank_of_slot[slots]

    def counts(self, count: int) -> list[int]:
        """Of the first ``count`` draws, how many are each source's; each differs from its share by less than 1."""
        periods, rest = divmod(count, self.period)
        of_rest = np.bincount(self._member_of_slot[:rest], minlength=len(self._quotas)).tolist()
        return [periods * quota + more for quota, more in zip(self._quotas, of_rest, strict=True)]

    def longest(self, member: int, limit: int) -> int:
        """The largest number of first draws among which source ``member`` has no more than ``limit``."""
        periods, rest = divmod(limit, self._quotas[member])
        slots_of_member = np.flatnonzero(self._member_of_slot == member)
        return periods * self.period + int(slots_of_member[rest])


def shares_of(weights: Sequence[Fraction]) -> tuple[Fraction, ...]:
    """The weights, divided by their sum; InputError for those that no order can be made of."""
    if not weights or min(weights) <= 0:
        raise InputError(f"weights {_listed(weights)}: give one or more, each above 0")
    total = sum(weights, Fraction(0))
    shares = tuple(weight / total for weight in weights)
    if _period(shares) > LARGEST_PERIOD:
        near = " ".join(str(max(1, round(1000 * share))) for share in shares)
        raise InputError(
            f"weights {_listed(weights)}: their shares repeat only after {_period(shares):,} samples, and that may be "
            f"{LARGEST_PERIOD:,} at most: round them to whole numbers of a smaller sum, such as {near}"
        )
    return shares


def _period(shares: Sequence[Fraction]) -> int:
    return math.lcm(*(share.denominator for share in shares))


def _listed(weights: Sequence[Fraction]) -> str:
    return " ".join(f"{float(weight):.12g}" for weight in weights)


def _schedule(quotas: Sequence[int], period: int) -> npt.NDArray[np.unsignedinteger]:
    """By slot of one period, the source that is drawn: [period].

    With e = 1/(2n - 2) and source i holding the share q_i of the period, its draw x = 0, 1, ... must not come before it
    would be 1 - e ahead of its share, that is, in a slot s (from 1) with s q_i / period >= x + e, nor so late that the
    source would have fallen behind by more than 1 - e, that is, s - 1 <= (x + 1 - e) period / q_i. Tijdeman shows that
    all draws fit between these bounds; so taking, of those that may come, the one that must come first (the earlier
    source among equals) finds them a place, as it does for any such set of jobs of equal length.
    """
    count = len(quotas)
    if count == 1:
        return np.zeros(period, np.uint8)
    halves = 2 * count - 2
    members: list[int] = []
    waiting = [(_first_slot(0, quota, period, halves), member, 0) for member, quota in enumerate(quotas)]
    heapq.heapify(waiting)
    ready: list[tuple[int, int, int]] = []
    for slot in range(1, period + 1):
        while waiting and waiting[0][0] <= slot:
            _, member, draw = heapq.heappop(waiting)
            heapq.heappush(ready, (_last_slot(draw, quotas[member], period, halves), member, draw))
        _, member, draw = heapq.heappop(ready)
        members.append(member)
        if draw + 1 < quotas[member]:
            heapq.heappush(waiting, (_first_slot(draw + 1, quotas[member], period, halves), member, draw + 1))
    return np.array(members, np.min_scalar_type(count - 1))


def _first_slot(draw: int, quota: int, period: int, halves: int) -> int:
    return -(-period * (halves * draw + 1) // (halves * quota))


def _last_slot(draw: int, quota: int, period: int, halves: int) -> int:
    return period * (halves * (draw + 1) - 1) // (halves * quota) + 1


def _ranks(members: npt.NDArray[np.unsignedinteger], count: int) -> npt.NDArray[np.int32]:
    """By slot, how many slots before it are of the same source: [period]."""
    ranks = np.empty(members.size, np.int32)
    order = np.argsort(members, kind="stable")
    sizes = np.bincount(members, minlength=count)
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    ranks[order] = np.arange(members.size) - starts
    return ranks
