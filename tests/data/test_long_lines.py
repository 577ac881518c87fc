"""Very long lines are what short ones are, in less memory: the same texts, the same faults, the same tokens."""

import json
import random
import tracemalloc

import pytest

from megalrps.data import encode, json_lines, long_lines
from megalrps.data.encode import pieces_of
from megalrps.data.json_lines import Documents, parse_lines
from megalrps.data.long_lines import OtherwiseError, parse_long_line

STRINGS = ["", "short", 'quotes " and \\ \\\\" of all kinds', "日本語" * 40, "🦊 e\u0301 \u2028\n\t\0" * 30, "\\" * 99]


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are long from 64 bytes on, strings from 16, and pieces have 24."""
    monkeypatch.setattr(json_lines, "LONG_LINE", 64)
    monkeypatch.setattr(long_lines, "_LONG_STRING", 16)
    monkeypatch.setattr(long_lines, "_PIECE", 24)
    monkeypatch.setattr(long_lines, "_SAFE_WITHIN", 5)


def told(documents: Documents) -> tuple[list[list[str]], list[tuple[int, str, str]], list[object], int]:
    texts = [[text if isinstance(text, str) else text.decode() for text in each] for each in documents.texts]
    bad = [(each.number, each.kind, each.detail) for each in documents.bad]
    return texts, bad, documents.dates, documents.lines


def random_line(chance: random.Random) -> bytes:
    keys = chance.sample(["text", "title", "date", "x" * 40, 'a "key"'], 4)
    value = {key: chance.choice([*STRINGS, "".join(chance.choices(STRINGS, k=3)), 5, None, ["x" * 50]]) for key in keys}
    line = bytearray(json.dumps(value, ensure_ascii=chance.random() < 0.5).encode())
    if chance.random() < 0.4:
        place = chance.randrange(len(line))
        line[place : place + 1] = chance.choice([b"", b'"', b"\\", b"\xff", b"\x01", b"\\ud83d", b"\\u12", b"\xe6\x97"])
    return bytes(line)


def test_a_long_line_is_judged_and_read_as_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(6)
    lines = [random_line(chance) for _ in range(4000)]
    usual = [told(parse_lines([line], ["text", "title"], "date")) for line in lines]
    taken = 0
    for name, value in {"_LONG_STRING": 16, "_PIECE": 24, "_SAFE_WITHIN": 5}.items():
        monkeypatch.setattr(long_lines, name, value)
    monkeypatch.setattr(json_lines, "LONG_LINE", 64)
    for line, expected in zip(lines, usual, strict=True):
        documents = parse_lines([line], ["text", "title"], "date")
        taken += any(isinstance(text, bytearray) for each in documents.texts for text in each)
        texts, bad, dates, count = told(documents)
        assert (texts, bad, count) == (expected[0], expected[1], expected[3]), line
        assert dates == expected[2] or all(len(str(date)) > 15 for date in expected[2]), line
    assert taken > 300


@pytest.mark.usefixtures("small_limits")
def test_long_strings_are_taken_out_and_others_left() -> None:
    value = {"text": "x y" * 20, "other": "y" * 90, "n": 5}
    found = parse_long_line(json.dumps(value).encode(), ["text"])
    assert (found["text"], found["n"]) == (b"x y" * 20, 5)
    assert len(found["other"]) < 80
    assert parse_long_line(json.dumps({"text": "x" * 90 + "\\"}).encode(), ["text"])["text"] == b"x" * 90 + b"\\"
    for bad in (b'{"text": "' + b"x" * 90, b'{"text": "' + b"x" * 90 + b'\\ud83d"}', b'["' + b"x" * 90 + b'"]'):
        with pytest.raises(OtherwiseError):
            parse_long_line(bad, ["text"])


@pytest.mark.parametrize("how", ["keep", "drop"])
def test_pieces_end_where_a_space_follows_a_letter(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(encode, "_PIECE_BYTES", 10)
    text = "some words, 5  spaces é 日本 and a  tail that is long enough "
    pieces = list(pieces_of(bytearray(text.encode()), how))
    assert len(pieces) > 2
    assert ("" if how == "keep" else " ").join(pieces) == text
    assert all(piece[-1].isascii() and piece[-1].isalpha() for piece in pieces[:-1]) and len(pieces[-1]) >= 9
    assert list(pieces_of(bytearray(text.encode()), None)) == list(pieces_of(text, how)) == [text]


def test_the_memory_of_a_long_line_is_not_a_multiple_of_it() -> None:
    line = bytearray(json.dumps({"text": "some words 🦊\n" * 700_000}, ensure_ascii=False).encode())
    tracemalloc.start()
    lines: list[bytes | bytearray] = [line]
    (texts,) = parse_lines(lines, ["text"]).texts
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lines == [] and len(texts[0]) == len(line) - len('{"text": ""}') - 700_000  # the line feeds' backslashes
    assert peak < 3 * len(line)  # the string alone would take four times as much
