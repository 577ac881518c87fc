"""Save, asynchronous save and load of one state by the store and by torch.distributed.checkpoint, on one disk.

    python benchmarks/checkpoint.py --megabytes 512 --directory SCRATCH --output benchmarks/results/checkpoint_cpu.json

Ours: ``Store.save`` (SHA-256 while writing, fsync of files and directories, rename), ``Store.load`` (digests verified)
and, for the stall, what a training loop waits for with ``--async-save``: ``Snapshot.take``, ``BackgroundSave.start``.
The peer: ``dcp.save``, ``dcp.load`` and ``dcp.async_save`` with their default planner and file system storage (fsync of
files, no digests), into a fresh directory each time; the stall is the time until ``async_save`` returns, with the
stager that it makes for each save, and with one that is kept, so that its memory is used again.

The state is what a checkpoint of that size holds: float32 masters and two moments, of layers of equal size; for us in
flat buffers, as they are trained, for the peer a tensor each. With ``--ranks`` every process has a part of it, and the
slowest counts.

Figures are of alternating repetitions; the file cache is warm for loads. A ratio is our seconds over the peer's: below
1 is faster. CPU seconds are of all threads of the first process.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from machine import cpu
from rank_processes import on_ranks
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from megalrps.checkpoint.background import BackgroundSave
from megalrps.checkpoint.publication import publish_at_once
from megalrps.checkpoint.store import Store
from megalrps.parallel.buffers import FlatBuffers
from megalrps.training.engine import Engine
from megalrps.training.optimizer import Optimizer
from megalrps.training.options import OptimizerOptions
from megalrps.training.snapshot import Snapshot
from megalrps.training.state import TrainState

LAYERS = 16
BYTES_PER_PARAMETER = 4 + 4 + 4
KEPT_STAGER = StagingOptions(
    use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
)
"""What ``async_save`` makes for itself: pinned memory and asynchronous staging need a GPU."""

CALLS = {
    "save": "Store.save(name, tensors, record)",
    "load": "Store.load(name, tensors)",
    "load_unverified": "Store.load(name, tensors, verify=False)",
    "stall": "BackgroundSave.start(name, Snapshot.take(), ...), until it returns",
    "dcp_save": "torch.distributed.checkpoint.save(tensors, checkpoint_id=directory)",
    "dcp_load": "torch.distributed.checkpoint.load(tensors, checkpoint_id=directory)",
    "dcp_stall": "torch.distributed.checkpoint.async_save(tensors, checkpoint_id=directory), until it returns",
    "dcp_stall_kept_stager": "async_save(..., async_stager=stager), a DefaultStager of the same options that is kept",
}
RATIOS = {
    "save": ("save", "dcp_save"),
    "load": ("load", "dcp_load"),
    "load_unverified": ("load_unverified", "dcp_load"),
    "stall": ("stall", "dcp_stall"),
    "stall_kept_stager": ("stall", "dcp_stall_kept_stager"),
}


def make_state(megabytes: int, rank: int, ranks: int) -> TrainState:
    """This rank's share of about ``megabytes`` (10^6 bytes) of training state, the same at each call."""
    rows = megabytes * 10**6 // (BYTES_PER_PARAMETER * LAYERS * 1024 * ranks) + 1
    torch.manual_seed(rank)
    layers = nn.ModuleDict({f"{rank}-{layer}": nn.Linear(1024, rows, bias=False) for layer in range(LAYERS)})
    buffers = FlatBuffers(layers)
    state = TrainState(cast(Engine, None), buffers, Optimizer(buffers, OptimizerOptions()))
    for flat in (flat for flats in state.flats().values() for flat in flats):
        flat.normal_()
    return state


