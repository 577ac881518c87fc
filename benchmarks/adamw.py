"""One AdamW update on the CPU: the native kernel, its torch form, torch.optim.AdamW fused and foreach, and memcpy.

    OMP_NUM_THREADS=1 python benchmarks/adamw.py --output benchmarks/results/adamw.json

All update flat fp32 parameters with fp32 moments from the same gradient; one step is timed at a time, in turns, after
steps that are not counted. An update must read p, g, m, v and write p, m, v: 28 bytes an element, whatever a contender
really moves. The bandwidth printed is those bytes over the median seconds; beside it stands that of a memcpy of the
same number of elements, 8 bytes each. An update can pass it: it writes only lines it has read, while a copy may have to
read its target's lines too before it writes them. ``ratio`` is the native seconds over the other's, medians: below 1 is
faster.

Before timing, every contender takes the same steps on the same numbers; how far their parameters part is written down.
"""

import argparse
import ctypes
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from machine import processor
from torch import Tensor

from megalrps.kernels.adamw import IMPLEMENTATION, adamw_, adamw_reference_

_SETTINGS = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1}
_BYTES = {"update": 28, "memcpy": 8}
_BYTES_BF16_MOMENTS = 4 * 3 + 2 * 4
_BYTES_NARROW = 28 + 2
_WARM_UP_STEPS = 2

Step = Callable[[], Any]


def tensors(elements: int) -> tuple[Tensor, Tensor]:
    """Parameters and gradient, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(elements, generator=generator), torch.randn(elements, generator=generator)


def our_step(
    function: Callable[..., None], elements: int, moments: torch.dtype = torch.float32, narrow: bool = False
) -> tuple[Tensor, Step]:
    """The parameters, and one more update of them."""
    param, grad = tensors(elements)
    first, second = (torch.zeros(elements, dtype=moments) for _ in range(2))
    copy = torch.zeros(elements, dtype=torch.bfloat16) if narrow else None
    steps = iter(range(1, 1 << 30))
    return param, lambda: function(param, grad, first, second, step=next(steps), narrow=copy, **_SETTINGS)


def torch_step(elements: int, **kind: bool) -> tuple[Tensor, Step]:
    """The same with one parameter of torch's own optimizer."""
    values, grad = tensors(elements)
    param = torch.nn.Parameter(values)
    param.grad = grad
    betas = (_SETTINGS["beta1"], _SETTINGS["beta2"])
    settings = {"lr": _SETTINGS["learning_rate"], "eps": _SETTINGS["epsilon"]}
    optimizer = torch.optim.AdamW([param], betas=betas, weight_decay=_SETTINGS["weight_decay"], **settings, **kind)
    return param.detach(), optimizer.step


def memcpy_step(elements: int) -> Step:
    """libc's memcpy between two buffers."""
    source, _ = tensors(elements)
    target = torch.zeros_like(source)
    return lambda: ctypes.memmove(target.data_ptr(), source.data_ptr(), 4 * elements)


def contenders(elements: int) -> dict[str, tuple[Tensor, Step]]:
    return {
        "native": our_step(adamw_, elements),
        "native_narrow": our_step(adamw_, elements, narrow=True),
        "native_bf16_moments": our_step(adamw_, elements, moments=torch.bfloat16),
        "torch_form": our_step(adamw_reference_, elements),
        "torch_fused": torch_step(elements, fused=True),
        "torch_foreach": torch_step(elements, foreach=True),
    }


def largest_difference(elements: int, steps: int = 10) -> dict[str, float]:
    """Of the parameters of each contender from the native ones, after ``steps`` steps."""
    results = {}
    for name, (param, step) in contenders(elements).items():
        for _ in range(steps):
            step()
        results[name] = param
    native = results.pop("native")
    return {name: float(f"{(param - native).abs().max().item():.2g}") for name, param in results.items()}


def measure(steps: dict[str, Step], repetitions: int) -> dict[str, list[float]]:
    """Wall seconds of each contender by repetition, in turns, forwards and backwards."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in range(-_WARM_UP_STEPS, repetitions):
        for name in list(steps) if repetition % 2 else list(reversed(steps)):
            start = time.perf_counter()
            steps[name]()
            if repetition >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def summarise(times: dict[str, list[float]], elements: int) -> dict[str, Any]:
    """The figures."""
    sizes = dict.fromkeys(times, _BYTES["update"])
    sizes |= {"memcpy": _BYTES["memcpy"], "native_narrow": _BYTES_NARROW, "native_bf16_moments": _BYTES_BF16_MOMENTS}
    medians = {name: statistics.median(of) for name, of in times.items()}
    return {
        "bytes_per_element": sizes,
        "median_seconds": {name: round(value, 4) for name, value in medians.items()},
        "gigabytes_per_second": {name: round(sizes[name] * elements / medians[name] / 1e9, 2) for name in times},
        "fastest_gigabytes_per_second": {
            name: round(sizes[name] * elements / min(times[name]) / 1e9, 2) for name in times
        },
        "ratio": {name: round(medians["native"] / medians[name], 3) for name in times if name.startswith("torch_")},
        "seconds": {name: [round(value, 4) for value in of] for name, of in times.items()},
    }


def _load() -> list[float]:
    return [round(value, 2) for value in os.getloadavg()]


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """What was compared, on what and how."""
    return {
        "compares": {
            "native": "megalrps adamw_ (csrc/adamw.cpp), fp32 parameters and moments",
            "native_narrow": "the same with a bf16 copy of the parameters",
            "native_bf16_moments": "the same with both moments in bf16",
            "torch_form": "megalrps adamw_reference_",
            "torch_fused": "torch.optim.AdamW(fused=True).step",
            "torch_foreach": "torch.optim.AdamW(foreach=True).step",
            "memcpy": "libc, as many fp32 elements",
        },
        "convention": "median wall seconds of one update, in turns in one process; GB = 10^9 bytes, of what an update "
        "must read and write; ratio = native / other in seconds, below 1 is faster",
        "command": shlex.join(["python", "benchmarks/adamw.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "device": {"kind": "cpu", "processor": processor(), "cores": os.cpu_count(), "threads": options.threads},
        "load_average": {"before": _load()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "elements": options.elements,
        "repetitions": options.repetitions,
        "warm_up_steps": _WARM_UP_STEPS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="one AdamW update on the CPU beside torch's own")
    parser.add_argument("--elements", type=int, default=1 << 24)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    options = parser.parse_args()
    if IMPLEMENTATION != "native":
        parser.error("megalrps._native is not built: python setup.py build_ext --inplace")
    torch.set_num_threads(options.threads)
    result = describe(options)
    result["largest_difference_from_native"] = largest_difference(min(options.elements, 1 << 20))
    steps = {name: step for name, (_, step) in contenders(options.elements).items()}
    result |= summarise(
        measure({**steps, "memcpy": memcpy_step(options.elements)}, options.repetitions), options.elements
    )
    result["load_average"]["after"] = _load()
    for name, seconds in result["median_seconds"].items():
        print(f"{name:20} {seconds:8.4f} s {result['gigabytes_per_second'][name]:7.2f} GB/s")
    print("native / other:", result["ratio"])
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
