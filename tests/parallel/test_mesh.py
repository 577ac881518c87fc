"""The groups a rank is handed are those of the layout, and keep the timeout they are given."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from tiny_job import ALONE, world_of_harness

from megalrps.parallel.layout import DIMENSIONS, Layout
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


DEEP = Layout(pp=2, dp=2, cp=2, tp=1)


def _rank_lists(rank: int, layout: Layout) -> dict[str, list[int] | None]:
    mesh = make_mesh(layout, world_of_harness(), ends=True)
    assert mesh.device_mesh is not None and mesh.device_mesh.mesh_dim_names == DIMENSIONS
    groups = {
        "pp": mesh.pipeline,
        "dp": mesh.data,
        "cp": mesh.context,
        "tp": mesh.tensor,
        "replicas": mesh.replicas,
        "ends": mesh.ends,
    }
    return {
        name: None if each is None else dist.get_process_group_ranks(each.group) if each.group else [rank]
        for name, each in groups.items()
    }


@pytest.mark.parametrize("layout", [DEEP, Layout(pp=4, dp=1, cp=1, tp=2), Layout(pp=2, tp=2, cp=2)], ids=str)
def test_every_dimension_and_what_goes_across_them(run_ranks, layout: Layout):
    for rank, groups in enumerate(run_ranks(layout.world_size, _rank_lists, layout)):
        place = layout.coordinates(rank)
        for dimension in DIMENSIONS:
            (expected,) = [group for group in layout.groups(dimension) if rank in group]
            assert groups[dimension] == list(expected)
        every = [(other, layout.coordinates(other)) for other in range(layout.world_size)]
        assert groups["replicas"] == [n for n, other in every if (other.pp, other.tp) == (place.pp, place.tp)]
        alike = [n for n, other in every if (other.dp, other.cp, other.tp) == (place.dp, place.cp, place.tp)]
        assert groups["ends"] == ([alike[0], alike[-1]] if rank in (alike[0], alike[-1]) else None)


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
