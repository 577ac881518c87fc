"""Two ranks that share one GPU, over gloo, make the single process's updates: layouts with tensors of the device."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from layout_job import ADAMW_RATE, Case, batch_of, case_name, errors, job_of
from rank_pieces import Pieces, pieces, together
from torch import Tensor

from megalrps.parallel.world import World
from megalrps.training.assemble import assemble, job_mesh
from megalrps.training.step import forward_backward

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
TOLERANCE = 1e-12
CASES = (
    Case(tp=2),
    Case(tp=2, sequence_parallel=True),
    Case(pp=2),
    Case(pp=2, schedule="zbv", layers=4),
    Case(dp=2, bucket=1000, sharding="optim_grads"),
)


class Received:
    """A tensor that is on its way to the host and goes on to the device when it is waited for."""

    def __init__(self, work: dist.Work, host: Tensor, tensor: Tensor) -> None:
        self.work, self.host, self.tensor = work, host, tensor

    def wait(self) -> None:
        self.work.wait()
        self.tensor.data.copy_(self.host)  # an input of a stage is a leaf that requires a gradient


def by_way_of_the_host(operations: list[dist.P2POp], desc: str | None = None) -> list[Any]:
    """What pipelining sends and receives. gloo's messages, unlike its collectives, read and write host memory alone
    (ProcessGroupGloo.cpp: send and recv take the tensor's pointer as it is).
    """
    works: list[Any] = []
    for each in operations:
        sends = each.op is dist.isend
        host = each.tensor.cpu() if sends else torch.empty_like(each.tensor, device="cpu")
        peer = {"group_dst" if sends else "group_src": each.group_peer}
        work = each.op(host, group=each.group, tag=each.tag, **peer)
        works.append(work if sends else Received(work, host, each.tensor))
    return works


def trained_on(rank: int, case: Case, device: str) -> Pieces:
    """Losses, norms, and parameters after the last update: this rank's pieces of them."""
    world = World(rank, case.ranks, torch.device(device), dist.group.WORLD if case.ranks > 1 else None)
    job = job_of(case)
    mesh = job_mesh(job, world)
    state = assemble(job, mesh, torch.float64)
    state.initialise(case.model, 7)
    losses, norms = [], []
    with mock.patch("torch.distributed.pipelining.schedules._batch_p2p", by_way_of_the_host):
        for step in range(case.updates):
            losses.append(forward_backward(state, batch_of(step, mesh), mesh))
            norms.append(state.optimizer.step(ADAMW_RATE))
    found = pieces((f"parameter {name}", view) for name, view in state.buffers.named_masters())
    return found + pieces((("norms", torch.stack(norms)), ("losses", torch.stack(losses))))


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_losses_norms_and_parameters_are_those_of_one_process(run_ranks, case: Case):
    expected = together(run_ranks(1, trained_on, case.alone, DEVICE))
    found = together(run_ranks(case.ranks, trained_on, case, DEVICE, timeout=120.0))
    worst = errors(found, expected)
    assert worst.pop("losses") < 1e-6, "they are told in fp32"
    assert max(worst.values()) < TOLERANCE, worst
