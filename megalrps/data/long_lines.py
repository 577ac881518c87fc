"""Lines of many megabytes, in little more memory than they take.

As a Python string a text may take four bytes a character, and parsing it takes as much again. The long strings of such
a line are therefore taken out, the rest is parsed as ever, and of a long text under a wanted key its UTF-8 bytes are
made, piece by piece.
"""

import re
import secrets
from collections.abc import Sequence
from typing import Any

import orjson

LONG_LINE = 8 << 20
_LONG_STRING = 1 << 16
_PIECE = 1 << 20
_SAFE_WITHIN = 1 << 12
_SAFE = re.compile(rb"[ \xc0-\xf7]")
"""Bytes before which JSON's strings can be cut: none stands inside of an escape, a pair of them, or a character."""


class OtherwiseError(Exception):
    """The line is to be parsed, or judged, in the usual way."""


def parse_long_line(line: bytes | bytearray, keys: Sequence[str]) -> dict[str, Any]:
    """The object of a line of JSON, with a bytearray of UTF-8 in the place of long texts under ``keys``.

    Other long strings are checked, and left out. OtherwiseError where anything is unusual.
    """
    mark = secrets.token_hex(16)  # nothing that a line could hold, however it is spelled
    rest, strings = _without_long_strings(line, mark)
    try:
        value = orjson.loads(rest)
    except ValueError:
        raise OtherwiseError from None
    if not isinstance(value, dict) or not all(isinstance(value.get(key), str) for key in keys):
        raise OtherwiseError
    wanted = {value[key]: key for key in keys if value[key].startswith(mark)}
    for number, (start, stop) in enumerate(strings):
        text = _decoded(line, start, stop, keep=f"{mark}{number}" in wanted)
        if text is not None:
            value[wanted[f"{mark}{number}"]] = text
    return value


def _without_long_strings(line: bytes | bytearray, mark: str) -> tuple[bytes, list[tuple[int, int]]]:
    """The line with marks for its long strings, and where the content of each of these begins and ends."""
    rest = bytearray()
    strings: list[tuple[int, int]] = []
    behind = 0
    while (start := line.find(b'"', behind)) >= 0:
        stop = _end_of_string(line, start + 1)
        rest += line[behind : start + 1]
        if stop - start > _LONG_STRING:
            rest += f"{mark}{len(strings)}".encode()
            strings.append((start + 1, stop))
        else:
            rest += line[start + 1 : stop]
        rest += b'"'
        behind = stop + 1
    rest += line[behind:]
    return bytes(rest), strings


def _end_of_string(line: bytes | bytearray, start: int) -> int:
    """Where the quote stands that ends the string whose content begins at ``start``."""
    quote = line.find(b'"', start)
    while quote >= 0:
        before = quote
        while before > start and line[before - 1] == 0x5C:  # a backslash, maybe itself behind one
            before -= 1
        if (quote - before) % 2 == 0:
            return quote
        quote = line.find(b'"', quote + 1)
    raise OtherwiseError


def _decoded(line: bytes | bytearray, start: int, stop: int, *, keep: bool) -> bytearray | None:
    """The UTF-8 of a string's content; None, once it is checked, unless it is to be kept."""
    text = bytearray()
    while start < stop:
        cut = _cut(line, start, stop)
        try:
            piece = orjson.loads(b'"%s"' % line[start:cut])
        except ValueError:
            raise OtherwiseError from None
        if keep:
            text += piece.encode()
        start = cut
    return text if keep else None


def _cut(line: bytes | bytearray, start: int, stop: int) -> int:
    """Where a piece that begins at ``start`` may end."""
    cut = start + _PIECE
    while cut < stop:
        found = [match.start() for match in _SAFE.finditer(line, cut - _SAFE_WITHIN, cut)]
        if found:
            return found[-1]
        cut += _SAFE_WITHIN
    return stop
