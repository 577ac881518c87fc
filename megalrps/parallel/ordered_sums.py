"""Sums in an order that samples decide and the number of ranks does not: the same bits on 1, 2, 4 ... replicas.

A sum of floating-point numbers depends on its order, and a sum by the network on the number of ranks. Here the unit is
the micro-batch: the gradient of each is computed alone, in memory of zeros, and the M of a global batch are added up in
a binary tree over their places in it: where M is even the sum of its halves is their sums' sum, where it is odd one is
added after the other. Replicas hold equal runs of micro-batches in the order of their ranks; where their number is a
power of two each run is a subtree, whose top is the same wherever it was computed.

For debugging, not for production: the gradients of a rank take up to ``2 + log2(M / replicas)`` times their memory and
a little, and every rank receives those of all others once a step, unhidden, where a sum by the network moves twice its
own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megalrps.parallel.bucket import Bucket
from megalrps.parallel.collectives import start_stack
from megalrps.parallel.group import Group

_GATHERED_AT_ONCE = 1 << 22
"""Elements of a gradient that are gathered from all ranks at a time: 16 MiB a rank."""


def most_sums(count: int) -> int:
    """How many sums a tree of ``count`` terms holds at a time, at most: one a level."""
    return (count & -count).bit_length()


class TreeSum:
    """The sum of ``count`` terms that come one after the other, in the tree above; a term is one or several tensors."""

    def __init__(self, count: int) -> None:
        assert count >= 1
        self._count = count
        self._run = count // (count & -count)  # odd: what is left once halves have no halves
        self._added = 0
        self._sums: list[list[Tensor]] = []  # of subtrees whose right sibling is not there yet, and of an open run

    def add(self, term: Sequence[Tensor]) -> None:
        """Take the next term, which is copied."""
        assert self._added < self._count, "more terms than stated"
        if self._added % self._run:
            _add_(self._sums[-1], term)
        else:
            self._sums.append([part.clone() for part in term])
        self._added += 1
        runs, rest = divmod(self._added, self._run)
        while rest == 0 and runs % 2 == 0:  # as a binary counter carries
            right = self._sums.pop()
            _add_(self._sums[-1], right)
            runs //= 2

    @property
    def total(self) -> list[Tensor]:
        """The sum, once every term is in it."""
        assert self._added == self._count, f"{self._added} of {self._count} terms were added"
        (whole,) = self._sums
        return whole


def sum_in_order_(flat: Tensor, group: Group) -> Tensor:
    """Add the flat, contiguous ``flat`` up over the group in place, in the tree over ranks; returns it."""
    if group.size == 1:
        return flat
    for start in range(0, flat.numel(), _GATHERED_AT_ONCE):
        part = flat[start : start + _GATHERED_AT_ONCE]
        tree = TreeSum(group.size)
        for of_rank in start_stack(part, group).wait():
            tree.add([of_rank])
        part.copy_(tree.total[0])
    return flat


class OrderedSums:
    """The gradients of all buckets of one rank from micro-batches to sums; stands in for ``GradientSums``.

    Each replica has the whole sum afterwards, in ``Bucket.gradients``, also where each updates but its shard.
    """

    def __init__(self, buckets: Sequence[Bucket], replicas: Group) -> None:
        self._buckets = buckets
        self._replicas = replicas
        self._tree = TreeSum(1)

    def begin(self, micro_batches: int) -> None:
        """Set every gradient to zero and expect so many micro-batches."""
        self._tree = TreeSum(micro_batches)
        self._zero()

    def ensure(self, index: int) -> None:
        """A contribution to bucket ``index`` is always possible."""

    def contributed(self, index: int, member: int) -> None:
        """Nothing leaves before :meth:`finish`."""

    def end_micro_batch(self) -> None:
        """Put what the buckets hold into the sum, and begin anew from zero."""
        self._tree.add([bucket.gradients for bucket in self._buckets])
        self._zero()

    @torch.no_grad()
    def finish(self) -> None:
        """Leave the sums over replicas, and over those that hold a parameter and compute a part each, in the buckets.

        Both in the order of ranks.
        """
        for bucket, total in zip(self._buckets, self._tree.total, strict=True):
            bucket.gradients.copy_(total)
            sum_in_order_(bucket.gradients, self._replicas)
            if bucket.sums and bucket.holders is not None:
                sum_in_order_(bucket.gradients, bucket.holders)
        self._tree = TreeSum(1)

    def _zero(self) -> None:
        for bucket in self._buckets:
            bucket.gradients.zero_()


@torch.no_grad()
def _add_(sums: Sequence[Tensor], term: Sequence[Tensor]) -> None:
    for total, part in zip(sums, term, strict=True):
        total.add_(part)
