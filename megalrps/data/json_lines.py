"""JSON lines: bytes into lines, lines into texts, and what is wrong with those that are none.

Lines are parsed by orjson, several at a time. Where it refuses one, or finds no text under a key, the standard library
judges that line again: it alone says what is bad, and why. (It takes more: NaN, halves of surrogate pairs.) Lines of
many megabytes are the business of :mod:`megalrps.data.long_lines`.
"""

import codecs
import contextlib
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import orjson

from megalrps.data.long_lines import LONG_LINE, OtherwiseError, parse_long_line
from megalrps.errors import InputError

BLOCK_BYTES = 1 << 19
"""What is read, split and parsed at a time: more leaves the processor's caches and costs twice the time."""
_ZSTANDARD_BYTES = 1 << 15
"""Of a zstandard file at a time: they may well become a hundred times as many."""


Text = str | bytearray
"""A text, or of a very long one its UTF-8: as a string it may take four times as much."""


@dataclass(frozen=True)
class BadDocument:
    """A line or row that holds no usable text."""

    number: int
    """Its number among the lines read with it, from 1."""
    kind: str
    """What is wrong, in words that are the same for all such lines."""
    detail: str = ""


@dataclass
class Documents:
    """Consecutive documents."""

    texts: list[list[Text]]
    """The texts under each key asked for, in order."""
    numbers: Sequence[int]
    """Number of the line or row of each document among those read with it, from 1."""
    dates: list[Any]
    """What stands under the date key of each document, None where nothing does; empty without a date key."""
    bad: list[BadDocument]
    lines: int
    """Lines or rows, blank ones included."""


class UnusableError(Exception):
    """What a line or row cannot be used for."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind)
        self.kind = kind
        self.detail = detail


def parse_lines(lines: list[bytes | bytearray], keys: Sequence[str], date_key: str | None = None) -> Documents:
    """The documents of ``lines``, which is emptied: a line of 100 MB is not kept while its text is tokenized."""
    count = len(lines)
    if any(len(line) >= LONG_LINE for line in lines):
        return _parse_singly(lines, keys, date_key)
    try:
        values = [orjson.loads(line) for line in lines]
        texts = [[value[key] for value in values] for key in keys]
        if all(set(map(type, each)) <= {str} for each in texts):
            lines.clear()
            dates = [value.get(date_key) for value in values] if date_key is not None else []
            return Documents(texts, range(1, count + 1), dates, [], count)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass  # judged one by one
    return _parse_singly(lines, keys, date_key)


def _parse_singly(lines: list[bytes | bytearray], keys: Sequence[str], date_key: str | None) -> Documents:
    texts: list[list[Text]] = [[] for _ in keys]
    numbers: list[int] = []
    dates: list[Any] = []
    bad: list[BadDocument] = []
    count = len(lines)
    lines.reverse()
    for number in range(1, count + 1):
        line = lines.pop()  # and gone
        if not line or line.isspace():
            continue
        try:
            value = _parse_line(line, keys)
            found = [text_of(value, key) for key in keys]
        except UnusableError as error:
            bad.append(BadDocument(number, error.kind, error.detail))
            continue
        for each, text in zip(texts, found, strict=True):
            each.append(text)
        numbers.append(number)
        if date_key is not None:
            dates.append(value.get(date_key))
    return Documents(texts, numbers, dates, bad, count)


def _parse_line(line: bytes | bytearray, keys: Sequence[str]) -> dict[str, Any]:
    if len(line) >= LONG_LINE:
        with contextlib.suppress(OtherwiseError):
            return parse_long_line(line, keys)
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UnusableError("not UTF-8", f"byte {error.start + 1}") from None
    except (ValueError, RecursionError) as error:
        raise UnusableError("not JSON", str(error)) from None
    if not isinstance(value, dict):
        raise UnusableError("not a JSON object")
    return value


def text_of(value: dict[str, Any], key: str) -> Text:
    """The text under ``key``, or UnusableError."""
    if key not in value:
        raise UnusableError(f"no key {key!r}", f"it has {', '.join(list(value)[:8]) or 'none'}")
    text = value[key]
    if isinstance(text, bytearray):
        return text
    if not isinstance(text, str):
        raise UnusableError(f"{key!r} is not a text", type(text).__name__)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON can spell one half of a surrogate pair, which is no character
            raise UnusableError(f"{key!r} holds a lone surrogate") from None
    return text


def split_lines(blocks: Iterator[bytes], *, at_file_start: bool = True) -> Iterator[list[bytes | bytearray]]:
    """The lines of ``blocks`` without their newlines, a list for about each block; the last one may lack its newline.

    A byte order mark at the start of a file, which some editors put there, is no part of its first line.
    """
    started = bytearray()  # a line longer than a block grows in place: huge lines stay linear, and are held once
    for block in blocks:
        lines: list[bytes | bytearray] = [*block.split(b"\n")]
        tail = lines.pop()
        if lines:
            if started:
                started += lines[0]
                lines[0] = started
                started = bytearray()
            if at_file_start:
                lines[0], at_file_start = _without_mark(lines[0]), False
            yield lines
        started += tail
    if started:
        last = [_without_mark(started) if at_file_start else started]
        del started
        yield last


def _without_mark(line: bytes | bytearray) -> bytes | bytearray:
    return line[len(codecs.BOM_UTF8) :] if line.startswith(codecs.BOM_UTF8) else line


def range_blocks(file: IO[bytes], start: int, stop: int) -> Iterator[bytes]:
    """The bytes, in blocks, of all the lines that begin in ``[start, stop)`` of ``file`` (raw or buffered)."""
    begin = _next_line(file, start)
    file.seek(begin)
    last = b"\n"
    while begin < stop and (block := file.read(min(BLOCK_BYTES, stop - begin))):
        begin += len(block)
        last = block[-1:]
        yield block
    while last != b"\n" and (block := file.read(BLOCK_BYTES)):
        end = block.find(b"\n")
        yield block if end < 0 else block[: end + 1]
        last = b"" if end < 0 else b"\n"


def _next_line(file: IO[bytes], start: int) -> int:
    """Where the first line begins that begins at ``start`` or after it; the end of the file where none does."""
    if start == 0:
        return 0
    file.seek(start - 1)
    position = start - 1
    while block := file.read(BLOCK_BYTES if position >= start else 4096):
        end = block.find(b"\n")
        if end >= 0:
            return position + end + 1
        position += len(block)
    return position


def decompressed_blocks(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """The content of ``file``, decompressed as the name ``path`` says, in blocks; InputError where it is damaged."""
    try:
        if path.suffix == ".gz":
            with gzip.open(file) as content:
                yield from iter(lambda: content.read(BLOCK_BYTES), b"")
        elif path.suffix == ".zst":
            yield from _zstandard_blocks(file, path)
        else:
            yield from iter(lambda: file.read(BLOCK_BYTES), b"")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: cut short or damaged ({error}); make or copy the file again") from None


def _zstandard_blocks(file: IO[bytes], path: Path) -> Iterator[bytes]:
    # The library's stream reader takes a file that ends in the middle of a frame for a whole one; the frame's own
    # end marker (`eof`) does not.
    import zstandard

    frame = None
    try:
        while block := file.read(_ZSTANDARD_BYTES):
            while block:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(block)
                block = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise InputError(f"{path}: damaged, or not zstandard ({error}); make or copy the file again") from None
    if frame is not None:
        raise InputError(f"{path}: cut short: its last zstandard frame has no end; make or copy the file again")
