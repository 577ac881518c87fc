"""The C++ encoder of scored pieces: merges, words, bounded memory, threads and arguments.

That it is SentencePiece's equal is the matter of tests/faults/test_tokenizer_identity.py.
"""

import itertools
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tokenizer_models

native = pytest.importorskip("megalrps._native", reason="megalrps._native is not built here")

FIRST_PIECE = 256


def make(pieces: dict[str, float], prefix: bool = False, memory_bytes: int = 1 << 20) -> Any:
    """An encoder whose ids are those of the bytes, then those of ``pieces`` in order."""
    ids = np.arange(FIRST_PIECE, FIRST_PIECE + len(pieces), dtype=np.int32)
    scores = np.array(list(pieces.values()), np.float32)
    byte_ids = np.arange(FIRST_PIECE, dtype=np.int32)
    return native.WordPieces(list(pieces), scores, ids, byte_ids, prefix=prefix, memory_bytes=memory_bytes)


def spelled(pieces: dict[str, float], text: str, **settings: Any) -> list[str]:
    """The pieces of ``text``; bytes as numbers."""
    tokens, lengths = make(pieces, **settings).encode([text])
    assert lengths.tolist() == [tokens.size]
    return [list(pieces)[i - FIRST_PIECE] if i >= FIRST_PIECE else str(i) for i in tokens.tolist()]


def slowly(pieces: dict[str, float], text: str) -> list[str]:
    """The same by the definition: look at all pairs, merge the best one, from the left."""
    parts = list(text.replace(" ", "\u2581"))
    while True:
        found = [
            (-pieces[left + right], place)
            for place, (left, right) in enumerate(itertools.pairwise(parts))
            if left + right in pieces
        ]
        if not found:
            return [name for part in parts for name in ([part] if part in pieces else map(str, part.encode()))]
        place = min(found)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def test_the_highest_score_merges_first_and_of_equal_ones_the_leftmost() -> None:
    letters = {"a": -9.0, "b": -9.0, "c": -9.0}
    assert spelled(letters | {"ab": -2.0, "bc": -1.0}, "abc") == ["a", "bc"]
    assert spelled(letters | {"ab": -1.0, "bc": -1.0}, "abc") == ["ab", "c"]
    assert spelled(letters | {"aa": -1.0}, "aaaaa") == ["aa", "aa", "a"]
    assert spelled(letters | {"abc": 5.0}, "abc") == ["a", "b", "c"]  # no two pieces make it


def test_what_no_piece_holds_becomes_its_bytes() -> None:
    assert spelled({"a": 0.0}, "aé") == ["a", "195", "169"]
    assert spelled({"a": 0.0}, " a\u2581") == ["226", "150", "129", "a", "226", "150", "129"]  # white space is U+2581
    assert spelled({"xy": 0.0}, "xyx") == ["xy", "120"]  # a piece of characters that are none
    assert spelled({"a": 0.0}, "\0\x7f\U0010ffff") == ["0", "127", "244", "143", "191", "191"]


def test_a_space_goes_before_every_text_that_is_not_empty() -> None:
    pieces = {"\u2581": -1.0, "a": -2.0, "\u2581a": 0.0}
    assert spelled(pieces, "a a", prefix=True) == ["\u2581a", "\u2581a"]
    assert spelled(pieces, "x", prefix=True) == ["\u2581", "120"]
    assert spelled(pieces, "", prefix=True) == []
    assert make(pieces, prefix=True).encode(["", "a", ""])[1].tolist() == [0, 1, 0]
    assert [part.tolist() for part in make(pieces).encode([])] == [[], []]


@pytest.mark.parametrize("memory_bytes", [0, 1000, 100_000])
def test_random_pieces_merge_as_by_the_definition_whatever_the_memory(memory_bytes: int) -> None:
    for number in range(60):
        chance = random.Random(f"words {number}")
        pieces = dict(tokenizer_models.random_pieces(chance))
        alphabet = "".join(pieces).replace("\u2581", " ") + "x\U0001f642"
        words = make(pieces, memory_bytes=memory_bytes)
        texts = ["".join(chance.choices(alphabet, k=chance.choice((2, 9, 20, 90)))) for _ in range(6)]
        for again in range(2):  # the second time from memory
            tokens, lengths = words.encode(texts)
            ends = np.cumsum(lengths)
            for text, end, length in zip(texts, ends, lengths, strict=True):
                names = [list(pieces)[i - 256] if i >= 256 else str(i) for i in tokens[end - length : end].tolist()]
                assert names == slowly(pieces, text), f"model {number}, time {again}: {pieces} {text!r}"


def test_a_full_memory_and_several_threads_change_nothing() -> None:
    chance = random.Random(4)
    letters = {letter: -float(place) for place, letter in enumerate("abcdefgh ".replace(" ", "\u2581"))}
    pieces = letters | {a + b: 10.0 + ord(a) - ord(b) for a in letters for b in letters if b != "\u2581"}
    texts = ["".join(chance.choices("abcdefgh  ", k=400)) for _ in range(200)]
    expected = make(pieces, memory_bytes=1 << 24).encode(texts)[0]
    small = make(pieces, memory_bytes=4096)
    with ThreadPoolExecutor(4) as pool:
        for tokens, _ in pool.map(small.encode, [texts] * 8):
            assert np.array_equal(tokens, expected)


def test_a_text_is_the_same_whatever_stands_beside_it() -> None:
    """A word that begins near the end of its text is read otherwise than one with much behind it."""
    pieces = {"a": -3.0, "b": -4.0, "\u2581": -5.0, "ab": -1.0, "\u2581a": -2.0, "abab": 0.0}
    words = make(pieces)
    whole = words.encode([" abab" * 9])[0].tolist()
    for length in range(1, 45):
        tokens = words.encode([(" abab" * 9)[:length]])[0].tolist()
        assert tokens == make(pieces, memory_bytes=0).encode([(" abab" * 9)[:length]])[0].tolist()
        if length % 5 == 0:
            assert tokens == whole[: len(tokens)]


@pytest.mark.parametrize(
    "arguments",
    [
        {"texts": ["a", "a"]},
        {"texts": ["a", ""]},
        {"texts": ["a"]},
        {"scores": np.array([0.0, np.nan], np.float32)},
        {"ids": np.array([1, -1], np.int32)},
        {"byte_ids": np.zeros(255, np.int32)},
        {"texts": ["a", "\ud800"]},
        {"texts": ["a", b"b"]},
        {"memory_bytes": -1},
    ],
)
def test_what_is_no_vocabulary_is_refused(arguments: dict[str, Any]) -> None:
    sound: dict[str, Any] = {
        "texts": ["a", "b"],
        "scores": np.zeros(2, np.float32),
        "ids": np.arange(2, dtype=np.int32),
        "byte_ids": np.zeros(256, np.int32),
        "prefix": True,
        "memory_bytes": 0,
    }
    native.WordPieces(**sound)
    with pytest.raises((ValueError, TypeError)):
        native.WordPieces(**sound | arguments)


def test_what_is_no_text_is_refused_and_spoils_nothing() -> None:
    words = make({"a": 0.0})
    for texts in ([b"a"], ["a", None], 3, ["a", "\ud800"]):
        with pytest.raises((TypeError, UnicodeEncodeError)):
            words.encode(texts)
    assert words.encode(iter(["a", "a"]))[0].tolist() == [256, 256]
