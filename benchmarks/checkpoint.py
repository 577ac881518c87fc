"""Save and load of one state by the store and by plain torch.distributed.checkpoint, on one disk, in one process.

    python benchmarks/checkpoint.py --megabytes 512 --directory SCRATCH --output benchmarks/results/checkpoint.json

Ours: ``Store.save`` (SHA-256 while writing, fsync of files and directories, rename), ``Store.load`` (digests verified).
The peer: ``dcp.save`` and ``dcp.load`` with their default planner and file system storage (fsync of files, no
digests), into a fresh directory each time. The state is what a training run of that size holds: bfloat16 weights,
float32 master weights and two moments, by tensors of equal size.

Figures are medians of alternating repetitions, in MB/s (10^6 bytes); the file cache is warm for loads. ``ratio`` is our
seconds over the peer's: below 1 is faster.
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
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from megalrps.checkpoint.store import Store

_TENSORS = 16
_BYTES_PER_PARAMETER = 2 + 4 + 4 + 4


def make_state(megabytes: int) -> dict[str, torch.Tensor]:
    """About ``megabytes`` (10^6 bytes) of training state, the same at each call."""
    rows = megabytes * 10**6 // (_BYTES_PER_PARAMETER * _TENSORS * 1024) + 1
    generator = torch.Generator().manual_seed(0)
    state = {}
    for layer in range(_TENSORS):
        master = torch.randn(rows, 1024, generator=generator)
        state[f"model.{layer}.weight"] = master.to(torch.bfloat16)
        for part in ("master", "exp_avg", "exp_avg_sq"):
            state[f"optim.{part}.{layer}.weight"] = master.clone()
    return state


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(directory: Path, state: dict[str, torch.Tensor], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each operation, by repetition; ours and the peer's alternate, and a load reads what was just saved."""
    store = Store(directory / "ours")
    store.prepare()
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    times: dict[str, list[float]] = {"save": [], "load": [], "load_unverified": [], "dcp_save": [], "dcp_load": []}
    for repetition in range(repetitions):
        name, peer = f"main-{repetition:08d}", directory / "peer"
        times["save"].append(seconds(lambda: store.save(name, state, {})))  # noqa: B023  called at once
        times["dcp_save"].append(seconds(lambda: dcp.save(state, checkpoint_id=peer)))  # noqa: B023
        times["load"].append(seconds(lambda: store.load(name, target)))  # noqa: B023
        times["load_unverified"].append(seconds(lambda: store.load(name, target, verify=False)))  # noqa: B023
        times["dcp_load"].append(seconds(lambda: dcp.load(target, checkpoint_id=peer)))  # noqa: B023
        store.remove(name)
        shutil.rmtree(peer)
    return times


def summarise(times: dict[str, list[float]], state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The JSON object that is written."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "bytes": size,
        "tensors": len(state),
        "repetitions": len(times["save"]),
        "megabytes_per_second": {name: round(size / 1e6 / value, 1) for name, value in medians.items()},
        "seconds": {name: [round(value, 4) for value in values] for name, values in times.items()},
        "ratio": {
            "save": round(medians["save"] / medians["dcp_save"], 3),
            "load": round(medians["load"] / medians["dcp_load"], 3),
            "load_unverified": round(medians["load_unverified"] / medians["dcp_load"], 3),
        },
    }


def describe(load_before: tuple[float, float, float]) -> dict[str, Any]:
    """What was compared, on what and how."""
    return {
        "compares": {
            "ours": "Store.save (SHA-256 while writing, fsync of files and directories, rename), Store.load (verified)",
            "peer": "torch.distributed.checkpoint save (fsync of files, no digests) and load, its default planner",
        },
        "convention": "median seconds of one save or load of one state, in turns, in one process on one disk, loads "
        "from a warm file cache; MB = 10^6 bytes; ratio = ours / peer in seconds, below 1 is faster",
        "command": shlex.join(["python", "benchmarks/checkpoint.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "device": {"kind": "cpu", "architecture": platform.machine(), "cores": os.cpu_count()},
        "load_average": {"before": _rounded(load_before), "after": _rounded(os.getloadavg())},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def _rounded(load: tuple[float, float, float]) -> list[float]:
    return [round(value, 2) for value in load]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="save and load bandwidth of the store beside torch.distributed.checkpoint"
    )
    parser.add_argument("--megabytes", type=int, default=256, help="size of the state in 10^6 bytes")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to write (default: the system's temporary directory)")
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    load = os.getloadavg()
    state = make_state(options.megabytes)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        times = measure(Path(directory), state, options.repetitions)
    result = {**describe(load), **summarise(times, state)}
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
