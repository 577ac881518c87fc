"""How far a tool is through its input: a live bar on a terminal, a plain line now and then anywhere else."""

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class ProgressDisplay:
    """Shows documents, MB/s of text and the time left; a context manager.

    ``total_bytes`` is the size of the input as stored; a plain line is written each time another ``interval`` documents
    are done.
    """

    def __init__(self, stream: TextIO, total_bytes: int, interval: int) -> None:
        self._stream = stream
        self._total_bytes = total_bytes
        self._interval = interval
        self._documents = 0
        self._text_bytes = 0
        self._next_line = interval
        self._started = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self._stream.isatty():
            self._bar = _make_bar(self._stream)
            self._task = self._bar.add_task("", total=self._total_bytes, rate="", documents=0)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, documents: int, text_bytes: int, bytes_read: int) -> None:
        """``documents`` more are done, of ``text_bytes`` UTF-8 bytes; ``bytes_read`` of all the input are behind us."""
        self._documents += documents
        self._text_bytes += text_bytes
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=bytes_read, documents=self._documents, rate=self._rate())
        elif self._documents >= self._next_line:
            self._next_line = self._documents - self._documents % self._interval + self._interval
            share = bytes_read / max(self._total_bytes, 1)
            left = (time.monotonic() - self._started) * (1 - share) / share if share else 0.0
            self._stream.write(f"{self._documents:,} documents, {share:.0%}, {self._rate()}, {left:.0f} s left\n")
            self._stream.flush()

    def _rate(self) -> str:
        return f"{self._text_bytes / 1e6 / max(time.monotonic() - self._started, 1e-9):.1f} MB/s"


def _make_bar(stream: TextIO) -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TextColumn("{task.fields[documents]:,} documents"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(file=stream), transient=True)
