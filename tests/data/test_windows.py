"""Windows and the documents in them: the same numbers from numpy, from C++ and from their definition."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalrps.data.windows import (
    IMPLEMENTATION,
    TOKEN_TYPES,
    IndexDamagedError,
    TokenOutsideError,
    document_starts,
    gather,
)
from megalrps.errors import InputError

IMPLEMENTATIONS = ["numpy", "native"] if IMPLEMENTATION == "native" else ["numpy"]
# Tokens of each sequence of each document: empty documents at both ends and in runs, documents of several sequences
# (some of them empty), one that is far larger than any window.
DATASETS = {
    "one token": [[1]],
    "even": [[4], [4], [4], [4]],
    "mixed": [[], [], [3], [], [2, 0, 5], [], [], [], [], [1], [0], [0, 0], [7, 1], [], [1], [1], []],
    "huge": [[2], [300], [], [3]],
    "one document": [[5, 5, 5, 5, 3]],
    "no sequence": [[], []],
}


def unaligned(values):
    """The same numbers one byte off, as an index in a file has them."""
    return np.frombuffer(b"\0" + values.tobytes(), values.dtype, offset=1)


def index_of(documents, token_bytes=2):
    """Pointers, lengths and documents of an index, all at odd addresses, and the tokens of each document."""
    sequences = np.array([length for document in documents for length in document], np.int32)
    pointers = np.concatenate([[0], np.cumsum(sequences[:-1], dtype=np.int64)])[: len(sequences)] * token_bytes
    firsts = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    arrays = (unaligned(pointers.astype(np.int64)), unaligned(sequences), unaligned(firsts))
    return arrays, [sum(document) for document in documents]


def by_definition(sizes, start, length):
    """For each token of one window, in plain Python."""
    begins = [begin for number, size in enumerate(sizes) for begin in [sum(sizes[:number])] * size]
    return [max(begin - start, 0) for begin in begins[start : start + length]]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", TOKEN_TYPES)
def test_gather_copies_and_widens_every_type(implementation, dtype):
    highest = min(int(np.iinfo(dtype).max), 60_000)
    numbers = np.random.default_rng(5).integers(0, highest + 1, 501)
    tokens = numbers.astype(dtype)
    for values in (tokens, unaligned(tokens), tokens[3:]):
        for length in (0, 1, 2, 7, 64, 100, len(values)):
            last = len(values) - length
            starts = np.array([0, last, last // 2, 0, min(1, last)], np.int64)
            rows = gather(values, starts, length, highest + 1, implementation=implementation)
            assert (rows.dtype, rows.shape) == (np.int64, (5, length))
            expected = [values[start : start + length].astype(np.int64) for start in starts]
            assert np.array_equal(rows, np.stack(expected))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", TOKEN_TYPES)
def test_gather_names_the_first_window_with_a_token_outside(implementation, dtype):
    vocabulary = 100
    starts = np.array([0, 10, 20, 30, 20], np.int64)
    wrong = [100, int(np.iinfo(dtype).max), *([-1, int(np.iinfo(dtype).min)] if dtype.startswith("i") else [])]
    for token in wrong:
        for place in (20, 29):
            tokens = np.full(40, 99, dtype)
            tokens[place] = token
            with pytest.raises(TokenOutsideError) as caught:
                gather(tokens, starts, 10, vocabulary, implementation=implementation)
            assert caught.value.row == 2
            assert gather(tokens, starts[:2], 10, vocabulary, implementation=implementation).max() == 99
    if wrong[1] < 60_000:  # a vocabulary that the type cannot leave
        assert gather(np.array([wrong[1]], dtype), starts[:1], 1, 60_000, implementation=implementation) == wrong[1]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_windows_that_leave_the_tokens_are_refused(implementation):
    tokens = np.arange(50, dtype=np.uint16)
    arrays, _ = index_of([[30], [20]])
    for start, length in ((-1, 1), (50, 1), (49, 2), (0, 51), (2**62, 1), (-(2**63), 5), (0, -1), (0, 2**62)):
        with pytest.raises(ValueError, match=r"window|length"):
            gather(tokens, np.array([0, start]), length, 100, implementation=implementation)
        with pytest.raises(ValueError, match=r"window|length"):
            document_starts(*arrays, 2, np.array([0, start]), length, implementation=implementation)
    none = np.array([], np.int64)
    assert gather(tokens, none, 4, 100, implementation=implementation).shape == (0, 4)
    assert document_starts(*arrays, 2, none, 4, implementation=implementation).shape == (0, 4)
    assert gather(tokens, np.array([50]), 0, 100, implementation=implementation).shape == (1, 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("token_bytes", [1, 2, 4, 8])
@pytest.mark.parametrize("name", DATASETS)
def test_document_starts_of_every_window(implementation, token_bytes, name):
    arrays, sizes = index_of(DATASETS[name], token_bytes)
    total = sum(sizes)
    for length in {0, 1, 2, 3, 7, 20, total} & set(range(total + 1)):
        starts = np.arange(total - length + 1)[:60]
        places = document_starts(*arrays, token_bytes, starts, length, implementation=implementation)
        assert (places.dtype, places.shape) == (np.int32, (len(starts), length))
        assert places.tolist() == [by_definition(sizes, int(start), length) for start in starts]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    documents=st.lists(st.lists(st.integers(0, 9) | st.integers(0, 200), max_size=3), min_size=1, max_size=80),
    data=st.data(),
)
def test_both_implementations_follow_the_definition(documents, data):
    arrays, sizes = index_of(documents)
    total = sum(sizes)
    length = data.draw(st.integers(0, total))
    starts = np.array(data.draw(st.lists(st.integers(0, total - length), max_size=4)), np.int64)
    expected = [by_definition(sizes, int(start), length) for start in starts]
    for implementation in IMPLEMENTATIONS:
        assert document_starts(*arrays, 2, starts, length, implementation=implementation).tolist() == expected


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_search_in_an_index_of_uneven_documents(implementation):
    """Where offsets grow by leaps, guesses from an even growth are wrong."""
    chance = random.Random(11)
    documents = [[2 ** chance.randrange(20)] for _ in range(300)] + [[]] * 500 + [[1]] * 2000 + [[2**22]]
    arrays, sizes = index_of(documents)
    begins = np.cumsum([0, *sizes])
    starts = np.array([*range(40), *(begins[begins < begins[-1] - 8] - 3)[1::7], int(begins[-1]) - 8])
    places = document_starts(*arrays, 2, starts, 8, implementation=implementation)
    positions = starts[:, None] + np.arange(8)
    expected = begins[np.searchsorted(begins, positions, side="right") - 1] - starts[:, None]
    assert np.array_equal(places, np.maximum(expected, 0))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("array", "place", "value"),
    [
        *((0, place, value) for place in (0, 1, 2, 3, 4) for value in (-2, 3, 10**6, 2**63 - 1, -(2**63))),
        *((1, place, value) for place in (0, 1, 2, 3) for value in (-1, 0, 6, 2**31 - 1, -(2**31))),
        *((1, 4, value) for value in (-1, -(2**31))),  # more or fewer: the size of the file says so, and it alone
        *((2, place, value) for place in (0, 1, 2, 3, 4, 5) for value in (-1, 6, 2**62, -(2**63))),
        (2, 3, 1),
        (2, 0, 1),
        (2, 5, 4),
    ],
)
def test_a_damaged_number_is_seen_when_it_is_used(implementation, array, place, value):
    arrays, _ = index_of([[5], [4], [3], [2], [1]])
    damaged = list(arrays)
    damaged[array] = arrays[array].copy()
    damaged[array][place] = value
    with pytest.raises(IndexDamagedError):
        document_starts(*damaged, 2, np.array([0]), 15, implementation=implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_arguments_of_other_kinds_are_refused(implementation):
    tokens, starts = np.arange(9, dtype=np.uint16), np.array([0])
    arrays, _ = index_of([[5], [4]])
    for wrong in ([0], np.array([0], np.int32), np.zeros((1, 1), np.int64), np.array(0)):
        with pytest.raises(ValueError, match="starts"):
            gather(tokens, wrong, 1, 9, implementation=implementation)
        with pytest.raises(ValueError, match="starts"):
            document_starts(*arrays, 2, wrong, 1, implementation=implementation)
    for wrong in (tokens.astype(np.float64), tokens.astype(np.uint32), tokens.reshape(3, 3)):
        with pytest.raises(ValueError, match="tokens"):
            gather(wrong, starts, 1, 9, implementation=implementation)
    with pytest.raises(ValueError, match="vocabulary"):
        gather(tokens, starts, 1, 0, implementation=implementation)
    for wrong_bytes in (0, 3, -2):
        with pytest.raises(ValueError, match="token_bytes"):
            document_starts(*arrays, wrong_bytes, starts, 1, implementation=implementation)
    with pytest.raises(ValueError, match="one length"):
        document_starts(arrays[0][:1], *arrays[1:], 2, starts, 1, implementation=implementation)
    with pytest.raises(ValueError, match="neither numpy nor native"):
        gather(tokens, starts, 1, 9, implementation="fast")


def test_a_missing_extension_is_said_with_its_mend(monkeypatch):
    monkeypatch.setattr("megalrps.data.windows._native", None)
    with pytest.raises(InputError, match="build_ext"):
        gather(np.zeros(2, np.uint16), np.array([0]), 1, 1, implementation="native")
