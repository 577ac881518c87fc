"""Contenders of benchmarks/throughput.py, each in a process of its own, that train by turns and measure themselves.

A process of its own gives each its CPU seconds, its memory and its allocator. Between its turns a contender waits.
"""

import multiprocessing
import resource
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from throughput_breakdown import UPDATES, Breakdown, break_down, region_of_module
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from megalrps.config import Config
from megalrps.errors import InputError


@dataclass(frozen=True)
class Work:
    """What every contender trains: a checked job's options, and how many updates it may be asked for at most."""

    config: Config
    device: str
    threads: int
    updates: int


class Order(NamedTuple):
    """Make so many updates, timed, or under the profiler."""

    updates: int
    profiled: bool = False


class Round(NamedTuple):
    """One turn of one contender: seconds of all its updates together."""

    updates: int
    wall: float
    user: float
    system: float
    peak_bytes: int
    """On CUDA what torch's allocator has given out at most, on the CPU the resident memory of the process at most."""


class Failed(NamedTuple):
    """Why a contender cannot go on: a mistake that the user can mend, or a defect with its traceback."""

    text: str
    from_user: bool


class Train(Protocol):
    """A contender: trains while ``turns.more()``, and returns the loss of every update that it made."""

    def __call__(self, work: Work, turns: "Turns", /) -> list[float]: ...


class Turns:
    """A contender's side: it calls :meth:`more` before its first update and after each, and nothing else is timed.

    So a turn has all that lies between the end of one update and the end of the next: data, passes, optimizer, and
    what a trainer does around them.
    """

    def __init__(self, connection: Connection, device: str) -> None:
        self._connection = connection
        self._on_cuda = device == "cuda"
        self._left = 0
        self._order: Order | None = None
        self._before: tuple[float, float, float] = (0.0, 0.0, 0.0)
        self._modules: tuple[nn.Module, ...] = ()
        self._calls: tuple[tuple[Any, str, str], ...] = ()
        self._stack = ExitStack()

    def watch(self, modules: Iterable[nn.Module], calls: Iterable[tuple[Any, str, str]] = ()) -> None:
        """Of which modules, and of which (object, method, group), a profile shall tell the time."""
        self._modules, self._calls = tuple(modules), tuple(calls)

    def more(self) -> bool:
        """Whether to make another update; waits for the contender's next turn."""
        if self._order is not None:
            self._left -= 1
            if self._left:
                return True
            self._connection.send(self._ended(self._order))
            self._order = None
        order: Order | None = self._connection.recv()
        if order is None:
            return False
        self._begin(order)
        return True

    def _begin(self, order: Order) -> None:
        self._order, self._left = order, order.updates
        if order.profiled:
            self._trace = self._stack.enter_context(self._profiler())
            self._stack.enter_context(_regions(self._modules, self._calls))
        _reset_peak(self._on_cuda)
        self._synchronise()
        self._before = _clocks()
        if order.profiled:
            self._stack.enter_context(record_function(UPDATES))

    def _ended(self, order: Order) -> Round | Breakdown:
        self._synchronise()
        wall, user, system = (after - before for after, before in zip(_clocks(), self._before, strict=True))
        if not order.profiled:
            return Round(order.updates, wall, user, system, _peak(self._on_cuda))
        self._stack.close()
        return break_down(cast(Any, self._trace.events()), order.updates, on_cuda=self._on_cuda)

    def _profiler(self) -> profile:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_cuda else [])]
        return profile(activities=activities)

    def _synchronise(self) -> None:
        if self._on_cuda:
            torch.cuda.synchronize()


def _clocks() -> tuple[float, float, float]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), used.ru_utime, used.ru_stime


