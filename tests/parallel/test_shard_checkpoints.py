"""What replicas hold of masters and moments is saved and loaded, bit for bit, at any other layout and sharding."""

import zlib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_harness import run_ranks
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from megalrps.checkpoint.errors import TensorMismatchError
from megalrps.checkpoint.store import Store
from megalrps.parallel.buffers import FlatBuffers, Sharding
from megalrps.parallel.group import Group
from megalrps.parallel.layout import Layout
from megalrps.parallel.mesh import alone, make_mesh
from megalrps.parallel.placement import WHOLE, Placement
from megalrps.parallel.shard_view import ShardView, boxes
from megalrps.training.optimizer import Optimizer
from megalrps.training.options import LossScaleOptions, MomentType, OptimizerOptions

# name -> global shape and the dimension that tensor parallelism cuts; no size is a multiple of what it is cut into
PARAMETERS: dict[str, tuple[tuple[int, ...], int | None]] = {
    "table": ((46, 3), 0),
    "row": ((6, 7), 0),
    "column": ((5, 6), 1),
    "cube": ((3, 5, 2), 2),
    "long": ((1, 333), None),
    **{f"vector{length}": ((length,), None) for length in range(1, 8)},
}


@dataclass(frozen=True)
class Case:
    dp: int = 1
    tp: int = 1
    sharding: Sharding = "optim"
    bucket: int = 1000
    narrow: bool = False
    moments: MomentType = "fp32"

    @property
    def ranks(self) -> int:
        return self.dp * self.tp


def tensors_of(case: Case) -> dict[str, torch.Tensor]:
    """A rank's part of a module without a purpose, with an optimizer."""
    cpu = torch.device("cpu")
    everyone = Group(dist.get_rank(), dist.get_world_size(), cpu, dist.group.WORLD)
    mesh = make_mesh(Layout(dp=case.dp, tp=case.tp), everyone) if case.ranks > 1 else alone(cpu)
    module, placements = nn.Module(), {}
    for name, (shape, dimension) in PARAMETERS.items():
        placement = WHOLE if case.tp == 1 else Placement(copies=case.tp)
        if dimension is not None and case.tp > 1:
            placement = Placement(dimension, case.tp, mesh.tensor.rank)
        placements[name] = placement
        module.register_parameter(name, nn.Parameter(torch.zeros(placement.local_shape(shape))))
    buffers = FlatBuffers(
        module,
        mesh=mesh,
        placements=placements,
        sharding=case.sharding,
        bucket_size=case.bucket,
        compute_dtype=torch.bfloat16 if case.narrow else None,
    )
    options = OptimizerOptions(exp_avg_dtype=case.moments, exp_avg_sq_dtype=case.moments)
    optimizer = Optimizer(buffers, options, LossScaleOptions() if case.narrow else None)
    return {**dict(buffers.named_masters()), **dict(optimizer.named_state())}


def value_of(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The global tensor: numbers that no other tensor has, in all bits of its type."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.rand(tensor.shape, generator=generator).mul(1000).to(tensor.dtype)


def chunks_of(tensor: torch.Tensor) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    return list(tensor.chunks()) if isinstance(tensor, ShardView) else [((0,) * tensor.dim(), tensor)]


def box(value: torch.Tensor, offsets: tuple[int, ...], part: torch.Tensor) -> torch.Tensor:
    return value[tuple(slice(start, start + size) for start, size in zip(offsets, part.shape, strict=True))]


def _rank_saves(rank: int, case: Case, directory: Path) -> int:
    tensors = tensors_of(case)
    for name, tensor in tensors.items():
        for offsets, part in chunks_of(tensor):
            part.copy_(box(value_of(name, tensor), offsets, part))
    store = Store(directory)
    store.prepare()
    store.save("saved", tensors, {})
    return sum(part.numel() for name in PARAMETERS for _, part in chunks_of(tensors[name]))


def _rank_loads(rank: int, case: Case, directory: Path) -> list[str]:
    tensors = tensors_of(case)
    for tensor in tensors.values():
        for _, part in chunks_of(tensor):
            part.fill_(-1)  # which no tensor holds
    Store(directory).load("saved", tensors)
    return [
        name
        for name, tensor in tensors.items()
        for offsets, part in chunks_of(tensor)
        if not torch.equal(part, box(value_of(name, tensor), offsets, part))
    ]


SAVED = (Case(dp=4), Case(dp=4, bucket=1), Case(tp=2, dp=2), Case(tp=2, dp=2, bucket=1), Case())
LAYOUTS = (
    Case(),
    Case(dp=2),
    Case(dp=3, sharding="optim_grads", bucket=1),
    Case(dp=4),
    Case(dp=4, bucket=1),
    Case(dp=2, sharding="no_shard"),
    Case(tp=2, dp=2),
    Case(tp=2, dp=2, sharding="optim_grads", bucket=1),
    Case(tp=2),
)


def by_ranks(cases: tuple[Case, ...]) -> list[tuple[Case, ...]]:
    """The cases that one launch can serve, one after the other."""
    return [tuple(case for case in cases if case.ranks == ranks) for ranks in sorted({case.ranks for case in cases})]


def _rank_saves_all(rank: int, cases: tuple[Case, ...], directory: Path) -> dict[Case, int]:
    return {case: _rank_saves(rank, case, directory / str(SAVED.index(case))) for case in cases}


def _rank_loads_all(rank: int, cases: tuple[Case, ...], directory: Path) -> dict[tuple[Case, Case], list[str]]:
    return {
        (saved, case): _rank_loads(rank, case, directory / str(place))
        for case in cases
        for place, saved in enumerate(SAVED)
    }


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Case, int]]:
    """Where every case of SAVED lies, and how many elements its ranks wrote."""
    directory = tmp_path_factory.mktemp("saved")
    written: dict[Case, int] = {}
    for cases in by_ranks(SAVED):
        told = run_ranks(directory / f"rendezvous{cases[0].ranks}", cases[0].ranks, _rank_saves_all, cases, directory)
        written |= {case: sum(of_rank[case] for of_rank in told) for case in cases}
    return directory, written


