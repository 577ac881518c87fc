"""Whether this rank goes on: which phase it is in, since when, and what is said and done when it does not.

A rank that is stopped, or stuck in a kernel or in a collective that another never joins, cannot tell so itself, and the
backends name neither rank nor phase (gloo an address, NCCL a sequence number). So each rank has a thread that knows the
phase of the main one: half way to the time-out it prints where this rank stands, and a little after the time-out it
ends the process. What a collective's own time-out raises before that is explained by the same board of all ranks.
"""

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import NoReturn, Self

import torch.distributed as dist

from megalrps.errors import EXIT_STUCK, RepeatedError, StuckError, ToldError
from megalrps.training.peers import Peers, Seen, Sign, within

MARGIN = 2.0
"""Seconds after the time-out before a rank is ended: a collective's own time-out comes first, and ends it in order."""

PATIENT = frozenset({"opening the run", "saving", "loading", "evaluation", "summary and report"})
"""Phases that depend on the size of the state and on the disk: they always have the time of a first one."""

_LEAVING = "leaving the run"
_FIRST = 6.0  # time-outs: the first pass of a kind compiles, allocates and connects
_USUAL = 4.0  # times the longest pass of the kind
_TICKS = 20.0  # looks at the phase within a time-out
_STANDARD_ERROR = 2  # the descriptor: sys.stderr has a lock, which the thread that is stuck may hold
_SECONDS_TO_SPEAK = 5.0
_MEND = (
    "the same command goes on from the last checkpoint; where work only took long, raise --distributed-timeout-minutes"
)
_COLLECTIVE_FAILURES = (
    "/gloo/",
    "gloo::",
    "Timed out waiting",
    "Application timeout caused pair closure",
    "Connection closed by peer",
    "Connection reset by peer",
    "NCCL error",
)
_TOLD_GROUPS = 8


