"""Text from any number of files, in constant memory: JSON lines, parquet, Hugging Face datasets.

A file ending in ``.gz`` or ``.zst`` is decompressed as it is read, one in ``.parquet`` or ``.arrow`` is a table, every
other one is plain JSON lines. Lines of white space are no documents. A line or row that cannot be used (not UTF-8, not
JSON, without the key, without text under it) is *bad*: an InputError with its place, or counted and skipped (see
:class:`BadLines`). A damaged file is always an InputError.
"""

import glob
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from megalrps.data.columnar import COLUMNAR_SUFFIXES, count_groups, dataset_files, is_columnar, read_groups
from megalrps.data.json_lines import Documents, decompressed_blocks, parse_lines, split_lines
from megalrps.errors import InputError

OnBadLine = Literal["error", "skip"]

TEXT_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
"""Names of the files of JSON lines in a folder."""
OnRead = Callable[[int, int], None]
"""Hears now and then how many documents, and bytes of the files as stored, have been read since the last time."""
COMPRESSED_SUFFIXES = (".gz", ".zst")

_FOLDER_SUFFIXES = (*TEXT_SUFFIXES, *COLUMNAR_SUFFIXES)


@dataclass(frozen=True)
class BadLine:
    """A line that holds no usable text."""

    path: str
    number: int
    kind: str
    """What is wrong, in words that are the same for all such lines."""
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.path}:{self.number}: {self.kind}" + (f" ({self.detail})" if self.detail else "")


@dataclass
class BadLines:
    """What to do with bad lines, and the tally of those that were skipped."""

    on_bad_line: OnBadLine
    counts: Counter[str] = field(default_factory=Counter)
    """Skipped lines by kind."""
    first: dict[str, BadLine] = field(default_factory=dict)
    """The first skipped line of each kind."""

    def add(self, line: BadLine, count: int = 1) -> None:
        """Count ``line``, the first of ``count``, or raise InputError with its place, as ``on_bad_line`` says."""
        if self.on_bad_line == "error":
            raise InputError(f"{line}; mend the line, or pass --on-bad-line skip to leave such lines out")
        self.counts[line.kind] += count
        self.first.setdefault(line.kind, line)

    def describe(self) -> str:
        """The tally in one line."""
        parts = [f"{count} x {kind} (first: {_place(self.first[kind])})" for kind, count in self.counts.most_common()]
        return f"{self.counts.total()} bad lines skipped: {', '.join(parts)}" if parts else "no bad lines"


@dataclass(frozen=True)
class Record:
    """One document: its values under the keys asked for, and where it stands."""

    path: str
    number: int
    values: tuple[str, ...]


def expand_inputs(patterns: Sequence[str], flag: str = "--input") -> tuple[Path, ...]:
    """The files that ``patterns`` (files, folders of them, globs) stand for, each pattern's in sorted order.

    A folder that Hugging Face's ``Dataset.save_to_disk`` wrote stands for its Arrow files, in their own order.
    Raises InputError, naming ``flag``, where nothing matches or a file is named twice (it would count twice).
    """
    if not patterns:
        raise InputError(f"{flag} is empty: name at least one file, folder or pattern")
    files = [path for pattern in patterns for path in _expand(pattern, flag)]
    resolved: set[Path] = set()
    for path in files:
        if path.resolve() in resolved:
            raise InputError(f"{flag}: {path} is named twice; name each file once")
        resolved.add(path.resolve())
    return tuple(files)


def text_files(folder: Path) -> list[Path]:
    """The JSON-lines files directly inside ``folder``, sorted by name."""
    return _files(folder, TEXT_SUFFIXES)


def open_input(path: Path | str) -> IO[bytes]:
    """The file ``path``, unbuffered; InputError where it cannot be read."""
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check --input") from error


def read_records(
    paths: Sequence[Path],
    keys: Sequence[str],
    bad_lines: BadLines,
    on_read: OnRead | None = None,
) -> Iterator[Record]:
    """The documents of ``paths`` in order, one at a time; bad lines go to ``bad_lines``.

    ``on_read`` hears how far it is (see :data:`OnRead`).
    """
    for path in paths:
        before, behind = 0, 0
        for documents, at in _documents_of(path, keys):
            yield from _records(documents, path, before, bad_lines.on_bad_line)
            for bad in documents.bad:
                bad_lines.add(BadLine(str(path), before + bad.number, bad.kind, bad.detail))
            before += documents.lines
            if on_read is not None:
                on_read(len(documents.numbers), at - behind)
            behind = at


def _records(documents: Documents, path: Path, before: int, on_bad_line: OnBadLine) -> Iterator[Record]:
    # The documents before the first bad line are still handed out where it is an error: it comes at its place.
    stop = documents.bad[0].number if documents.bad and on_bad_line == "error" else documents.lines + 1
    for number, *values in zip(documents.numbers, *documents.texts, strict=True):
        if number < stop:
            texts = tuple(value if isinstance(value, str) else value.decode() for value in values)
            yield Record(str(path), before + number, texts)


def _documents_of(path: Path, keys: Sequence[str]) -> Iterator[tuple[Documents, int]]:
    """The documents of one file, and how many of its bytes are read by then."""
    if is_columnar(path):
        size, groups = path.stat().st_size, count_groups(path)
        for group in range(groups):
            for documents in read_groups(path, group, group + 1, keys):
                yield documents, size * (group + 1) // groups
        return
    with open_input(path) as file:
        for lines in split_lines(decompressed_blocks(file, path)):
            yield parse_lines(lines, keys), file.tell()


def _place(line: BadLine) -> str:
    return f"{line.path}:{line.number}"


def _expand(pattern: str, flag: str) -> list[Path]:
    path = Path(pattern)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = dataset_files(path, flag) or _files(path, _FOLDER_SUFFIXES)
        if not found:
            raise InputError(f"{flag} {pattern}: the folder holds no file named *{', *'.join(_FOLDER_SUFFIXES)}")
        return found
    found = [Path(match) for match in sorted(glob.glob(pattern, recursive=True)) if Path(match).is_file()]  # noqa: PTH207 (a pattern may be absolute)
    if not found:
        raise InputError(f"{flag} {pattern}: no such file, and no file matches it; check the path")
    return found


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name.endswith(suffixes))