@pytest.fixture(scope="module")
def lost(
    stores: tuple[Path, dict[Case, int]], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[Case, Case], list[list[str]]]:
    """By what was saved and what loads it: the tensors that each rank did not get back."""
    found: dict[tuple[Case, Case], list[list[str]]] = {}
    for cases in by_ranks(LAYOUTS):
        rendezvous = tmp_path_factory.mktemp("loads") / "rendezvous"
        told = run_ranks(rendezvous, cases[0].ranks, _rank_loads_all, cases, stores[0])
        found |= {pair: [of_rank[pair] for of_rank in told] for pair in told[0]}
    return found


@pytest.mark.parametrize("saved", SAVED, ids=str)
def test_every_layout_loads_what_another_saved(
    stores: tuple[Path, dict[Case, int]], lost: dict[tuple[Case, Case], list[list[str]]], saved: Case
):
    if saved.tp == 1:
        whole = sum(torch.Size(shape).numel() for shape, _ in PARAMETERS.values())
        assert stores[1][saved] == whole, "each element once"
    assert {layout: lost[saved, layout] for layout in LAYOUTS} == {layout: [[]] * layout.ranks for layout in LAYOUTS}


def test_narrow_parameters_save_their_masters_and_bf16_moments_themselves(run_ranks, tmp_path: Path):
    saved, other = (Case(dp=dp, tp=tp, narrow=True, moments="bf16") for dp, tp in ((4, 1), (1, 2)))
    run_ranks(4, _rank_saves, saved, tmp_path)
    assert run_ranks(2, _rank_loads, other, tmp_path) == [[], []]
    entries = Store(tmp_path).manifest("saved").tensors
    assert entries["row"].dtype == "float32" and entries["exp_avg_sq.row"].dtype == "bfloat16"
    with pytest.raises(TensorMismatchError, match="exp_avg"):
        run_ranks(2, _rank_loads, Case(dp=2, narrow=True), tmp_path)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_boxes_are_a_run_of_elements_in_order(shape: list[int], data: st.DataObject):
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    start = data.draw(st.integers(0, numbers.numel()))
    stop = data.draw(st.integers(start, numbers.numel()))
    found = list(boxes(tuple(shape), start, stop))
    assert len(found) <= 2 * len(shape) - 1
    parts = [
        numbers[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))].flatten()
        for offsets, sizes in found
    ]
    assert torch.cat([torch.arange(0), *parts]).tolist() == list(range(start, stop))


def test_a_scalar_is_one_box():
    assert list(boxes((), 0, 1)) == [((), ())]
    assert list(boxes((), 0, 0)) == []


def test_a_view_holds_live_memory_and_computes_nothing():
    run = torch.arange(5.0)
    view = ShardView(run, 2, (3, 3), Placement(1, 2, 1))
    assert view.shape == (3, 6) and view.dtype == torch.float32
    assert [(offsets, part.tolist()) for offsets, part in view.chunks()] == [
        ((0, 5), [[0.0]]),
        ((1, 3), [[1.0, 2.0, 3.0]]),
        ((2, 3), [[4.0]]),
    ]
    next(iter(view.chunks()))[1].fill_(7)
    assert run[0] == 7
    with pytest.raises(TypeError, match="ShardView"):
        view + 1


def _rank_of_a_pipeline(rank: int, directory: Path) -> tuple[float, list[str]]:
    """The norm of gradients that are 1 everywhere on every rank, and what a checkpoint of it does not give back."""
    everyone = Group(rank, 4, torch.device("cpu"), dist.group.WORLD)
    mesh = make_mesh(Layout(pp=2, dp=2), everyone, ends=True)
    module = nn.ParameterDict({f"stage{mesh.pipeline.rank}": torch.zeros(3, 5), "tied": torch.zeros(7, 3)})
    buffers = FlatBuffers(module, mesh=mesh, shared_with_ends=frozenset({"tied"}), bucket_size=1)
    buffers.begin(1)
    for bucket in buffers.buckets:
        for view in bucket.gradient_views:
            view.fill_(1.0)
    buffers.finish_gradients()
    tensors = dict(buffers.named_masters())
    for name, tensor in tensors.items():
        for offsets, part in chunks_of(tensor):
            part.copy_(box(value_of(name, tensor), offsets, part))
    Store(directory).save("pipeline", tensors, {})
    whole = {name: torch.zeros(tensor.shape) for name, tensor in tensors.items()}
    Store(directory).load("pipeline", whole)
    lost = [name for name, tensor in whole.items() if not torch.equal(tensor, value_of(name, tensor))]
    return buffers.gradient_norm().item(), lost


def test_what_both_ends_of_a_pipeline_hold_is_summed_counted_and_saved_once(run_ranks, tmp_path: Path):
    # two replicas add up to 2 in either stage's own 15 elements, and two stages' to 4 in the 21 that they share
    expected = (2 * 15 * 2**2 + 21 * 4**2) ** 0.5
    assert run_ranks(4, _rank_of_a_pipeline, tmp_path) == [(pytest.approx(expected, rel=1e-6), [])] * 4
