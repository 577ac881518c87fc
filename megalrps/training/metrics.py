"""metrics.jsonl: one JSON object a step, in the order of execution, and never a line of work that was lost."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from megalrps.errors import InputError
from megalrps.files import locked, replacing, sync_directory, sync_file


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl.

    ``step`` counts optimizer updates along the path's trajectory, what it inherited from its parent included;
    ``tokens`` and ``samples`` likewise. ``loss`` is in nats per token, None where it was no number; ``mfu`` a fraction
    or None (peak not known). ``skipped``: the update was left out; its step counts all the same. ``data_seconds``, of
    the ``seconds``, passed until this rank's samples were there.
    """

    path: str
    version: str
    step: int
    loss: float | None
    lr: float
    grad_norm: float | None
    tokens: int
    samples: int
    seconds: float
    tokens_per_second: float
    mfu: float | None = None
    loss_scale: float | None = None
    skipped: bool = False
    data_seconds: float = 0.0


class MetricsFile:
    """Appends to metrics.jsonl; opening it drops the lines that no checkpoint covers (work a killed launch lost).

    covered: for each path that this launch trains, the last step that a committed checkpoint holds. Lines of other
    paths are other launches', which may be writing now: everybody takes the lock beside the file for each line, and
    looks whether the file is still the one it has open.
    """

    def __init__(self, path: Path, covered: Mapping[str, int]) -> None:
        self._path = path
        self._lock = path.with_name(f".{path.name}.lock")
        with locked(self._lock):
            self.dropped = _keep_lines(path, lambda of, step: step <= covered.get(of, step)) if path.exists() else 0
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        sync_directory(path.parent)  # sync() makes lines durable, not the file's name

    def write(self, metrics: StepMetrics) -> None:
        """Append one step; a reader sees whole lines only."""
        with locked(self._lock):
            if not os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
                self._file.close()
                self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
            self._file.write(json.dumps(asdict(metrics)) + "\n")
            self._file.flush()

    def drop(self, path: str, after: int, until: int) -> int:
        """Drop the lines of ``path`` for the steps after < step <= until, which are trained again; returns how many.

        There are some where a checkpoint that covered them turned out damaged.
        """
        with locked(self._lock):
            return _keep_lines(self._path, lambda of, step: of != path or not after < step <= until)

    def sync(self) -> None:
        """Make all lines durable: called before a checkpoint is committed, so that the checkpoint covers them.

        On any thread, beside a :meth:`write`: whichever file lies there has all the lines that were written before, and
        one that another launch has put there was durable before it came.
        """
        sync_file(self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _keep_lines(path: Path, keeps: Callable[[str, int], bool]) -> int:
    """Rewrite ``path`` with those lines whose path and step ``keeps`` accepts; returns how many were dropped."""
    lines = path.read_bytes().splitlines(keepends=True)
    kept: list[bytes] = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            inside = keeps(entry["path"], entry["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # a launch killed in the middle of a write leaves half a line, and only there
                continue
            raise InputError(f"{path}:{number} is not a line of metrics: restore the file or move it away") from error
        if inside and line.endswith(b"\n"):
            kept.append(line)
    if len(kept) < len(lines):
        with replacing(path) as file:
            file.writelines(kept)
    return len(lines) - len(kept)
