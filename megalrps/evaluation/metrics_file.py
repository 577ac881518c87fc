"""``RUN/metrics.jsonl`` read back: one record a step, in order of execution, and the moving average of the loss."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalrps.errors import InputError
from megalrps.evaluation.json_fields import Fields

_MEND = "give the run's own metrics.jsonl, or remove the bad line"


@dataclass(frozen=True, slots=True)
class Record:
    """One update: the mean ``loss`` of its batch (nats a token) and the trajectory's ``tokens`` after it.

    ``tokens_per_second`` and ``mfu`` (a fraction) are None where the run did not know them.
    """

    path: str
    step: int
    tokens: int
    loss: float
    lr: float
    tokens_per_second: float | None
    mfu: float | None

    @property
    def is_finite(self) -> bool:
        """Whether the loss is a number that can be drawn and averaged."""
        return math.isfinite(self.loss)


@dataclass(frozen=True)
class Metrics:
    """The records of a run in order of execution, each (path, step) once.

    ``torn`` tells that the file ends inside a line, as a killed run leaves it; ``repeated`` counts steps that were
    trained again after such an end and whose later record stands.
    """

    records: tuple[Record, ...]
    torn: bool
    repeated: int

    def of(self, path: str) -> "Trace":
        """The records of one path, by step."""
        mine = sorted((record for record in self.records if record.path == path), key=lambda record: record.step)
        return Trace.of(mine)


@dataclass(frozen=True)
class Trace:
    """Columns [n] over the steps of a trajectory: ``steps`` and ``tokens`` (int64), ``loss`` and ``lr`` (float64)."""

    steps: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    lr: np.ndarray

    @classmethod
    def of(cls, records: Iterable[Record]) -> "Trace":
        rows = list(records)
        return cls(
            steps=np.array([row.step for row in rows], dtype=np.int64),
            tokens=np.array([row.tokens for row in rows], dtype=np.int64),
            loss=np.array([row.loss for row in rows], dtype=np.float64),
            lr=np.array([row.lr for row in rows], dtype=np.float64),
        )

    def __len__(self) -> int:
        return len(self.steps)

    def until(self, step: int) -> "Trace":
        """The part up to and including ``step``."""
        return self._part(self.steps <= step)

    def after(self, step: int) -> "Trace":
        """The part after ``step``."""
        return self._part(self.steps > step)

    def then(self, other: "Trace") -> "Trace":
        """This trace followed by ``other``."""
        return Trace(*(np.concatenate(pair) for pair in zip(self._columns(), other._columns(), strict=True)))

    def _part(self, chosen: np.ndarray) -> "Trace":
        return Trace(*(column[chosen] for column in self._columns()))

    def _columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        return self.steps, self.tokens, self.loss, self.lr


def smoothed(loss: np.ndarray, memory: float) -> np.ndarray:
    """The moving average of ``loss`` [n]: exponential, its memory growing by a step in ten up to ``memory`` steps.

    A short memory at first keeps the average close to the steep start of a training. Values that are no finite number
    are left out; the average keeps its value there (NaN before the first).
    """
    average, seen = np.nan, 0
    averages = np.empty(len(loss))
    for index, value in enumerate(loss):
        if np.isfinite(value):
            weight = 1.0 / max(1.0, min(memory, 1.0 + seen / 10))
            average = value if seen == 0 else average + weight * (value - average)
            seen += 1
        averages[index] = average
    return averages


def read_metrics(path: Path | str) -> Metrics:
    """The metrics of the file ``path``.

    A last line that a kill cut short is dropped and told (``Metrics.torn``). InputError, naming the line, for any other
    line that is not a record, for a file that is missing and for one without a single record. Members beyond those of a
    record are allowed: a log may say more.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; hand the directory of a run that has trained") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); make it readable") from None
    last = lines.pop()  # what follows the last end of line: nothing, or a line whose end was never written
    rows = [_record(line, path, number) for number, line in enumerate(lines, start=1)]
    if not rows:
        raise InputError(
            f"{path}: holds no whole record; hand the directory of a run that has trained at least one step"
        )
    latest: dict[tuple[str, int], Record] = {}
    for row in rows:
        latest.pop((row.path, row.step), None)  # a dict keeps a key's first place; execution order wants its last
        latest[row.path, row.step] = row
    return Metrics(tuple(latest.values()), torn=bool(last), repeated=len(rows) - len(latest))


def _record(line: bytes, path: Path, number: int) -> Record:
    try:
        value = json.loads(line)
    except ValueError:
        raise InputError(f"{path} (line {number}): not a JSON object; {_MEND}") from None
    fields = Fields(value, path, f"line {number}", _MEND)
    return Record(
        path=fields.text("path"),
        step=fields.count("step"),
        tokens=fields.count("tokens"),
        loss=math.nan if value.get("loss", 0.0) is None else fields.number("loss"),  # null: it was no number
        lr=fields.size("lr"),
        tokens_per_second=fields.size("tokens_per_second") if "tokens_per_second" in fields else None,
        mfu=fields.size("mfu") if "mfu" in fields else None,
    )
