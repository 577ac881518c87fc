"""The mesh of a launch as one of its ranks sees it: the groups it belongs to, and the device mesh they span.

Nothing here is global: the mesh is made once, and whoever needs a group is handed it. The launch as a whole, the
:class:`megalrps.parallel.world.World`, decides, writes and fails together; it is no part of the mesh.
"""

from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from megalrps.parallel.group import Group
from megalrps.parallel.layout import DIMENSIONS, Layout
from megalrps.parallel.placement import Placement


@dataclass(frozen=True)
class Mesh:
    """The groups of one rank: ``tensor``, the ranks that share out every matrix, ``data`` those that share out a batch,
    ``context`` those that share out every sequence, ``pipeline`` those that share out the depth.

    ``replicas``, data and context together, hold the same parameters and add their gradients up. ``ends`` are the ranks
    of the first and of the last pipeline stage that hold the same part of a tied embedding; None for every other rank,
    and where none was asked for.

    ``device_mesh`` has the dimensions (pp, dp, cp, tp) and the groups of the same names; it is None for a process that
    runs alone. ``holders``, by the number of copies, are the ranks of the tensor-parallel group that hold the same
    piece of a parameter with fewer pieces than ranks. Without any, :meth:`sharing` refuses such a one.
    """

    layout: Layout
    data: Group
    tensor: Group
    context: Group
    pipeline: Group
    replicas: Group
    ends: Group | None = None
    holders: dict[int, Group] = field(default_factory=dict)
    device_mesh: DeviceMesh | None = None

    def sharing(self, placement: Placement) -> Group | None:
        """The ranks of the tensor-parallel group that hold the same piece as this one; None: it holds it alone."""
        if placement.copies == 1:
            return None
        if placement.copies == self.tensor.size:
            return self.tensor
        return self.holders[placement.copies]


def alone(device: torch.device) -> Mesh:
    """The mesh of a process that runs without others."""
    single = Group(0, 1, device, None)
    return Mesh(Layout(), data=single, tensor=single, context=single, pipeline=single, replicas=single)


def make_mesh(
    layout: Layout,
    everyone: Group,
    *,
    copies: frozenset[int] = frozenset(),
    ends: bool = False,
    timeout: timedelta | None = None,
) -> Mesh:
    """The mesh of ``layout`` over the ranks of the launch, ``everyone``. Collective.

    ``copies``: in how many copies some parameters lie on a tensor-parallel group, where these are neither one nor all.
    ``ends``: make the groups of the first and last stage's ranks. ``timeout`` is that of the groups' collectives;
    None: torch's own.
    """
    assert everyone.size == layout.world_size
    if everyone.group is None:
        return alone(everyone.device)
    ranks = torch.arange(layout.world_size).view(layout.sizes)
    device_mesh = _device_mesh(ranks, everyone, timeout)
    pipeline, data, context, tensor = (_along(device_mesh, name, everyone.device) for name in DIMENSIONS)
    holders = {count: _own(ranks.view(-1, count), everyone, timeout) for count in sorted(copies - {1, layout.tp})}
    both = ranks.flatten(1, 2).movedim(1, -1).flatten(0, -2)
    return Mesh(
        layout,
        data=data,
        tensor=tensor,
        context=context,
        pipeline=pipeline,
        replicas=data if layout.cp == 1 else context if layout.dp == 1 else _own(both, everyone, timeout),
        ends=_ends(ranks, everyone, timeout) if ends and layout.pp > 1 else None,
        holders=holders,
        device_mesh=device_mesh,
    )


def _device_mesh(ranks: Tensor, everyone: Group, timeout: timedelta | None) -> DeviceMesh:
    """A device mesh over groups made here: those that DeviceMesh makes know no timeout but torch's own."""
    groups = []
    for axis in range(ranks.dim()):
        group = _made(ranks.movedim(axis, -1).flatten(0, -2), everyone, timeout)
        assert group is not None, "every rank is in a row"
        groups.append(group)
    return DeviceMesh.from_group(groups, everyone.device.type, ranks, mesh_dim_names=DIMENSIONS)


def _along(mesh: DeviceMesh, dimension: str, device: torch.device) -> Group:
    """The group of a dimension; a rank that is alone in it exchanges nothing."""
    members = mesh[dimension]
    return Group(members.get_local_rank(), members.size(), device, members.get_group() if members.size() > 1 else None)


def _ends(ranks: Tensor, everyone: Group, timeout: timedelta | None) -> Group | None:
    rows = ranks[[0, -1]].movedim(0, -1).flatten(0, -2)
    group = _made(rows, everyone, timeout)
    return next((_member(row, group, everyone) for row in rows.tolist() if everyone.rank in row), None)


def _own(rows: Tensor, everyone: Group, timeout: timedelta | None) -> Group:
    """The group of this rank's row; rows hold every rank once."""
    group = _made(rows, everyone, timeout) if rows.shape[1] > 1 else None
    (row,) = (row for row in rows.tolist() if everyone.rank in row)
    return _member(row, group, everyone)


def _made(rows: Tensor, everyone: Group, timeout: timedelta | None) -> dist.ProcessGroup | None:
    """Make a group of every row of ranks, as all ranks must, and return this rank's; one of all ranks is there."""
    if rows.shape[1] == everyone.size:
        return everyone.group
    made = [(row, dist.new_group(row, timeout=timeout)) for row in rows.tolist()]
    return next((group for row, group in made if everyone.rank in row), None)


def _member(row: list[int], group: dist.ProcessGroup | None, everyone: Group) -> Group:
    return Group(row.index(everyone.rank), len(row), everyone.device, group)
