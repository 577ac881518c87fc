"""Which rank stands where: pure data, so no process is started."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalrps.errors import InputError
from megalrps.parallel.layout import DIMENSIONS, Coordinates, Layout, layout_of
from megalrps.parallel.options import ParallelOptions

sizes = st.integers(1, 4)


@settings(deadline=None, max_examples=30)
@given(layout=st.builds(Layout, sizes, sizes, sizes, sizes))
def test_ranks_and_coordinates_are_one_to_one_and_groups_part_the_ranks(layout: Layout):
    ranks = range(layout.world_size)
    assert [layout.rank(layout.coordinates(rank)) for rank in ranks] == list(ranks)
    assert len({layout.coordinates(rank) for rank in ranks}) == layout.world_size
    for dimension in DIMENSIONS:
        groups = list(layout.groups(dimension))
        assert sorted(rank for group in groups for rank in group) == list(ranks)
        for group in groups:
            places = [layout.coordinates(rank) for rank in group]
            assert [getattr(place, dimension) for place in places] == list(range(getattr(layout, dimension)))
            fixed = [name for name in DIMENSIONS if name != dimension]
            assert all(len({getattr(place, name) for place in places}) == 1 for name in fixed)


def test_tensor_parallel_ranks_are_neighbours_and_stages_farthest_apart():
    layout = Layout(pp=2, dp=2, cp=1, tp=4)
    assert list(layout.groups("tp"))[:2] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert next(iter(layout.groups("dp"))) == (0, 4)
    assert next(iter(layout.groups("pp"))) == (0, 8)
    assert layout.coordinates(13) == Coordinates(pp=1, dp=1, cp=0, tp=1)


def test_the_drawing_names_every_rank_once():
    assert Layout(dp=2, tp=2).draw() == "\n".join(
        ["pp 1 x dp 2 x cp 1 x tp 2", "pp 0  dp 0  cp 0  [0]─[1]", "pp 0  dp 1  cp 0  [2]─[3]"]
    )


def test_what_tensor_parallelism_leaves_is_data_parallel():
    assert layout_of(8, tensor=2) == Layout(dp=4, tp=2)
    assert layout_of(1, tensor=1) == Layout()


@pytest.mark.parametrize(("world", "tensor"), [(6, 4), (1, 2), (4, 0), (4, -1)])
def test_ranks_that_do_not_fill_the_groups_are_refused_by_the_flag(world: int, tensor: int):
    with pytest.raises(InputError, match=f"--tensor-model-parallel-size {tensor}"):
        ParallelOptions(tensor_model_parallel_size=tensor).layout(world)


def test_a_sequence_that_cannot_be_cut_is_refused_only_where_it_is_cut():
    ParallelOptions(4, sequence_parallel=True).check(64)
    ParallelOptions(4, sequence_parallel=False).check(63)
    ParallelOptions(1, sequence_parallel=True).check(63)
    with pytest.raises(InputError, match="cut --seq-length 63 into 4"):
        ParallelOptions(4, sequence_parallel=True).check(63)
