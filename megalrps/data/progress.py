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
        self._bytes_done = self._bytes_resumed = 0
        self._next_line = interval
        self._started = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self._stream.isatty():
            self._bar = _make_bar(self._stream)
            self._task = self._bar.add_task("", total=self._total_bytes, rate="", documents=0, left="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, line: str) -> None:
        """Show a line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            self._stream.write(f"{line}\n")

    def advance(self, documents: int, text_bytes: int, bytes_read: int, resumed: bool = False) -> None:
        """``documents`` more are done, of ``text_bytes`` UTF-8 bytes, from ``bytes_read`` more bytes of the input.

        ``resumed``: an earlier run had done them; they say nothing about how fast this one is.
        """
        self._documents += documents
        self._text_bytes += 0 if resumed else text_bytes
        self._bytes_done += bytes_read
        self._bytes_resumed += bytes_read if resumed else 0
        if self._bar is not None and self._task is not None:
            left = _duration(self._seconds_left())
            done, documents = self._bytes_done, self._documents
            self._bar.update(self._task, completed=done, documents=documents, rate=self._rate(), left=left)
        elif self._documents >= self._next_line:
            self._next_line = self._documents - self._documents % self._interval + self._interval
            share = self._bytes_done / max(self._total_bytes, 1)
            left = _duration(self._seconds_left())
            self._stream.write(f"{self._documents:,} documents, {share:.0%}, {self._rate()}, {left} left\n")
            self._stream.flush()

    def _seconds_left(self) -> float:
        passed = time.monotonic() - self._started
        return passed * (self._total_bytes - self._bytes_done) / max(self._bytes_done - self._bytes_resumed, 1)

    def _rate(self) -> str:
        return f"{self._text_bytes / 1e6 / max(time.monotonic() - self._started, 1e-9):.1f} MB/s"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _make_bar(stream: TextIO) -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TextColumn("{task.fields[documents]:,} documents"),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[left]} left"),
    )
    return Progress(*columns, console=Console(file=stream), transient=True)
