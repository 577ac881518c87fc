"""Reading text: JSON lines, plain or compressed, from any number of files, in constant memory.

A file ending in ``.gz`` or ``.zst`` is decompressed as it is read; every other one is plain. Lines of white space are
no documents. A line that cannot be used (not UTF-8, not JSON, without the key, without text under it) is *bad*: an
InputError with its place, or counted and skipped (see :class:`BadLines`). A damaged file is always an InputError.
"""

import codecs
import glob
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from megalrps.errors import InputError

OnBadLine = Literal["error", "skip"]

TEXT_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
"""Names of the files taken from a folder."""

_READ_BYTES = 1 << 18
_BATCH_BYTES = 1 << 20
_BATCH_LINES = 1024


@dataclass(frozen=True)
class LineBatch:
    """Consecutive lines of one file: the unit of work that travels to a worker."""

    path: str
    first_line: int
    """Number of the first line, from 1."""
    lines: tuple[bytes, ...]
    bytes_read: int
    """Bytes of all input files (as stored, compressed or not) read up to the end of this batch."""


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

    def add(self, line: BadLine) -> None:
        """Count ``line``, or raise InputError with its place, as ``on_bad_line`` says."""
        if self.on_bad_line == "error":
            raise InputError(f"{line}; mend the line, or pass --on-bad-line skip to leave such lines out")
        self.counts[line.kind] += 1
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
    """The files that ``patterns`` (files, folders of JSON lines, globs) stand for, each pattern's in sorted order.

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
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name.endswith(TEXT_SUFFIXES))


def read_batches(paths: Sequence[Path]) -> Iterator[LineBatch]:
    """All lines of ``paths`` in order, in batches of about a megabyte; a batch never crosses files."""
    finished_bytes = 0
    for path in paths:
        with _opened(path) as file:
            for first_line, lines in _batched(_lines(_blocks(file, path))):
                yield LineBatch(str(path), first_line, lines, finished_bytes + file.tell())
            finished_bytes += file.tell()


def parse_batch(batch: LineBatch, keys: Sequence[str]) -> tuple[list[Record], list[BadLine]]:
    """The documents of ``batch`` in order, and its bad lines; lines of white space are neither."""
    records: list[Record] = []
    bad: list[BadLine] = []
    for number, line in enumerate(batch.lines, batch.first_line):
        if not line or line.isspace():
            continue
        try:
            records.append(Record(batch.path, number, _parse_line(line, keys)))
        except _UnusableLineError as error:
            bad.append(BadLine(batch.path, number, error.kind, error.detail))
    return records, bad


def read_records(paths: Sequence[Path], keys: Sequence[str], bad_lines: BadLines) -> Iterator[Record]:
    """The documents of ``paths`` in order, one at a time; bad lines go to ``bad_lines``."""
    for batch in read_batches(paths):
        records, bad = parse_batch(batch, keys)
        if bad and bad_lines.on_bad_line == "error":
            # The documents before the first bad line are still handed out: the message comes at its place.
            records = [record for record in records if record.number < bad[0].number]
        yield from records
        for line in bad:
            bad_lines.add(line)


class _UnusableLineError(Exception):
    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind)
        self.kind = kind
        self.detail = detail


def _place(line: BadLine) -> str:
    return f"{line.path}:{line.number}"


def _expand(pattern: str, flag: str) -> list[Path]:
    path = Path(pattern)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = text_files(path)
        if not found:
            raise InputError(f"{flag} {pattern}: the folder holds no file named *{', *'.join(TEXT_SUFFIXES)}")
        return found
    found = [Path(match) for match in sorted(glob.glob(pattern, recursive=True)) if Path(match).is_file()]  # noqa: PTH207 (a pattern may be absolute)
    if not found:
        raise InputError(f"{flag} {pattern}: no such file, and no file matches it; check the path")
    return found


def _opened(path: Path) -> IO[bytes]:
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check --input") from error


def _blocks(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """The decompressed content of ``file`` in blocks; InputError where the compression says that it is damaged."""
    try:
        if path.suffix == ".gz":
            with gzip.open(file) as content:
                yield from iter(lambda: content.read(_READ_BYTES), b"")
        elif path.suffix == ".zst":
            yield from _zstandard_blocks(file, path)
        else:
            yield from iter(lambda: file.read(_READ_BYTES), b"")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: cut short or damaged ({error}); make or copy the file again") from None


def _zstandard_blocks(file: IO[bytes], path: Path) -> Iterator[bytes]:
    # The library's stream reader takes a file that ends in the middle of a frame for a whole one; the frame's own
    # end marker (`eof`) does not.
    import zstandard

    frame = None
    try:
        while block := file.read(_READ_BYTES):
            while block:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(block)
                block = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise InputError(f"{path}: damaged, or not zstandard ({error}); make or copy the file again") from None
    if frame is not None:
        raise InputError(f"{path}: cut short: its last zstandard frame has no end; make or copy the file again")


def _lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines without their newline; the last one may lack it."""
    started: list[bytes] = []  # parts of a line longer than a block, joined once: huge lines stay linear
    for block in blocks:
        first, *others = block.split(b"\n")
        started.append(first)
        if others:
            yield b"".join(started)
            yield from others[:-1]
            started = [others[-1]]
    if last := b"".join(started):
        yield last


def _without_mark(lines: Iterator[bytes]) -> Iterator[bytes]:
    """The lines, the first one without the byte order mark that some editors put there."""
    if (first := next(lines, None)) is not None:
        yield first.removeprefix(codecs.BOM_UTF8)
    yield from lines


def _batched(lines: Iterator[bytes]) -> Iterator[tuple[int, tuple[bytes, ...]]]:
    batch: list[bytes] = []
    size = 0
    first_line = 1
    for line in _without_mark(lines):
        batch.append(line)
        size += len(line)
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_LINES:
            yield first_line, tuple(batch)
            first_line += len(batch)
            batch, size = [], 0
    if batch:
        yield first_line, tuple(batch)


def _parse_line(line: bytes, keys: Sequence[str]) -> tuple[str, ...]:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _UnusableLineError("not UTF-8", f"byte {error.start + 1}") from None
    except (ValueError, RecursionError) as error:
        raise _UnusableLineError("not JSON", str(error)) from None
    if not isinstance(value, dict):
        raise _UnusableLineError("not a JSON object")
    return tuple(_text_under(value, key) for key in keys)


def _text_under(value: dict[str, object], key: str) -> str:
    if key not in value:
        raise _UnusableLineError(f"no key {key!r}", f"it has {', '.join(list(value)[:8]) or 'none'}")
    text = value[key]
    if not isinstance(text, str):
        raise _UnusableLineError(f"{key!r} is not a text", type(text).__name__)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON can spell one half of a surrogate pair, which is no character
            raise _UnusableLineError(f"{key!r} holds a lone surrogate") from None
    return text
