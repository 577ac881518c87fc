"""The groups a rank is handed are those of the layout, and keep the timeout they are given."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from tiny_job import ALONE, world_of_harness

from megalrps.parallel.layout import Layout
from megalrps.parallel.mesh import make_mesh
from megalrps.parallel.placement import WHOLE, Placement

LAYOUT = Layout(dp=2, tp=4)
SHARED = Placement(pieces=2, copies=2, sums=True)


def _rank_looks(rank: int) -> dict[str, list[int]]:
    mesh = make_mesh(LAYOUT, world_of_harness(), copies=frozenset({2}), timeout=timedelta(seconds=7))
    place = LAYOUT.coordinates(rank)
    assert (mesh.data.rank, mesh.tensor.rank) == (place.dp, place.tp)
    sharing = mesh.sharing(SHARED)
    assert sharing is not None and mesh.sharing(WHOLE) is None and mesh.sharing(Placement(copies=4)) is mesh.tensor
    groups = {"dp": mesh.data, "tp": mesh.tensor, "copies": sharing}
    for group in groups.values():
        assert group.group is not None
        backend = group.group._get_backend(torch.device("cpu"))
        assert backend.options._timeout == timedelta(seconds=7)
        assert group.sum_(torch.ones(1)).item() == group.size
    return {name: dist.get_process_group_ranks(group.group) for name, group in groups.items()}


def test_the_groups_are_the_layouts(run_ranks):
    for rank, groups in enumerate(run_ranks(LAYOUT.world_size, _rank_looks)):
        for dimension in ("dp", "tp"):
            (expected,) = [group for group in LAYOUT.groups(dimension) if rank in group]
            assert tuple(groups[dimension]) == expected
        assert groups["copies"] == [rank // 2 * 2, rank // 2 * 2 + 1]


def test_a_process_alone_needs_no_groups():
    mesh = make_mesh(Layout(), ALONE)
    assert mesh.data.group is None and mesh.tensor.size == 1


@pytest.mark.parametrize("placement", [Placement(dimension=1, pieces=4, piece=2), Placement(pieces=2, piece=1)])
def test_a_part_is_a_view_of_the_whole(placement: Placement):
    whole = torch.arange(48.0).view(4, 12)
    part = placement.part(whole)
    assert part.shape == placement.local_shape((4, 12))
    assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert torch.equal(part, whole.chunk(placement.pieces, placement.dimension)[placement.piece])
    assert placement.global_shape(part.shape) == whole.shape
    assert whole[placement.global_offsets((1, 2), part.shape)] == part[1, 2]