class Watch:
    """The watch over the main thread of rank ``rank`` of ``size``, in a ``with`` block around what is watched.

    ``store``: where the ranks found each other, None for a process that is alone. ``seconds``: the time-out of a phase
    that is not a first one, of a kind that took less than a fourth of it so far. ``prepare`` is called with the error
    before the process is ended.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: dist.Store | None = None, seconds: float = 600.0) -> None:
        self.rank, self.size, self.seconds = rank, size, seconds
        self.last_words: list[Callable[[StuckError], None]] = []
        self._now = ("opening the run", "", 0)
        self._leaving = ""
        self._told: tuple[str, bool] | None = None
        """Once a collective has failed: what there is to say, and whether this is the rank that says it."""
        self._age = 0.0
        self._passed: set[str] = set()
        self._longest: dict[str, float] = {}
        self._interval = min(1.0, seconds / _TICKS)
        self._peers = Peers(rank, size, store, self._sign, self._interval)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def enter(self, phase: str, where: str = "") -> None:
        """This rank is in ``phase`` from now on; ``where`` tells passes of one kind apart. From the main thread."""
        self._passed.add(self._now[0])
        self._now = (phase, where, self._now[2] + 1)

    @property
    def phase(self) -> str:
        """Kind and place of the phase that this rank is in."""
        return " ".join(self._now[:2]).strip()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn the failure of a collective in the block into a StuckError that says where every rank was."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, ToldError) or not is_collective_failure(error):
                self._leaving = f"{type(error).__name__}: {error}"
                raise
            told = self._stuck(f"rank {self.rank}: {_first_line(error)} in {self.phase}")
            mine = self._peers.claim()
            self._told = str(told), mine
            self.enter(_LEAVING)
            raise (told if mine else RepeatedError(str(told), EXIT_STUCK)) from error

    def __enter__(self) -> Self:
        self._peers.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._peers.stop("all done" if kind is None else f"{kind.__name__}: {error}")

    def _sign(self) -> Sign:
        return Sign(self.phase, self._now[2], self._age, ended=self._leaving)

    def _watch(self) -> None:
        seen, told, before = self._now, False, time.monotonic()
        while not self._over.wait(self._interval):
            # A process that was stopped, or a machine that slept, has not been in its phase meanwhile.
            passed, before = min(time.monotonic() - before, 2 * self._interval), time.monotonic()
            if self._now is not seen:
                self._longest[seen[0]] = max(self._longest.get(seen[0], 0.0), self._age)
                seen, told, self._age = self._now, False, 0.0
                continue
            self._age += passed
            if not told and self._age >= max(self.seconds, _USUAL * self._longest.get(seen[0], 0.0)) / 2:
                told = True
                self._peers.look()
                within(_SECONDS_TO_SPEAK, self._say_where)
            if self._age >= self._limit(seen[0]) + MARGIN:
                self._end()

    def _limit(self, kind: str) -> float:
        """Seconds that a phase of ``kind`` may take."""
        if kind == _LEAVING:  # a save in the background may be waiting for the very rank that is stuck
            return MARGIN
        usual = max(self.seconds, _USUAL * self._longest.get(kind, 0.0))
        return usual if kind in self._passed and kind not in PATIENT else max(usual, _FIRST * self.seconds)

    def _say_where(self) -> None:
        line = f"rank {self.rank} of {self.size} has been in {self.phase} for {self._age:.0f} s; its threads:\n"
        os.write(_STANDARD_ERROR, line.encode())
        faulthandler.dump_traceback(_STANDARD_ERROR)

    def _end(self) -> NoReturn:
        """End this process, which does not go on by itself."""

        def speak() -> None:
            if self._told is None:
                told = f"rank {self.rank} made no progress for {self._age:.0f} s in {self.phase}"
                self._told = str(self._stuck(told)), self._peers.claim()
            text, mine = self._told
            if mine:
                os.write(_STANDARD_ERROR, f"error: {text}\n".encode())
            for act in self.last_words:
                act(StuckError(text))

        within(_SECONDS_TO_SPEAK, speak)
        os._exit(EXIT_STUCK)

    def _stuck(self, what: str) -> StuckError:
        return StuckError(f"{what}. {describe(self._peers.seen(), self.size)}: {_MEND}")


def is_collective_failure(error: BaseException) -> bool:
    """Whether ``error`` is how a backend says that a collective, or the launch's store, has failed or timed out."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _COLLECTIVE_FAILURES)


def describe(seen: Mapping[int, Seen], size: int) -> str:
    """Where the ranks were: those first that are gone, silent or behind."""
    groups: dict[tuple[int, int, str], list[tuple[int, float]]] = {}
    for rank in range(size):
        each = seen.get(rank)
        if each is None:
            key, seconds = (0, 0, "no sign of life at all"), 0.0
        elif each.sign.ended:
            key, seconds = (0, each.sign.entered, f"has left the run ({' '.join(each.sign.ended.split())})"), 0.0
        elif each.silent is not None:
            key = (0, each.sign.entered, f"no sign of life for SECONDS s or longer, last seen in {each.sign.phase}")
            seconds = each.silent
        else:
            key, seconds = (1, each.sign.entered, f"in {each.sign.phase} for SECONDS s"), each.sign.seconds
        groups.setdefault(key, []).append((rank, seconds))
    told = [
        f"{_ranks([rank for rank, _ in members])} {text.replace('SECONDS', f'{min(each for _, each in members):.0f}')}"
        for (_, _, text), members in sorted(groups.items())
    ]
    return "; ".join(told[:_TOLD_GROUPS] + [f"and {len(told) - _TOLD_GROUPS} more"] * (len(told) > _TOLD_GROUPS))


def _ranks(ranks: list[int]) -> str:
    """``rank 3``, ``ranks 0-2, 5``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    told = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' * (len(ranks) > 1)} {told}"


def _first_line(error: BaseException) -> str:
    """What a backend says, without where in its source it says so and without its stack."""
    line = str(error).strip().partition("\n")[0]
    return line.partition("] ")[2] if line.startswith("[") and "] " in line else line
