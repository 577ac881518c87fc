"""A bucket: parameters that are alike, flat, and everything of theirs in the same order: gradients, masters, moments.

Each rank of the replicas owns one run of a bucket, its shard: what a sharded optimizer keeps and updates there
(ZeRO, Rajbhandari et al. 2019, arXiv 1910.02054, section 5.1).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalrps.parallel.group import Group
from megalrps.parallel.placement import Placement

ALIGNMENT = 64
"""Elements to whose multiples parameters and shards are moved: whole cache lines, and what fast kernels ask for."""

_WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Slice:
    """Where one parameter lies in its bucket: elements ``[offset, offset + numel)``, row-major ``shape``."""

    name: str
    offset: int
    shape: torch.Size

    def of(self, flat: Tensor) -> Tensor:
        """The view of this parameter in ``flat``, a tensor laid out like the whole bucket."""
        return flat[self.offset : self.offset + self.shape.numel()].view(self.shape)


@dataclass(frozen=True)
class Kind:
    """What the parameters of a bucket have in common, and other buckets may not.

    ``copies`` and ``sums`` are those of their placements. ``shared``: the other end of the pipeline holds them too.
    ``narrow``: the type they compute in, None for that of their masters, ``dtype``.
    """

    decays: bool
    copies: int
    sums: bool
    shared: bool
    narrow: torch.dtype | None
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Bucket:
    """One bucket on one rank; every tensor is flat.

    ``parameters`` is what the module computes with, ``gradients`` as long and in the masters' type; gaps between
    parameters and what follows the last are zero in both and count nowhere. ``gradient_views`` are the gradients of the
    parameters, by slice: made early, as no view can be made of memory that is not allocated.

    ``shard`` is this rank's run, all of it where nothing is sharded: ``master``, the moments and ``gradient_shard`` are
    that long. ``master`` is that run of ``parameters`` itself unless those are narrow or the masters lie on the host.
    ``holders`` are the tensor-parallel ranks that hold these same parameters, None where this one does alone; ``sums``:
    each of them computes but a part of the gradient. ``ends`` are the ranks at the ends of the pipeline that do, each
    with a part of the gradient.
    """

    decays: bool
    slices: tuple[Slice, ...]
    parameters: Tensor
    gradients: Tensor
    gradient_views: tuple[Tensor, ...]
    gradient_shard: Tensor
    master: Tensor
    shard: range
    holders: Group | None = None
    sums: bool = False
    ends: Group | None = None

    @property
    def computed(self) -> Tensor:
        """The parameters of this rank's shard, as the module computes with them."""
        return self.parameters[self.shard.start : self.shard.stop]

    @property
    def separate(self) -> bool:
        """Whether the masters have memory of their own."""
        return self.computed.dtype != self.master.dtype or self.computed.device != self.master.device

    @property
    def narrow(self) -> Tensor | None:
        """Where the optimizer has to leave its results, rounded; None: nowhere, or :meth:`settle` does it."""
        return self.computed if self.separate and self.computed.device == self.master.device else None

    @property
    def times_held(self) -> int:
        """How many ranks have this gradient, apart from replicas."""
        return (self.holders.size if self.holders else 1) * (self.ends.size if self.ends else 1)

    def settle(self) -> None:
        """Bring the computed parameters of the shard to what the masters are."""
        if self.separate:
            self.computed.copy_(self.master)

    def runs(self, flat: Tensor) -> Iterator[tuple[Slice, int, Tensor]]:
        """Of ``flat``, laid out like the shard: each parameter, the element of it that is held first, and the run."""
        for piece in self.slices:
            yield piece, *self.run(piece, flat)

    def run(self, piece: Slice, flat: Tensor) -> tuple[int, Tensor]:
        """Of ``flat``, laid out like the shard: the element of ``piece`` that is held first, and the run."""
        end = piece.offset + piece.shape.numel()
        start = min(max(piece.offset, self.shard.start), self.shard.stop)
        stop = max(start, min(end, self.shard.stop))
        return start - piece.offset, flat[start - self.shard.start : stop - self.shard.start]