def _reset_peak(on_cuda: bool) -> None:
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):  # then the peak is that since the process began
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak(on_cuda: bool) -> int:
    if on_cuda:
        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    told = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return 1024 * (told[0] if told else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


@contextmanager
def _regions(modules: Iterable[nn.Module], calls: Iterable[tuple[Any, str, str]]) -> Iterator[None]:
    """Name the time in forward passes of known modules, and in methods, for the profiler."""
    with ExitStack() as stack:
        for module in modules:
            region = region_of_module(type(module).__name__)
            if region is not None:
                _name_module(module, region, stack)
        for owner, method, region in calls:
            setattr(owner, method, record_function(region)(getattr(owner, method)))
            stack.callback(delattr, owner, method)  # the class's own method is seen again
        yield


def _name_module(module: nn.Module, region: str, stack: ExitStack) -> None:
    open_: list[record_function] = []

    def enter(*_: Any) -> None:
        open_.append(record_function(region))
        open_[-1].__enter__()

    def leave(*_: Any) -> None:
        open_.pop().__exit__(None, None, None)

    for handle in (module.register_forward_pre_hook(enter), module.register_forward_hook(leave)):
        stack.callback(handle.remove)


class Contender:
    """The benchmark's side of a contender's process."""

    def __init__(self, name: str, train: Train, work: Work) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")  # CUDA cannot be used in a fork
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(train, work, theirs), name=name, daemon=True)
        self._process.start()
        theirs.close()

    def run(self, updates: int) -> Round:
        """One turn."""
        return cast(Round, self._ask(Order(updates)))

    def profile(self, updates: int) -> Breakdown:
        """One turn under the profiler."""
        return cast(Breakdown, self._ask(Order(updates, profiled=True)))

    def finish(self) -> list[float]:
        """End it; returns the losses of all its updates."""
        losses = cast(list[float], self._ask(None))
        self._process.join()
        return losses

    def stop(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.join()

    def _ask(self, order: Order | None) -> Any:
        try:
            self._connection.send(order)
            answer = self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            self._process.join()
            raise InputError(
                f"{self.name} was ended from outside (exit code {self._process.exitcode}): where memory ran out, lower "
                "--micro-batch-size or add --one-at-a-time"
            ) from error
        if isinstance(answer, Failed):
            self._process.join()
            if answer.from_user:
                raise InputError(f"{self.name}: {answer.text}")
            raise RuntimeError(f"{self.name} failed:\n{answer.text}")
        return answer


def serve(train: Train, work: Work, connection: Connection) -> None:
    """What a contender's process does: train by turns, then hand in the losses."""
    torch.set_num_threads(work.threads)
    try:
        with redirect_stdout(None):
            losses: list[float] | Failed = train(work, Turns(connection, work.device))
    except InputError as error:
        losses = Failed(str(error), True)
    except torch.OutOfMemoryError as error:
        told = str(error).partition(". ")[0]
        losses = Failed(f"{told}: lower --micro-batch-size or add --one-at-a-time", True)
    except Exception:
        losses = Failed(traceback.format_exc(), False)
    connection.send(losses)


def in_turns(
    contenders: dict[str, Callable[[], Contender]],
    *,
    warm_up: int,
    rounds: int,
    updates: int,
    profiled: int,
    one_at_a_time: bool,
) -> tuple[dict[str, list[Round]], dict[str, Breakdown], dict[str, list[float]]]:
    """Rounds, profile (none where ``profiled`` is 0) and losses of every contender, by name.

    Each is alive from the first round to the last, and another one begins each round; or with ``one_at_a_time`` each is
    started, warmed up and ended for every turn, and the losses are those of its first one.
    """
    found: dict[str, list[Round]] = {name: [] for name in contenders}
    breakdowns: dict[str, Breakdown] = {}
    losses: dict[str, list[float]] = {}
    alive: dict[str, Contender] = {}
    names = list(contenders)
    try:
        for turn in range(rounds + (profiled > 0)):
            first = turn % len(names)
            for name in (*names[first:], *names[:first]):
                if name not in alive:
                    alive[name] = contenders[name]()
                    alive[name].run(warm_up)
                if turn < rounds:
                    found[name].append(alive[name].run(updates))
                else:
                    breakdowns[name] = alive[name].profile(profiled)
                if one_at_a_time or turn == rounds + (profiled > 0) - 1:
                    losses.setdefault(name, alive[name].finish())
                    del alive[name]
    finally:
        for contender in alive.values():
            contender.stop()
    return found, breakdowns, losses
