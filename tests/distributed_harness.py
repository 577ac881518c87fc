"""Ranks for tests: processes that form one gloo group, at 0.1 s a group instead of torchrun's seconds.

A server process, started clean, imports torch once and forks every rank. Ranks are not forked from the test process
itself: one that has run threads or a backward pass cannot hand them on to a fork. So the function and its arguments
travel by pickle: the function is one of a test module's own (not a lambda, not one inside a test).
"""

import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_PRELOADED = [
    "pytest",
    "hypothesis",
    "torch",
    "torch.distributed.checkpoint",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "torch._dynamo",  # what recomputation imports when it is first used: two seconds of every rank otherwise
    "tyro",  # likewise the command line
    "unittest.mock",
    "megalrps.evaluation.releases",  # and with it all that a launch needs
    "megalrps.evaluation.report",  # but this, which a run imports at its end and the tests of layouts at once
    "megalrps.training.loop",
]
_SECONDS_TO_FOLLOW = 10.0  # how long the peers of a failed rank may take to notice, before they are killed


class RankFailedError(AssertionError):
    """A rank died, hung, or raised what cannot be handed on; the message says which rank and how."""


def processes() -> multiprocessing.context.ForkServerContext:
    """The context whose processes are forked from the clean server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def run_ranks(
    rendezvous: Path, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0
) -> list[Any]:
    """Run ``function(rank, *args)`` on ``world_size`` ranks of a gloo group and return the results by rank.

    ``rendezvous`` is a file that does not exist yet. The first exception of a rank is raised here, of the same class
    where it pickles, with the rank and its traceback in a note. After ``timeout`` seconds all ranks are killed and
    RankFailedError is raised.
    """
    context = processes()
    ranks: dict[Connection, tuple[int, BaseProcess]] = {}
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (sender, rendezvous, rank, world_size, timeout, function, args)
            process = context.Process(target=_rank_main, args=arguments, daemon=True)
            process.start()
            sender.close()
            ranks[receiver] = (rank, process)
        return _collect(ranks, timeout)
    finally:
        for receiver, (_, process) in ranks.items():
            process.kill()
            process.join()
            receiver.close()


def _collect(ranks: dict[Connection, tuple[int, BaseProcess]], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    failures: list[BaseException] = []
    waiting = dict(ranks)
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            if not failures:
                hung = sorted(rank for rank, _ in waiting.values())
                failures.append(RankFailedError(f"ranks {hung} did not end within {timeout} s"))
            break
        for receiver in ready:
            assert isinstance(receiver, Connection)
            rank, process = waiting.pop(receiver)
            try:
                succeeded, outcome = receiver.recv()
            except EOFError:
                process.join()
                succeeded, outcome = False, RankFailedError(f"rank {rank} died with exit code {process.exitcode}")
            if succeeded:
                results[rank] = outcome
            else:
                failures.append(outcome)
                deadline = min(deadline, time.monotonic() + _SECONDS_TO_FOLLOW)
    if failures:
        raise failures[0]
    return [results[rank] for rank in sorted(results)]


def _rank_main(
    sender: Connection,
    rendezvous: Path,
    rank: int,
    world_size: int,
    timeout: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)  # more threads than cores spin on each other: 38 s for an operation of 1 s has been seen
    try:
        store = dist.FileStore(str(rendezvous), world_size)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
        )
        result = function(rank, *args)
        dist.barrier()  # without it, leaving early has aborted ranks that were still connected
        dist.destroy_process_group()
        sender.send((True, result))
    except BaseException as error:
        sender.send((False, _portable(error, rank)))


def _portable(error: BaseException, rank: int) -> BaseException:
    text = f"rank {rank}:\n{''.join(traceback.format_exception(error))}"
    try:
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error) and isinstance(error, Exception)
    except Exception:
        return RankFailedError(text)
    error.add_note(text)
    return error
