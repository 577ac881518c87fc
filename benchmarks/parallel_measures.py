"""What one rank measures for benchmarks/parallel.py: seconds of updates, bytes that it sends, memory that it takes."""

import ctypes
import resource
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median_low
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from parallel_contenders import Contender, Running, Work, start
from torch.nn.attention.bias import causal_lower_right
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from megalrps.parallel.mesh import Mesh

_MEASURED = "measured update"
_SETTLED = 2  # updates until each is like the last: DDP cuts its buckets anew after the first
_RECORDED = 5
_WAITING = Running(lambda _: 0.0, lambda: None, None)
"""A process that has no part in a contender."""


class Turn(NamedTuple):
    """Seconds of one update on one rank, the mean of a turn."""

    cpu: float
    """Of the process, all its threads, user and system."""
    wall: float


class Timed(NamedTuple):
    """A contender on one rank: its turns, and the losses of all its updates."""

    turns: list[Turn]
    losses: list[float]


def times(
    rank: int, contenders: Sequence[Contender], work: Work, device: str, turns: int, updates: int
) -> dict[str, Timed]:
    """Every contender's turns of ``updates`` updates, one after another, beginning with another one in each round.

    The first round is not counted. All contenders are alive together, each with its own copy of the model.
    """
    place = torch.device(device)
    running = {each.name: start(each, work, place) if rank < each.ranks else _WAITING for each in contenders}
    found = {name: Timed([], []) for name in running}
    names = list(running)
    for turn in range(-1, turns):
        batches = [work.batch((turn + 1) * updates + update) for update in range(updates)]
        for name in (*names[turn % len(names) :], *names[: turn % len(names)]):
            step, finish, _ = running[name]
            _meet(place)
            before = _now()
            found[name].losses.extend(step(batch) for batch in batches)
            finish()
            _end(place)
            if turn >= 0:
                cpu, wall = (after - since for after, since in zip(_now(), before, strict=True))
                found[name].turns.append(Turn(cpu / updates, wall / updates))
    return found


class Sent(NamedTuple):
    """What one rank sends in one update."""

    by_dimension: dict[str, float]
    """Bytes of its calls as ring collectives send them, by the dimension of the mesh."""
    gloo: float
    """Bytes of the same calls as gloo sends them: a reduce-scatter is an all-reduce there."""
    written: int | None
    """Bytes that the process has written meanwhile, by the system's count; None where the system does not count."""


def sent(rank: int, contender: Contender, work: Work) -> Sent:
    """What this rank sends in an update."""
    step, finish, mesh = start(contender, work, torch.device("cpu"))
    for update in range(_SETTLED):
        step(work.batch(update))
    finish()
    dist.barrier()
    before = _written()
    with mock.patch("megalrps.kernels.attention.causal_lower_right", _outside_modes), _Calls(mesh) as calls:
        step(work.batch(_SETTLED))
        finish()
    after = _written()
    dist.barrier()
    return Sent(dict(calls.by_rings), calls.by_gloo, None if before is None or after is None else after - before)


def _outside_modes(queries: int, keys: int) -> Any:
    """The mask of attention, whose class cannot be made under a dispatch mode (torch 2.13)."""
    with _disable_current_modes():
        return causal_lower_right(queries, keys)


class _Calls(TorchDispatchMode):
    """Counts the bytes of every communication by the dimension of the mesh; fails on one that it does not know.

    Gradients and parameters are flat, and all that a peer sends is data parallel: what replicas exchange that is flat
    counts for ``dp``, whether they share a batch or a sequence.
    """

    def __init__(self, mesh: Mesh | None) -> None:
        super().__init__()
        self.by_rings: defaultdict[str, float] = defaultdict(float)
        self.by_gloo = 0.0
        groups = {} if mesh is None else {"tp": mesh.tensor, "pp": mesh.pipeline, "cp": mesh.context, "dp": mesh.data}
        self._names = {each.group.group_name: name for name, each in groups.items() if each.group is not None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Sequence[Any]) -> None:
        group = next(
            dist.ProcessGroup.unbox(each)
            for each in args
            if isinstance(each, torch.ScriptObject) and str(each._type()).endswith(".ProcessGroup")
        )
        tensor = args[1] if name == "_reduce_scatter_base_" else args[0]
        tensor = tensor if isinstance(tensor, torch.Tensor) else tensor[0]
        share = (group.size() - 1) / group.size()
        by_rings, by_gloo = {
            "allreduce_": (2 * share, 2 * share),
            "_allgather_base_": (share, share),
            "_reduce_scatter_base_": (share, 2 * share),
            "send": (1.0, 1.0),
            "recv_": (0.0, 0.0),
        }[name]
        dimension = self._names.get(group.group_name, "dp")
        dimension = "dp" if dimension == "cp" and tensor.dim() < 2 else dimension
        self.by_rings[dimension] += by_rings * tensor.nbytes
        self.by_gloo += by_gloo * tensor.nbytes


class Held(NamedTuple):
    """Bytes that torch's allocator has given out to one rank, of the median of several updates."""

    between: int
    """When an update begins."""
    peak: int
    """At most while it runs."""


def held(rank: int, contender: Contender, work: Work) -> Held:
    """What this rank holds: the profiler records the allocator's count at each allocation on the CPU."""
    _count_on_every_thread()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step, finish, _ = start(contender, work, torch.device("cpu"))
        for update in range(_SETTLED + _RECORDED):
            dist.barrier()
            with record_function(_MEASURED):
                step(work.batch(update))
                finish()
    events = list(_events(trace.profiler.kineto_results.experimental_event_tree()))
    totals = [(e.start_time_ns, e.extra_fields.total_allocated) for e in events if e.tag.name == "Allocation"]
    totals.sort(key=lambda each: each[0])
    found = []
    for begins, ends in sorted((each.start_time_ns, each.end_time_ns) for each in events if each.name == _MEASURED):
        during = [total for when, total in totals if begins <= when <= ends]
        found.append(Held(during[0], max(during)))
    settled = found[_SETTLED:]
    return Held(median_low(each.between for each in settled), median_low(each.peak for each in settled))


def _count_on_every_thread() -> None:
    """Have the allocator count what threads release that are not profiled: gloo's are at times the last to hold what
    they sent. Nothing but this flag of torch's asks for it.
    """
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    ctypes.c_bool.in_dll(ctypes.CDLL(str(library)), "FLAGS_caffe2_report_cpu_memory_usage").value = True


def _events(tree: Sequence[Any]) -> Iterator[Any]:
    for event in tree:
        yield event
        yield from _events(event.children)


def _meet(device: torch.device) -> None:
    """All ranks are here, and none has work under way."""
    _end(device)
    if dist.is_initialized():
        dist.barrier()


def _end(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _now() -> tuple[float, float]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime, time.perf_counter()


def _written() -> int | None:
    """Bytes that this process has handed to the system in write calls, those to sockets among them."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))
