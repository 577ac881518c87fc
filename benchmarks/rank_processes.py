"""Processes that form one gloo group on this machine, for benchmarks: forked from a clean server that has torch."""

import multiprocessing
import tempfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_PRELOADED = ["torch", "torch.distributed.fsdp", "torch.distributed.pipelining", "torch.profiler", "megalrps.training"]
_TIMEOUT = timedelta(minutes=5)


def on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(rank, *arguments)`` gives on each of ``ranks`` processes, of one thread each, by rank.

    ``function`` is a module's own, and what travels can be pickled. Raises RuntimeError with the traceback of the first
    rank that fails; the others are killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory() as directory:
        rendezvous = Path(directory) / "rendezvous"
        receivers, processes = [], []
        for rank in range(ranks):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main, args=(sender, rendezvous, rank, ranks, function, arguments), daemon=True
            )
            process.start()
            sender.close()
            receivers.append(receiver)
            processes.append(process)
        try:
            return _results(receivers)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _results(receivers: list[Connection]) -> list[Any]:
    by_receiver: dict[Any, Any] = {}
    while len(by_receiver) < len(receivers):
        waiting = [receiver for receiver in receivers if receiver not in by_receiver]
        for receiver in multiprocessing.connection.wait(waiting):
            assert isinstance(receiver, Connection)
            try:
                error, result = receiver.recv()
            except EOFError:
                error, result = "a rank died without a word", None
            if error is not None:
                raise RuntimeError(error)
            by_receiver[receiver] = result
    return [by_receiver[receiver] for receiver in receivers]


def _rank_main(
    sender: Connection,
    rendezvous: Path,
    rank: int,
    ranks: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import traceback

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(rendezvous), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=_TIMEOUT)
        result = function(rank, *arguments)
        dist.barrier()  # a rank that leaves early can abort those that are still connected
        dist.destroy_process_group()
        sender.send((None, result))
    except BaseException:
        sender.send((f"rank {rank} of {ranks}:\n{traceback.format_exc()}", None))
