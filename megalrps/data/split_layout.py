"""Which increment and which part every text goes to: by date and hash, or as the files already say."""

import bisect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megalrps.data.dates import parse_day
from megalrps.data.text import BadLine, BadLines, OnBadLine, OnRead, Record, read_records
from megalrps.data.text_increments import is_held_out
from megalrps.errors import InputError

_SPLIT_NAME = re.compile(r"(?P<name>.+)\.(?P<part>train|val|valid)\.jsonl(?:\.gz|\.zst)?")


@dataclass(frozen=True)
class PlacedText:
    """A text and where it goes."""

    increment: int
    """Ordinal of the increment, oldest 0."""
    held_out: bool
    text: str
    date: str | None


@dataclass(frozen=True)
class SplitLayout:
    """The increments, oldest first, and a pass over all texts that can be made again."""

    names: tuple[str, ...]
    read: Callable[[BadLines, OnRead | None], Iterator[PlacedText]]


def are_split_files(paths: Sequence[Path]) -> bool:
    """Whether all of ``paths`` are called ``NAME.train.jsonl``, ``NAME.val.jsonl`` or ``NAME.valid.jsonl``."""
    return all(_SPLIT_NAME.fullmatch(path.name) for path in paths)


def layout_of_files(paths: Sequence[Path], text_key: str) -> SplitLayout:
    """The increments that ``paths`` are already, in the order of their names; InputError where a part is missing."""
    files: dict[str, dict[bool, Path]] = {}
    for path in paths:
        found = _SPLIT_NAME.fullmatch(path.name)
        assert found is not None, "are_split_files() was not asked"
        parts = files.setdefault(found["name"], {})
        held_out = found["part"] != "train"
        if held_out in parts:
            raise InputError(f"--input: {parts[held_out]} and {path} are the same part of the same increment; name one")
        parts[held_out] = path
    for name, parts in files.items():
        if len(parts) < 2:
            (path,) = parts.values()
            missing = "train" if True in parts else "val"
            raise InputError(f"--input: {path} has no {name}.{missing}.jsonl beside it; add it, or pass --parts")
    names = tuple(sorted(files))

    def read(bad_lines: BadLines, on_read: OnRead | None) -> Iterator[PlacedText]:
        for position, name in enumerate(names):
            # The held-out part first: of a text in both, the deduplication then keeps the one not trained on.
            for held_out in (True, False):
                for record in read_records((files[name][held_out],), (text_key,), bad_lines, on_read):
                    yield PlacedText(position, held_out, record.values[0], None)

    return SplitLayout(names, read)


def layout_by_date(
    paths: Sequence[Path], boundaries: Sequence[str], *, text_key: str, date_key: str, held_out_modulo: int
) -> SplitLayout:
    """Increments that start at the days ``boundaries`` (the first has no start), called inc1, inc2, ...

    One text in ``held_out_modulo`` is held out.
    """
    count = len(boundaries) + 1
    names = tuple(f"inc{number:0{len(str(count))}d}" for number in range(1, count + 1))

    def read(bad_lines: BadLines, on_read: OnRead | None) -> Iterator[PlacedText]:
        for day, record in _dated_records(paths, text_key, date_key, bad_lines, on_read):
            text, written_date = record.values
            position = bisect.bisect_right(boundaries, day)
            yield PlacedText(position, is_held_out(text, held_out_modulo), text, written_date)

    return SplitLayout(names, read)


def equal_boundaries(
    paths: Sequence[Path],
    parts: int,
    *,
    text_key: str,
    date_key: str,
    on_bad_line: OnBadLine,
    on_read: OnRead | None = None,
) -> tuple[str, ...]:
    """The days that cut the text into ``parts`` of about equal bytes; reads all of it once."""
    bytes_by_day: Counter[str] = Counter()
    for day, record in _dated_records(paths, text_key, date_key, BadLines(on_bad_line), on_read):
        text = record.values[0]
        bytes_by_day[day] += len(text) if text.isascii() else len(text.encode())
    if len(bytes_by_day) < parts:
        raise InputError(f"--parts {parts}: the text has only {len(bytes_by_day)} dates; pass fewer parts")
    return _cut(bytes_by_day, parts)


def _cut(bytes_by_day: Mapping[str, int], parts: int) -> tuple[str, ...]:
    """Boundaries after the day that brings the running sum nearest to each k/parts, at least one day a part."""
    days = sorted(bytes_by_day)
    sums = [0]  # bytes before each day
    for day in days:
        sums.append(sums[-1] + bytes_by_day[day])
    boundaries: list[int] = []
    for part in range(1, parts):
        lowest = boundaries[-1] + 1 if boundaries else 1
        highest = len(days) - (parts - part)
        target = sums[-1] * part / parts
        boundaries.append(min(range(lowest, highest + 1), key=lambda position: abs(sums[position] - target)))
    return tuple(days[position] for position in boundaries)


def _dated_records(
    paths: Sequence[Path], text_key: str, date_key: str, bad_lines: BadLines, on_read: OnRead | None
) -> Iterator[tuple[str, Record]]:
    """Each document with its day; its values are text and date as written. One without a date is a bad line."""
    for record in read_records(paths, (text_key, date_key), bad_lines, on_read):
        day = parse_day(record.values[1])
        if day is None:
            kind = f"{date_key!r} is not a date"
            bad_lines.add(BadLine(record.path, record.number, kind, repr(record.values[1])[:40]))
        else:
            yield day, record
