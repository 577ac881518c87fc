"""The layout of a job: how many ranks along each dimension, and which rank stands where. Pure data: imports no torch.

Ranks are numbered with the last dimension of :data:`DIMENSIONS` running fastest::

    rank = ((pp x DP + dp) x CP + cp) x TP + tp

so that the ranks that talk most, those of one tensor-parallel group, are neighbours: torchrun numbers the processes of
a node in a row, and a group no larger than a node never leaves it. Pipeline stages, which talk least, are farthest
apart.
"""

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from itertools import product

from megalrps.errors import InputError

DIMENSIONS = ("pp", "dp", "cp", "tp")
"""Pipeline, data, context and tensor parallel, outermost first: the names of the device mesh's dimensions too."""


@dataclass(frozen=True)
class Coordinates:
    """The place of a rank along each dimension, in the order of :data:`DIMENSIONS`."""

    pp: int
    dp: int
    cp: int
    tp: int


@dataclass(frozen=True)
class Layout:
    """The number of ranks along each dimension, in the order of :data:`DIMENSIONS`."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape of the mesh."""
        return astuple(self)

    @property
    def world_size(self) -> int:
        """All ranks together."""
        return math.prod(self.sizes)

    def coordinates(self, rank: int) -> Coordinates:
        """Where ``rank`` stands."""
        assert 0 <= rank < self.world_size
        places = []
        for size in reversed(self.sizes):
            rank, place = divmod(rank, size)
            places.append(place)
        return Coordinates(*reversed(places))

    def rank(self, coordinates: Coordinates) -> int:
        """Who stands there."""
        rank = 0
        for place, size in zip(astuple(coordinates), self.sizes, strict=True):
            rank = rank * size + place
        return rank

    def groups(self, dimension: str) -> Iterator[tuple[int, ...]]:
        """The groups along ``dimension``: the ranks that differ in this coordinate alone, in its order."""
        axis = DIMENSIONS.index(dimension)
        ranges = [range(size) for size in self.sizes]
        members, ranges[axis] = ranges[axis], range(1)
        for places in product(*ranges):
            group = (replace(Coordinates(*places), **{dimension: member}) for member in members)
            yield tuple(self.rank(place) for place in group)

    def draw(self) -> str:
        """The mesh as text: a line a tensor-parallel group, by pipeline stage, data-parallel and context rank."""
        width = len(str(self.world_size - 1))
        lines = [" x ".join(f"{name} {size}" for name, size in zip(DIMENSIONS, self.sizes, strict=True))]
        for group in self.groups("tp"):
            place = self.coordinates(group[0])
            ranks = "─".join(f"[{rank:>{width}}]" for rank in group)
            lines.append(f"pp {place.pp}  dp {place.dp}  cp {place.cp}  {ranks}")
        return "\n".join(lines)


def layout_of(world_size: int, *, tensor: int = 1, pipeline: int = 1, context: int = 1) -> Layout:
    """The layout of ``world_size`` ranks that so many share a matrix, a depth and a sequence; what is left is data.

    Raises InputError where the ranks do not fill whole groups.
    """
    sizes = {
        "--tensor-model-parallel-size": tensor,
        "--pipeline-model-parallel-size": pipeline,
        "--context-parallel-size": context,
    }
    for flag, size in sizes.items():
        if size < 1:
            raise InputError(f"{flag} {size}: must be at least 1")
    model = math.prod(sizes.values())
    if world_size % model:
        said = " x ".join(f"{flag} {size}" for flag, size in sizes.items() if size > 1)
        raise InputError(f"{said} does not divide the {world_size} ranks of the launch: change it or --nproc-per-node")
    return Layout(pp=pipeline, dp=world_size // model, cp=context, tp=tensor)
