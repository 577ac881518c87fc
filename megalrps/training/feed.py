"""The samples of the updates to come, made ready on threads while the loop computes.

What an update draws is a pure function of its place in the plan, a :class:`Draw`. So what is made ahead is known by
its draw alone: it can never be the wrong batch, only one that nobody asks for, and that is dropped. A restart, a jump
back or a switch of paths needs no more than that; a branch and the main path even take what was read for the other.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megalrps.paths.plan import Window

AHEAD_PER_THREAD = 4
"""Updates that are ready or being made beyond the one that is taken, at most, for each thread: the bound of memory."""
AT_ONCE = 4
"""Updates that a thread is woken for. To wake one, and to change the thread that Python runs, costs as much as to read
a small batch: done for every update, it would make small runs on a CPU slower than no threads at all."""

_SECONDS_TO_END = 5.0
_SPAN = 60.0  # seconds of updates over which the wait for data is judged
_FEWEST = 10  # updates in such a span: one slow look at a cold disk is no lack of threads
_MOST = 0.1  # of the time of the updates


@dataclass(frozen=True)
class Draw:
    """Samples ``first`` to ``first + count - 1`` of ``window``'s data: this rank's share of one update."""

    window: Window
    first: int
    count: int

    def indices(self) -> NDArray[np.int64]:
        """The samples' indices, int64 [count]."""
        return np.arange(self.first, self.first + self.count, dtype=np.int64)


@dataclass(frozen=True)
class Share:
    """The samples of a draw: arrays on the host, or tensors where the step computes.

    tokens: int64 [count, S + 1]. starts_BS: int32 [count, S], the place in the sample where the document of each input
    token begins; None: of no interest. counted_BS: bool [count, S], which labels count in the loss; None: all.
    """

    tokens: NDArray[np.int64] | Tensor
    starts_BS: NDArray[np.int32] | Tensor | None = None  # noqa: N815
    counted_BS: NDArray[np.bool_] | Tensor | None = None  # noqa: N815


class Lane(Protocol):
    """The way of one thread's shares from its memory to where the step computes."""

    def send(self, share: Share) -> Callable[[], Share]:
        """Begin to bring ``share`` there; what is returned gives it, to be called once by the thread of the loop."""


class HostLane:
    """The step computes on the host: the arrays are where they are needed."""

    def send(self, share: Share) -> Callable[[], Share]:
        """``share`` itself."""
        return lambda: share


class Feed:
    """Gives the loop the shares it asks for, most of them made before it asks. To be used in a ``with`` block.

    ``read`` makes the share of a draw, on the host; several threads call it at once. ``threads`` 0: the loop itself
    does. ``lanes`` is called once on each thread that reads. There is no thread before :meth:`follow`.
    """

    def __init__(
        self,
        read: Callable[[Draw], Share],
        *,
        threads: int,
        lanes: Callable[[], Lane] = HostLane,
    ) -> None:
        self._read = read
        self._lanes = lanes
        self._own_lane: Lane | None = None
        self._course: Iterator[Draw] = iter(())
        self._ahead: deque[_Task] = deque()
        self._depth = threads * AHEAD_PER_THREAD
        self._todo: SimpleQueue[list[_Task] | None] = SimpleQueue()
        # Daemons: a process must be able to end, whatever a disk or a remote store does to a thread.
        self._threads = [
            threading.Thread(target=self._work, name=f"feed {number}", daemon=True) for number in range(threads)
        ]
        self._started = False

    def follow(self, course: Iterable[Draw]) -> None:
        """From now on make ``course`` ready, in its order; what is ready or being made of it already is kept."""
        if not self._threads:
            return
        kept: dict[Draw, list[_Task]] = {}
        while self._ahead:  # the last first, so that of several for one draw the first is found first
            task = self._ahead.pop()
            kept.setdefault(task.draw, []).append(task)
        self._course = iter(course)
        self._fill(kept)
        for tasks in kept.values():
            for task in tasks:
                task.dropped = True
        if not self._started:
            self._started = True
            for thread in self._threads:
                thread.start()

    def take(self, draw: Draw) -> Share:
        """The share of ``draw``, where the step computes. Raises what reading it raised.

        One that is on the course is waited for, and the course goes on after it; any other is read here and now.
        """
        while self._ahead and self._ahead[0].draw != draw:
            self._ahead.popleft().dropped = True
        if not self._ahead:
            self._course = iter(())
            if self._own_lane is None:
                self._own_lane = self._lanes()
            return self._own_lane.send(self._read(draw))()
        task = self._ahead.popleft()
        self._fill({})
        return task.result()

    def close(self) -> None:
        """End the threads. One that is stuck in a read is left to itself, after a moment: it gives to nobody."""
        self._course = iter(())
        while self._ahead:
            self._ahead.pop().dropped = True
        if self._started:
            for _ in self._threads:
                self._todo.put(None)
            deadline = time.monotonic() + _SECONDS_TO_END
            for thread in self._threads:
                thread.join(max(0.0, deadline - time.monotonic()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fill(self, made: "dict[Draw, list[_Task]]") -> None:
        """Go on with the course where there is room for some; of ``made`` take what it holds."""
        if len(self._ahead) > self._depth - AT_ONCE:
            return
        new: list[_Task] = []
        while len(self._ahead) < self._depth and (draw := next(self._course, None)) is not None:
            known = made.get(draw)
            if not known:
                new.append(_Task(draw))
            self._ahead.append(known.pop() if known else new[-1])
        for first in range(0, len(new), AT_ONCE):
            self._todo.put(new[first : first + AT_ONCE])

    def _work(self) -> None:
        lane: Lane | None = None
        while (tasks := self._todo.get()) is not None:
            tasks.reverse()
            while tasks:
                task = tasks.pop()
                if not task.dropped:
                    try:
                        if lane is None:
                            lane = self._lanes()
                        task.given = lane.send(self._read(task.draw))
                    except BaseException as error:
                        task.error = error
                    task.done.set()
                del task  # an idle thread would keep its last share alive


class _Task:
    """A draw that is on the course, and what came of it."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.dropped = False
        self.done = threading.Event()
        self.given: Callable[[], Share] | None = None
        self.error: BaseException | None = None

    def result(self) -> Share:
        """Wait for the share; raises what making it raised."""
        self.done.wait()
        if self.error is not None:
            raise self.error
        assert self.given is not None
        return self.given()


class Waits:
    """How long updates wait for their data; tells once that it is too long."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._waited = self._passed = 0.0
        self._updates = 0
        self._told = False

    def note(self, waited: float, seconds: float) -> str | None:
        """What there is to say, or None, after an update of ``seconds``, ``waited`` of them for its data."""
        self._waited, self._passed, self._updates = self._waited + waited, self._passed + seconds, self._updates + 1
        if self._told or self._passed < _SPAN or self._updates < _FEWEST:
            return None
        share, passed, each = self._waited / self._passed, self._passed, self._waited / self._updates
        self._waited = self._passed = 0.0
        self._updates = 0
        if share <= _MOST:
            return None
        self._told = True
        return (
            f"{share:.0%} of the last {passed:.0f} s were spent waiting for data, {each:.3f} s an update: raise "
            f"--num-workers (now {self._threads}), or put the increments on a disk of this machine"
        )
