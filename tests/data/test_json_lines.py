"""Lines and texts: whatever the blocks, and exactly what the standard library's JSON takes."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalrps.data.json_lines import parse_lines, split_lines

SCRAPS = [
    *(b'{"text": "a"}', b'{"text"', b': "b"', b"}", b"{", b"[", b"]", b",", b":", b'"', b"\\", b"\\ud83d", b"\\udc00"),
    *(
        b"\\u0041",
        b"\xed\xa0\x80",
        b"\xff",
        b"\xc3\xa9",
        b"\xf0\x9f\xa6\x8a",
        b"\x00",
        b"\x0b",
        b"\x1f",
        b"\x7f",
        b"\r",
    ),
    *(b"NaN", b"-Infinity", b"1" * 30, b"1" * 5000, b"1e999", b"-0", b"01", b"1.", b"null", b"true", b'"text"', b" "),
    *(b"\xef\xbb\xbf", b'"date": "2020"', b'"text": "c", "text": 5', b'"text": 5, "text": "d"', b"[" * 900, b"]" * 900),
]

LINES = [
    *[b'{"text": "some \\u00e9 text", "n": [1, 2.5, null]}'] * 3,
    *(b'{"text": 5}', b'{"text": null}', b'{"text": ["a"]}', b'["text"]', b'"text"', b'{"n": 1}'),
]


def by_the_standard_library(line: bytes) -> str | None:
    """The text of a line, as json.loads alone would have it; None for a bad one."""
    try:
        text = json.loads(line.decode())["text"]
        text.encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return str(text)


def test_no_line_is_judged_differently_from_the_standard_library() -> None:
    chance = random.Random(6)
    for number in range(20_000):
        line = bytearray(chance.choice(LINES))
        for _ in range(chance.randrange(4)):
            place = chance.randrange(len(line) + 1)
            line[place : place + chance.randrange(3)] = chance.choice(SCRAPS)
        if b"\n" in line or not line.strip():
            continue
        expected = by_the_standard_library(bytes(line))
        documents = parse_lines([bytes(line)], ["text"])
        assert documents.texts == [[] if expected is None else [expected]], (number, line)
        assert len(documents.bad) == (expected is None), (number, line)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.binary(max_size=12)), st.integers(1, 9), st.booleans())
def test_lines_are_the_same_whatever_the_blocks(lines: list[bytes], size: int, ends: bool) -> None:
    content = b"\n".join(lines) + b"\n" * ends
    blocks = iter([content[start : start + size] for start in range(0, len(content), size)])
    found = [bytes(line) for some in split_lines(blocks, at_file_start=False) for line in some]
    assert found == content.removesuffix(b"\n").split(b"\n") or not content.removesuffix(b"\n")
    assert b"".join(found) == content.replace(b"\n", b"")


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_a_byte_order_mark_begins_a_file_only(size: int) -> None:
    content = b"\xef\xbb\xbfa\n\xef\xbb\xbfb"
    blocks = [content[start : start + size] for start in range(0, len(content), size)]
    assert [bytes(x) for some in split_lines(iter(blocks)) for x in some] == [b"a", b"\xef\xbb\xbfb"]
    found = [bytes(x) for some in split_lines(iter(blocks), at_file_start=False) for x in some]
    assert found == [b"\xef\xbb\xbfa", b"\xef\xbb\xbfb"]


def test_one_bad_line_among_good_ones_is_told_with_its_number() -> None:
    lines = [b'{"text": "a", "date": 1}', b" ", b'{"text": NaN}', b"", b'{"text": "b", "x": NaN}']
    documents = parse_lines([*lines], ["text"], "date")
    assert (documents.texts, list(documents.numbers), documents.lines) == ([["a", "b"]], [1, 5], 5)
    assert [(bad.number, bad.kind, bad.detail) for bad in documents.bad] == [(3, "'text' is not a text", "float")]
    assert documents.dates == [1, None]
