"""Processes that tokenize parts, or this one alone: parts in, in their order, and what was made of them out, in any."""

import contextlib
import multiprocessing
import signal
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from megalrps.data.encode import EncodedPart, EncoderSpec, PartEncoder
from megalrps.data.parts import Part
from megalrps.errors import InputError

_PARTS_AHEAD = 2
"""Parts that a worker is given at a time: it goes on with the second while the first is put in its place."""
_SECONDS_TO_END = 5


class Crew(Protocol):
    """Who does the work."""

    def describe(self) -> str:
        """What tokenizes, and why that; from now on they are ready."""

    def encode(self, parts: Iterator[Part]) -> Iterator[tuple[Part, EncodedPart]]:
        """Each part of ``parts`` with what was made of it, in any order; ``parts`` is drawn from as work is free."""


class OwnProcess:
    """The work is done in this process, part after part."""

    def __init__(self, encoder: PartEncoder) -> None:
        self._encoder = encoder

    def describe(self) -> str:
        """See :class:`Crew`."""
        return self._encoder.describe()

    def encode(self, parts: Iterator[Part]) -> Iterator[tuple[Part, EncodedPart]]:
        """See :class:`Crew`."""
        for part in parts:
            yield part, self._encoder.encode(part)


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    parts: deque[Part] = field(default_factory=deque)
    """Given and not yet answered, in order."""


class WorkerProcesses:
    """``count`` processes; a context manager. They load their tokenizers while the caller goes on.

    Each has a pipe of its own, of which nobody else holds the other end: if this process is killed they end by
    themselves, and if one of them is (out of memory), it is noticed.
    """

    def __init__(self, count: int, spec: EncoderSpec, folder: Path, run: str) -> None:
        self._count = count
        self._arguments = (spec, folder, run)
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        # Spawned, not forked: a fork copies the locks of this process's threads in whatever state they are.
        context = multiprocessing.get_context("spawn")
        for _ in range(self._count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.connection.close()
            if error is not None:
                worker.process.terminate()
        for worker in self._workers:
            worker.process.join(_SECONDS_TO_END)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()

    def describe(self) -> str:
        """See :class:`Crew`."""
        descriptions = [str(self._receive(worker)) for worker in self._workers]  # of all: each one's first answer
        return descriptions[0]

    def encode(self, parts: Iterator[Part]) -> Iterator[tuple[Part, EncodedPart]]:
        """See :class:`Crew`; after :meth:`describe`."""
        while True:
            self._hand_out(parts)
            busy = {worker.connection: worker for worker in self._workers if worker.parts}
            if not busy:
                return
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]  # only Connections were waited for
                answer = self._receive(worker)
                part = worker.parts.popleft()
                # The next part before the answer is made use of: nobody waits for that.
                self._hand_out(parts)
                yield part, answer

    def _hand_out(self, parts: Iterator[Part]) -> None:
        """Give every worker as many parts as it may hold, those with the fewest first."""
        for held in range(_PARTS_AHEAD):
            for worker in self._workers:
                if len(worker.parts) == held and (part := next(parts, None)) is not None:
                    try:
                        worker.connection.send(part)
                    except OSError:
                        raise self._died() from None
                    worker.parts.append(part)

    def _receive(self, worker: _Worker) -> Any:
        try:
            answer = worker.connection.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _died(self) -> InputError:
        return InputError(f"--workers {self._count}: a worker was killed (out of memory?); pass fewer workers")


def _serve(connection: Connection, spec: EncoderSpec, folder: Path, run: str) -> None:
    """What a worker does until nobody gives it any more parts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the interrupt key is for who started us, and will end us
    with contextlib.suppress(EOFError, OSError):  # of the pipe: nobody is there any more
        try:
            encoder = PartEncoder(spec, folder, run)
        except Exception as error:
            connection.send(error)
            return
        connection.send(encoder.describe())
        while True:
            part = connection.recv()
            try:
                answer: EncodedPart | Exception = encoder.encode(part)
            except Exception as error:
                answer = error
            connection.send(answer)
