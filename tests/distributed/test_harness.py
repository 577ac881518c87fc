"""The harness itself: ranks really form a group, and nothing that goes wrong in one of them is lost."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from distributed_harness import RankFailedError

from megalrps.errors import InputError


def _sum_of_ranks(rank: int, scale: int) -> tuple[int, int]:
    total = torch.tensor(rank * scale)
    dist.all_reduce(total)
    return rank, int(total)


def _gradient(rank: int) -> float:
    weight = torch.tensor(3.0, requires_grad=True)
    (weight**2).backward()
    assert weight.grad is not None
    return float(weight.grad)


def _one_raises(rank: int) -> None:
    if rank == 1:
        raise InputError("flag --x")
    dist.barrier()


def _one_dies(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _one_hangs(rank: int) -> None:
    if rank == 1:
        time.sleep(600)
    dist.barrier()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_reduce_over_one_group(run_ranks, world_size):
    total = sum(range(world_size)) * 10
    assert run_ranks(world_size, _sum_of_ranks, 10) == [(rank, total) for rank in range(world_size)]


def test_ranks_run_backward_after_the_test_process_did(run_ranks):
    _gradient(0)
    assert run_ranks(2, _gradient) == [6.0, 6.0]


def test_exception_of_a_rank_is_raised_with_its_class_and_traceback(run_ranks):
    with pytest.raises(InputError, match="flag --x") as raised:
        run_ranks(2, _one_raises)
    assert any("rank 1" in note and "_one_raises" in note for note in raised.value.__notes__)


def test_death_of_a_rank_is_an_error_not_a_hang(run_ranks):
    with pytest.raises((RankFailedError, RuntimeError)):
        run_ranks(2, _one_dies)


def test_hang_of_a_rank_ends_at_the_timeout(run_ranks):
    start = time.monotonic()
    with pytest.raises((RankFailedError, RuntimeError)):
        run_ranks(2, _one_hangs, timeout=3.0)
    assert time.monotonic() - start < 20