def cut_into_buckets(
    named: Sequence[tuple[str, nn.Parameter]], kinds: Mapping[str, Kind], bucket_size: int
) -> list[tuple[Kind, list[tuple[str, nn.Parameter]]]]:
    """The parameters of every bucket, of at least ``bucket_size`` elements where there are so many of a kind.

    ``named`` is in the order of the forward pass; buckets and what is in them are in the reverse, that of the backward
    pass, so that the first to be full can leave first.
    """
    open_: dict[Kind, tuple[int, list[tuple[str, nn.Parameter]]]] = {}
    cut: list[tuple[int, Kind, list[tuple[str, nn.Parameter]]]] = []
    for place, (name, parameter) in reversed(list(enumerate(named))):
        kind = kinds[name]
        elements, members = open_.pop(kind, (0, []))
        members.append((name, parameter))
        elements += parameter.numel()
        if elements >= bucket_size:
            cut.append((place, kind, members))
        else:
            open_[kind] = (elements, members)
    places = {name: place for place, (name, _) in enumerate(named)}
    cut += [(places[members[-1][0]], kind, members) for kind, (_, members) in open_.items()]
    return [(kind, members) for _, kind, members in sorted(cut, key=lambda each: -each[0])]


def make_bucket(
    kind: Kind,
    members: Sequence[tuple[str, nn.Parameter]],
    replicas: Group,
    *,
    shards: bool,
    separate_gradients: bool,
    offload: bool,
    holders: Group | None,
    ends: Group | None,
) -> Bucket:
    """Move ``members`` into a bucket of their own; their values stay. ``shards``: each replica owns a part of it.

    ``separate_gradients``: this rank's shard of the sum has memory of its own, and ``gradients`` have none for now.
    ``offload``: masters lie on the host.
    """
    slices, offset = [], 0
    for name, parameter in members:
        slices.append(Slice(name, offset, parameter.shape))
        offset = _aligned(offset + parameter.numel(), ALIGNMENT)
    total = _aligned(offset, ALIGNMENT * (replicas.size if shards else 1))
    length = total // replicas.size if shards else total
    start = replicas.rank * length if shards else 0
    shard = range(start, start + length)
    parameters = torch.zeros(total, dtype=kind.narrow or kind.dtype, device=kind.device)
    master_device = torch.device("cpu") if offload else kind.device
    separate = parameters.dtype != kind.dtype or master_device != kind.device
    master = parameters[shard.start : shard.stop]
    if separate:
        pinned = offload and kind.device.type == "cuda"
        master = torch.zeros(length, dtype=kind.dtype, device=master_device, pin_memory=pinned)
    gradients = torch.zeros(total, dtype=kind.dtype, device=kind.device)
    gradient_shard = gradients[shard.start : shard.stop]
    if separate_gradients:
        gradient_shard = torch.zeros_like(gradient_shard)
    views = tuple(piece.of(gradients) for piece in slices)
    bucket = Bucket(
        kind.decays,
        tuple(slices),
        parameters,
        gradients,
        views,
        gradient_shard,
        master,
        shard,
        holders,
        kind.sums,
        ends,
    )
    with torch.no_grad():
        for piece, view, (_, parameter) in zip(slices, views, members, strict=True):
            piece.of(parameters).copy_(parameter)
            if separate:
                fill(bucket, piece.name, parameter)
            parameter.data = piece.of(parameters)
            parameter.grad = view if parameters.dtype == kind.dtype else None
    if separate_gradients:
        gradients.untyped_storage().resize_(0)
    return bucket


def fill(bucket: Bucket, name: str, value: Tensor) -> None:
    """Set the masters of the parameter ``name``, as far as this rank's shard has it, to its part of the model."""
    for piece in bucket.slices:
        if piece.name == name:
            start, run = bucket.run(piece, bucket.master)
            run.copy_(value.detach().flatten()[start : start + run.numel()])


def kind_of(
    name: str, parameter: Tensor, placement: Placement, *, decays: bool, narrow: torch.dtype | None, shared: bool
) -> Kind:
    """The kind of one parameter. Raises ValueError for a type that neither is wide nor has a narrow copy made."""
    if parameter.dtype not in _WIDE:
        raise ValueError(f"parameter {name} is {parameter.dtype}: masters are fp32 or fp64")
    narrow = None if narrow == parameter.dtype else narrow
    return Kind(decays, placement.copies, placement.sums, shared, narrow, parameter.dtype, parameter.device)


def _aligned(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
