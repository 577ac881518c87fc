"""Every kernel on a GPU: its time, its floor, and its peers in the same run.

    python benchmarks/gpu/kernels.py --output benchmarks/results/gpu_kernels.json

The floor is what no implementation can go below: the bytes it must read and write over the measured rate of a large
copy, or its products' operations over the measured rate of a large matrix product, in this run. Times are medians of
triton.testing.do_bench, which clears the cache between runs, of a whole call as its users make it. Before it is timed,
what each contender computes is compared with ours: the relative difference is written down. ``ratio`` is our time over
the peer's: below 1 is faster. --smoke runs every case once on a CPU at sizes that show nothing but that it works.
"""

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from attention_cases import attention_cases
from kernel_cases import SMOKE, Case, Floor, Sizes, loss_cases, optimizer_cases, pointwise_cases
from torch import Tensor

GROUPS: dict[str, Callable[[Sizes], Iterator[Case]]] = {
    "pointwise": pointwise_cases,
    "loss": loss_cases,
    "optimizer": optimizer_cases,
    "attention": attention_cases,
}


class Ceilings(NamedTuple):
    """What this device does at best: bytes a second of a copy, operations a second of a matrix product in bf16."""

    bytes: float
    operations: float

    def seconds(self, floor: Floor) -> float:
        """The least time for what must be done."""
        return max(floor.bytes / self.bytes, floor.operations / self.operations)


def seconds(run: Callable[[], Any], device: str, milliseconds: int) -> float:
    """Of one call: the median of as many as fit."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    from triton.testing import do_bench

    return float(do_bench(run, warmup=milliseconds // 4, rep=milliseconds, return_mode="median")) / 1e3


def ceilings(device: str, milliseconds: int) -> Ceilings:
    """Measured, on random numbers."""
    elements, side = (1 << 30, 8192) if device == "cuda" else (1 << 12, 64)
    source = torch.randn(elements, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return Ceilings(
        4.0 * elements / seconds(lambda: target.copy_(source), device, milliseconds),
        2.0 * side**3 / seconds(lambda: a @ b, device, milliseconds),
    )


def difference(results: Any, expected: Any) -> float | None:
    """The largest relative difference in norm of tensors computed from the same inputs; None: nothing was returned."""
    if expected is None or results is None:
        return None
    pairs = zip(_tensors(results), _tensors(expected), strict=True)
    parts = [((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30)).item() for a, b in pairs]
    return max(parts)


def _tensors(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def measured(case: Case, limits: Ceilings, device: str, milliseconds: int) -> dict[str, Any]:
    """The figures of one case."""
    expected = case.ours()
    apart, refused, runs = {}, dict(case.absent), {"ours": case.ours}
    for name, peer in case.peers.items():
        try:
            apart[name] = difference(peer(), expected)
            runs[name] = peer
        except Exception as error:  # a peer that fails is reported, and the others go on
            refused[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
    del expected
    times = {name: seconds(run, device, milliseconds) for name, run in runs.items()}
    least = limits.seconds(case.floor)
    return {
        "name": case.name,
        "shape": case.shape,
        "bytes": case.floor.bytes,
        "operations": case.floor.operations,
        "floor_seconds": least,
        "seconds": times,
        "share_of_floor": least / times["ours"],
        "ratio": {name: times["ours"] / each for name, each in times.items() if name != "ours"},
        "difference": apart,
        "absent": refused,
    }


def versions() -> dict[str, Any]:
    """Of all that decides the figures."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "liger_kernel", "cut_cross_entropy", "flash_attn", "apex"):
        try:
            found[package] = getattr(__import__(package), "__version__", "installed")
        except ImportError:
            continue
    if torch.cuda.is_available():
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found


def line(result: dict[str, Any]) -> str:
    """One case of the table."""
    peers = "  ".join(f"{name} {ratio:.2f}" for name, ratio in result["ratio"].items())
    time_ms, floor_ms = result["seconds"]["ours"] * 1e3, result["floor_seconds"] * 1e3
    share = result["share_of_floor"]
    return f"{result['name']:34} {time_ms:9.3f} ms  floor {floor_ms:8.3f} ms  {share:6.1%}  ours/peer: {peers or '-'}"


def main() -> None:
    parser = argparse.ArgumentParser(description="every kernel beside its floor and its peers, on a GPU")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of cases")
    parser.add_argument("--milliseconds", type=int, default=80, help="spent on timing each contender")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave torch.compile out, which takes most of the time"
    )
    parser.add_argument("--smoke", action="store_true", help="run every case once on the CPU, at tiny sizes")
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --smoke runs every case once on the CPU")
    sizes = SMOKE if options.smoke else Sizes(compiled=not options.no_compile)
    start = time.perf_counter()
    limits = ceilings(sizes.device, options.milliseconds)
    print(f"copy {limits.bytes / 1e12:.3g} TB/s, matrix product {limits.operations / 1e12:.4g} TFLOP/s")
    results = []
    for group in options.only:
        for case in GROUPS[group](sizes):
            results.append({"group": group, **measured(case, limits, sizes.device, options.milliseconds)})
            print(line(results[-1]), flush=True)
    report = {
        "convention": "median seconds of a call, cache cleared; floor = bytes / copy rate or operations / product "
        "rate, both of this run; attention counts causal pairs within documents; ratio = ours / peer in seconds",
        "command": shlex.join(["python", "benchmarks/gpu/kernels.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if sizes.device == "cuda" else "cpu",
        "versions": versions(),
        "ceilings": {"bytes_per_second": limits.bytes, "operations_per_second": limits.operations},
        "seconds": round(time.perf_counter() - start, 1),
        "results": results,
    }
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
