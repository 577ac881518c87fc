"""The mesh of a launch as one of its ranks sees it: the groups it belongs to, and the device mesh they come from.

Nothing here is global: the mesh is made once, and whoever needs a group is handed it. The launch as a whole, the
:class:`megalrps.parallel.world.World`, decides, writes and fails together; it is no part of the mesh.
"""

from dataclasses import dataclass, field
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from megalrps.parallel.group import Group
from megalrps.parallel.layout import DIMENSIONS, Layout
from megalrps.parallel.placement import Placement


@dataclass(frozen=True)
class Mesh:
    """``data``: the ranks that share out a batch; ``tensor``: those that share out every matrix.

    ``device_mesh`` has the dimensions (pp, dp, cp, tp); it is None for a process that runs alone. ``holders`` are the
    meshes that cut the tensor-parallel group in two dimensions, pieces and copies, by the number of copies: what a
    parameter with fewer pieces than ranks lies on. Without any, :meth:`sharing` and :meth:`view` refuse such a one.
    """

    layout: Layout
    data: Group
    tensor: Group
    device_mesh: DeviceMesh | None = None
    holders: dict[int, DeviceMesh] = field(default_factory=dict)

    def sharing(self, placement: Placement) -> Group | None:
        """The ranks of the tensor-parallel group that hold the same piece as this one; None: it holds it alone."""
        if placement.copies == 1:
            return None
        if placement.copies == self.tensor.size:
            return self.tensor
        return _group(self.holders[placement.copies], "copies", self.tensor.device)

    def view(self, local: Tensor, placement: Placement) -> Tensor:
        """The global tensor that ``local`` is this rank's part of, on the same memory: what a checkpoint is told."""
        if placement.pieces == 1:
            return local
        assert self.device_mesh is not None
        if placement.copies == 1:
            return DTensor.from_local(local, self.device_mesh["tp"], [Shard(placement.dimension)], run_check=False)
        holders = self.holders[placement.copies]["pieces", "copies"]
        return DTensor.from_local(local, holders, [Shard(placement.dimension), Replicate()], run_check=False)


def alone(device: torch.device) -> Mesh:
    """The mesh of a process that runs without others."""
    single = Group(0, 1, device, None)
    return Mesh(Layout(), data=single, tensor=single)


def make_mesh(
    layout: Layout, everyone: Group, *, copies: frozenset[int] = frozenset(), timeout: timedelta | None = None
) -> Mesh:
    """The mesh of ``layout`` over the ranks of the launch, ``everyone``. Collective.

    ``copies``: in how many copies some parameters lie on a tensor-parallel group, where these are neither one nor all.
    ``timeout`` is that of the groups' collectives; None: torch's own.
    """
    assert everyone.size == layout.world_size
    if everyone.group is None:
        return alone(everyone.device)
    ranks = torch.arange(layout.world_size).view(layout.sizes)
    device_mesh = _device_mesh(ranks, DIMENSIONS, everyone, timeout)
    holders = {
        count: _device_mesh(
            ranks.view(*layout.sizes[:-1], -1, count), (*DIMENSIONS[:-1], "pieces", "copies"), everyone, timeout
        )
        for count in sorted(copies - {1, layout.tp})
    }
    return Mesh(
        layout,
        data=_group(device_mesh, "dp", everyone.device),
        tensor=_group(device_mesh, "tp", everyone.device),
        device_mesh=device_mesh,
        holders=holders,
    )


def _device_mesh(ranks: Tensor, names: tuple[str, ...], everyone: Group, timeout: timedelta | None) -> DeviceMesh:
    """A device mesh over groups made here: those that DeviceMesh makes know no timeout but torch's own."""
    groups = [_group_along(ranks.movedim(axis, -1).flatten(0, -2), everyone, timeout) for axis in range(ranks.dim())]
    return DeviceMesh.from_group(groups, everyone.device.type, ranks, mesh_dim_names=names)


def _group_along(rows: Tensor, everyone: Group, timeout: timedelta | None) -> dist.ProcessGroup:
    """Make a group of every row of ranks, as all ranks must, and return this rank's; one of all ranks is there."""
    if rows.shape[1] == everyone.size:
        return cast(dist.ProcessGroup, everyone.group)
    made = [(row, dist.new_group(row, timeout=timeout)) for row in rows.tolist()]
    return next(group for row, group in made if everyone.rank in row)


def _group(mesh: DeviceMesh, dimension: str, device: torch.device) -> Group:
    members = mesh[dimension]
    return Group(members.get_local_rank(), members.size(), device, members.get_group() if members.size() > 1 else None)
