"""The sums of gradients over replicas, holders and ends: which buckets leave when, and what is left of them.

A bucket leaves when its last contribution of the update has come, while the backward pass goes on with earlier layers.
Replicas hold the same part of the model and run the same schedule, and autograd runs a graph in an order that depends
on the graph alone: so their buckets are full in the same order, and their collectives meet. The sums over those that
hold the same parameters are made last, over shards, in the order of buckets, which all of them share.

Where gradients are sharded (ZeRO-2: Rajbhandari et al. 2019, arXiv 1910.02054, section 5.2) a bucket leaves each time
that every parameter has contributed, mostly once a micro-batch; its sum goes to this rank's shard, and its memory is
freed until the next contribution. One such bucket at most is under way: the next one to leave waits for it.
"""

from collections import Counter
from collections.abc import Sequence

from megalrps.parallel.bucket import Bucket
from megalrps.parallel.collectives import Pending, start_sum_, start_sum_own_
from megalrps.parallel.group import Group


class GradientSums:
    """The gradients of all buckets of one rank on their way from contributions to sums.

    ``frees``: gradients are sharded too, see above. ``overlap`` False: what has to be exchanged blocks, and what can
    wait waits for :meth:`finish`. ``uses``: contributions of a parameter in one micro-batch where it is not one.
    """

    def __init__(
        self, buckets: Sequence[Bucket], replicas: Group, *, frees: bool, overlap: bool, uses: Counter[str]
    ) -> None:
        self._buckets = buckets
        self._replicas = replicas
        self._frees = frees
        self._overlap = overlap
        self._uses = [[uses.get(piece.name, 1) for piece in bucket.slices] for bucket in buckets]
        self._expected = [0] * len(buckets)  # contributions that the update still lacks
        self._missing = [Counter[int]() for _ in buckets]  # those that lack for the bucket to leave, where it is freed
        self._under_way: dict[int, Pending] = {}
        self._left: set[int] = set()

    def begin(self, micro_batches: int) -> None:
        """Set every gradient to zero and expect the contributions of so many micro-batches."""
        assert not self._under_way, "the last update's gradients were not finished"
        self._left.clear()
        for index, bucket in enumerate(self._buckets):
            if self._frees:
                bucket.gradient_shard.zero_()
                self._free(index)
            else:
                bucket.gradients.zero_()
            self._expected[index] = micro_batches * sum(self._uses[index])
            self._missing[index] = self._all_missing(index)

    def ensure(self, index: int) -> None:
        """Make a contribution to bucket ``index`` possible: the memory of its gradients is there."""
        if not self._frees:
            return
        self._end(index)
        bucket = self._buckets[index]
        if bucket.gradients.untyped_storage().size() == 0:
            bucket.gradients.untyped_storage().resize_(bucket.gradients.nbytes)
            bucket.gradients.zero_()

    def contributed(self, index: int, member: int) -> None:
        """Parameter ``member`` of bucket ``index`` has added to its gradient."""
        if self._replicas.size == 1:
            return
        self._expected[index] -= 1
        if self._expected[index] < 0:
            name = self._buckets[index].slices[member].name
            raise RuntimeError(f"a gradient of {name} came after its sum had left: more uses or passes than stated")
        if self._frees:
            self._missing[index] -= Counter([member])
            if not self._missing[index] or self._expected[index] == 0:
                self._start(index)
        elif self._overlap and self._expected[index] == 0:
            self._start(index)

    def finish(self) -> None:
        """Start what has not left, wait for all, and add up what holders and ends computed in parts."""
        for index in range(len(self._buckets) if self._replicas.size > 1 else 0):
            if self._frees:
                self._end(index)
            if self._has_gradients(index) if self._frees else index not in self._left:
                self._start(index)
        for index in list(self._under_way):
            self._end(index)
        self._expected = [0] * len(self._buckets)
        for bucket in self._buckets:
            if bucket.sums and bucket.holders is not None:
                bucket.holders.sum_(bucket.gradient_shard)
            if bucket.ends is not None:
                bucket.ends.sum_(bucket.gradient_shard)

    def _start(self, index: int) -> None:
        bucket = self._buckets[index]
        if self._frees:
            for other in list(self._under_way):
                self._end(other)
            self._missing[index] = self._all_missing(index)
        sharded = len(bucket.shard) < len(bucket.gradients)
        start = start_sum_own_ if sharded else start_sum_
        self._under_way[index] = start(bucket.gradients, self._replicas)
        self._left.add(index)
        if not self._overlap:
            self._end(index)

    def _end(self, index: int) -> None:
        pending = self._under_way.pop(index, None)
        if pending is None:
            return
        summed = pending.wait()
        if self._frees:
            self._buckets[index].gradient_shard.add_(summed)
            self._free(index)

    def _free(self, index: int) -> None:
        self._buckets[index].gradients.untyped_storage().resize_(0)

    def _all_missing(self, index: int) -> Counter[int]:
        return Counter(dict(enumerate(self._uses[index])))

    def _has_gradients(self, index: int) -> bool:
        return self._buckets[index].gradients.untyped_storage().size() > 0