class Clock:
    """Seconds of each operation, by repetition: of the slowest rank, and the CPU seconds of this process."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group  # of its own: async_save goes on talking through the default one when it has returned
        self.wall: dict[str, list[float]] = {}
        self.cpu: dict[str, list[float]] = {}

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        """What ``work`` gives."""
        if self._group is not None:
            dist.barrier(self._group)
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        seconds = torch.tensor(time.perf_counter() - wall, dtype=torch.float64)
        self.cpu.setdefault(name, []).append(time.process_time() - cpu)
        if self._group is not None:
            dist.all_reduce(seconds, dist.ReduceOp.MAX, self._group)
        self.wall.setdefault(name, []).append(seconds.item())
        return result


def measure(rank: int, ranks: int, directory: str, megabytes: int, repetitions: int) -> dict[str, Any]:
    """Times on one rank; ours and the peer's alternate, and a load reads what was just saved."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    state = make_state(megabytes, rank, ranks)
    tensors, peer = state.tensors(), Path(directory) / "peer"
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    store = Store(Path(directory) / "ours")
    store.prepare()
    group = dist.new_group(backend="gloo") if ranks > 1 else None
    saves: BackgroundSave[None] = BackgroundSave(Store(store.directory, group), 600.0)
    snapshot, stager = Snapshot(state), DefaultStager(KEPT_STAGER)
    clock = Clock(dist.new_group(backend="gloo") if ranks > 1 else None)

    def stall(name: str) -> None:
        saves.start(name, snapshot.take(), {}, publish_at_once, lambda: None)

    def dcp_stall(where: Path, stager: DefaultStager | None) -> Any:
        return dcp.async_save(copies, checkpoint_id=where, async_stager=stager)

    with saves:
        for repetition in range(repetitions):
            name, late = f"main-{repetition:08d}", f"late-{repetition:08d}"
            clock.time("save", lambda: store.save(name, tensors, {}))  # noqa: B023  called at once
            clock.time("dcp_save", lambda: dcp.save(copies, checkpoint_id=peer))
            clock.time("load", lambda: store.load(name, tensors))  # noqa: B023
            clock.time("load_unverified", lambda: store.load(name, tensors, verify=False))  # noqa: B023
            clock.time("dcp_load", lambda: dcp.load(copies, checkpoint_id=peer))
            clock.time("stall", lambda: stall(late))  # noqa: B023
            saves.finish()
            clock.time("dcp_stall", lambda: dcp_stall(peer / "fresh", None)).result()
            clock.time("dcp_stall_kept_stager", lambda: dcp_stall(peer / "kept", stager)).result()
            for saved in (name, late):
                store.remove(saved)
            if rank == 0:
                shutil.rmtree(peer)
    stager.close()
    size = torch.tensor(sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    if ranks > 1:
        dist.all_reduce(size)
    return {"wall": clock.wall, "cpu": clock.cpu, "bytes": size.item(), "tensors": len(tensors)}


def summarise(measured: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that are written, of one number of ranks."""
    wall, size = measured["wall"], measured["bytes"]
    medians = {name: statistics.median(values) for name, values in wall.items()}
    pairs = {name: list(zip(wall[ours], wall[peer], strict=True)) for name, (ours, peer) in RATIOS.items()}
    return {
        "bytes": size,
        "tensors_of_a_rank": measured["tensors"],
        "repetitions": len(wall["save"]),
        "megabytes_per_second": {name: round(size / 1e6 / value, 1) for name, value in medians.items()},
        "median_seconds": {name: round(value, 4) for name, value in medians.items()},
        "least_seconds": {name: round(min(values), 4) for name, values in wall.items()},
        "median_cpu_seconds": {name: round(statistics.median(values), 4) for name, values in measured["cpu"].items()},
        "seconds": {name: [round(value, 4) for value in values] for name, values in wall.items()},
        "ratio": {name: round(medians[ours] / medians[peer], 3) for name, (ours, peer) in RATIOS.items()},
        "ratio_of_minima": {name: round(min(wall[ours]) / min(wall[peer]), 3) for name, (ours, peer) in RATIOS.items()},
        "median_of_ratios": {
            name: round(statistics.median(ours / peer for ours, peer in each), 3) for name, each in pairs.items()
        },
    }


def describe(load_before: tuple[float, float, float]) -> dict[str, Any]:
    """What was compared, on what and how."""
    return {
        "compares": {
            "ours": "Store and BackgroundSave: SHA-256 while writing, fsync of files and directories, rename; loads "
            "verify every byte before a tensor is touched",
            "peer": "torch.distributed.checkpoint with its default planner, FileSystemWriter (sync_files=True: it too "
            "syncs files) and FileSystemReader; no digests",
            "calls": CALLS,
        },
        "convention": "seconds of one call on one state, in turns, on one disk, of the slowest rank; loads from a warm "
        "file cache; MB = 10^6 bytes; ratio = ours / peer in seconds, of the medians: below 1 is faster",
        "command": shlex.join(["python", "benchmarks/checkpoint.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "device": cpu(),
        "load_average": {"before": _rounded(load_before), "after": _rounded(os.getloadavg())},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def _rounded(load: tuple[float, float, float]) -> list[float]:
    return [round(value, 2) for value in load]


def _on_rank(rank: int, *arguments: Any) -> dict[str, Any]:
    return measure(rank, *arguments)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="saves, asynchronous saves and loads of the store beside torch.distributed.checkpoint"
    )
    parser.add_argument("--megabytes", type=int, default=256, help="size of the state in 10^6 bytes")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2, help="also with so many processes (1: not)")
    parser.add_argument("--directory", type=Path, help="where to write (default: the system's temporary directory)")
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    options = parser.parse_args()
    load, size = os.getloadavg(), (options.megabytes, options.repetitions)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        result = summarise(measure(0, 1, directory, *size))
    if options.ranks > 1:
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            result["ranks"] = {
                options.ranks: summarise(on_ranks(options.ranks, _on_rank, options.ranks, directory, *size)[0])
            }
    text = json.dumps({**describe(load), **result}, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
