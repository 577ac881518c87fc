"""The harnesses: ranks really form a group, nothing that goes wrong in one is lost, no launch outlives its test."""

import os
import random
import re
import signal
import socket
import sys
import time
from pathlib import Path

import node_launches
import pytest
import torch
import torch.distributed as dist
from distributed_harness import RankFailedError
from node_launches import free_port, launch_nodes

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


# Waits in a session of its own, as torchrun's workers do, and tells the number of the process that does.
HANGS = 'exec setsid --wait "$1" -S -c "import os, time; print(os.getpid(), flush=True); time.sleep(600)"'


def test_a_launch_that_hangs_is_killed_with_all_it_started_and_says_where_it_was(tmp_path):
    with pytest.raises(pytest.fail.Exception, match="has not ended after 3 s") as raised:
        launch_nodes("bash", "-c", HANGS, "bash", sys.executable, environments=[{}, {}], folder=tmp_path, seconds=3.0)
    told = str(raised.value)
    assert told.count('File "<string>", line 1 in <module>') == 2, "where the Python of both nodes stood"
    processes = re.findall(r"node \d: (\d+)", told)
    assert len(processes) == 2
    assert not any(Path(f"/proc/{process}").exists() for process in processes)


def test_a_node_does_not_outlive_another_that_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(node_launches, "SECONDS_TO_FOLLOW", 0.2)
    start = time.monotonic()
    command = ("bash", "-c", 'echo "$NODE"; [[ $NODE == 1 ]] || sleep 600; exit 3')
    waited, failed = launch_nodes(*command, environments=[{"NODE": "0"}, {"NODE": "1"}], folder=tmp_path)
    assert (failed.returncode, failed.stdout) == (3, "1\n")
    assert (waited.returncode, waited.stdout) == (-signal.SIGKILL, "0\n")
    assert time.monotonic() - start < 60


def test_a_free_port_is_not_one_that_is_taken(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", free_port()))
        port = taken.getsockname()[1]
        monkeypatch.setattr(node_launches, "PORTS", range(port, port + 2))
        monkeypatch.setattr(random, "sample", lambda ports, count: list(ports))
        assert free_port() == port + 1
