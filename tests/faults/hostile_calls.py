"""Calls of functions of arrays with hostile arguments, and how a call of any kind is judged."""

import math
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np

CPU_SECONDS_OF_A_CALL = 2.0
INTEGERS = (0, 1, 2, 3, 7, 64, 2**31 - 1, 2**31, 2**32, 2**61, 2**62, 2**62 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64)
INTEGERS += (-1, -2, -(2**31), -(2**31) - 1, -(2**63), -(2**63) - 1)
NOT_INTEGERS = (None, 1.0, "1", b"1", object(), [], 1j, math.nan)


class WrongAnswerError(AssertionError):
    """A call that had to be refused was answered, or the other way round, or the answer is wrong."""


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise WrongAnswerError(what)


def outcome_of(call: Callable[[], Any], valid: bool | None, check: Callable[[Any], None]) -> str:
    """Make the call; ``valid`` says whether it must be answered (None: it may), and ``check`` looks at the answer."""
    started = time.process_time()
    try:
        answer = call()
    except Exception as error:
        expect(not valid, f"refused though sound: {error!r:.200}")
        expect(not isinstance(error, SystemError), f"the interpreter was misused: {error!r}")
        outcome = f"refused: {type(error).__name__}"
    else:
        expect(valid is not False, f"answered {answer!r:.100} though it cannot be")
        check(answer)
        outcome = "right"
    expect(time.process_time() - started < CPU_SECONDS_OF_A_CALL, "took too long")
    return outcome


def is_integer(value: object, low: int, high: int) -> bool:
    return isinstance(value, int | np.integer) and low <= int(value) <= high


def unaligned(values: np.ndarray) -> np.ndarray:
    """The same numbers one byte off where numbers of their type lie."""
    return np.frombuffer(b"\0" + values.tobytes(), values.dtype, offset=1)


def read_only(values: np.ndarray) -> np.ndarray:
    values.flags.writeable = False
    return values


SHAPES_OF_ARRAYS: tuple[Callable[[np.ndarray], Any], ...] = (
    *(lambda values: values for _ in range(20)),
    read_only,
    unaligned,
    lambda values: np.repeat(values, 2)[::2],
    lambda values: values[::-1],
    lambda values: values.reshape(1, -1),
    lambda values: values[:1].reshape(()) if values.size else values,
    lambda values: values.astype(values.dtype.newbyteorder(">")),
    lambda values: np.broadcast_to(values[:1], (5 * bool(values.size),)),
    lambda values: values[:0],
    np.ndarray.tolist,
    *(lambda values, dtype=dtype: values.astype(dtype) for dtype in ("i4", "u4", "f8", "O", "?", "M8[ns]")),
    lambda values: values.view("u8" if values.dtype == np.int64 else "i8"),
    lambda values: None,
    lambda values: values.tobytes(),
    lambda values: "indices",
)


def is_sound_array(values: object, dtype: type) -> bool:
    return (
        isinstance(values, np.ndarray)
        and values.dtype == np.dtype(dtype)
        and values.ndim == 1
        and values.flags.c_contiguous
        and values.flags.aligned
    )


def call_permute(chance: random.Random, native: Any) -> str:
    from megalrps.data import permutation

    size = chance.choice((*INTEGERS, *([chance.randint(1, 1000)] * 20), True, np.int64(9), *NOT_INTEGERS))
    bound = int(size) if is_integer(size, 1, 2**62) else 10
    places = [chance.randrange(bound) for _ in range(chance.choice((0, 1, 2, 100)))]
    if chance.random() < 0.3:
        places.append(chance.choice((-1, bound, 2**63 - 1, -(2**63))))
    indices = chance.choice(SHAPES_OF_ARRAYS)(np.array(places, np.int64))
    rounds = chance.choice((16, 16, 0, 1, 3, 5000))
    keys = chance.choice(SHAPES_OF_ARRAYS)(np.frombuffer(chance.randbytes(8 * rounds), np.uint64).copy())
    valid = is_integer(size, 1, 2**62) and is_sound_array(indices, np.int64) and is_sound_array(keys, np.uint64)
    valid = valid and all(0 <= place < size for place in indices.tolist())

    def check(answer: Any) -> None:
        expected = permutation._permute(indices, int(size), keys)
        expect(answer.dtype == np.int64 and np.array_equal(answer, expected), f"permute of {places} below {size}")

    return outcome_of(lambda: native.permute(indices, size, keys), valid, check)


def call_keyed_permutation(chance: random.Random, native: Any) -> str:
    from megalrps.data.permutation import KeyedPermutation

    size = chance.choice((1, 2, 1000, 2**31, 2**62))
    places = [chance.randrange(size) for _ in range(chance.choice((0, 1, 50)))]
    if chance.random() < 0.3:
        places.append(chance.choice((-1, size, 2**63 - 1, -(2**63))))
    indices = chance.choice(SHAPES_OF_ARRAYS)(np.array(places, np.int64))
    valid = isinstance(indices, np.ndarray) and indices.dtype == np.int64 and indices.ndim == 1
    valid = valid and all(0 <= place < size for place in indices.tolist())

    def check(answer: Any) -> None:
        expected = KeyedPermutation(size, b"key", implementation="numpy")(indices)
        expect(np.array_equal(answer, expected), f"permutation of {places} below {size}")

    return outcome_of(lambda: KeyedPermutation(size, b"key", implementation="native")(indices), valid, check)


TEXTS = (
    "",
    "a",
    " a",
    "ab\u2581",
    "b a  ab",
    "\0",
    "\u00e9",
    "\U0010ffff",
    "\u2581",
    "x" * 70,
    "ab" * 500,
    "\ud800",
    b"a",
    None,
    3,
)


def call_word_pieces(chance: random.Random, native: Any) -> str:
    """Vocabularies and texts of all sorts; whatever is answered must spell the texts."""
    letters = ("a", "b", "ab", "\u2581", "\u2581a", "\u00e9", "b\u2581", "aba", " ", "x", *TEXTS[:2], "\ud800", b"a")
    pieces = [chance.choice(letters[: chance.choice((9, 9, 9, 9, 15))]) for _ in range(chance.choice((0, 1, 3, 8)))]
    if chance.random() < 0.8:
        pieces = list(dict.fromkeys(pieces))
    scores = np.array([chance.choice((0.0, -1.0, -2.5, 1e30, -math.inf)) for _ in pieces], np.float32)
    ids = np.array([256 + place for place in range(len(pieces))], np.int32)
    if pieces and chance.random() < 0.1:
        scores[-1], ids[0] = chance.choice(((math.nan, 3), (0.0, -1)))
    shapes = (
        *[lambda values: values] * 9,
        unaligned,
        np.ndarray.tolist,
        lambda values: values[:-1],
        lambda values: None,
    )
    chosen_scores, chosen_ids = chance.choice(shapes)(scores), chance.choice(shapes)(ids)
    byte_ids = np.arange(chance.choice((256, 256, 256, 256, 0, 255)), dtype=np.int32)
    memory_bytes = chance.choice((0, 1, 100, 4096, 1 << 20, -1, None, 2**63))
    texts = [chance.choice(TEXTS[: chance.choice((11, 11, 11, 15))]) for _ in range(chance.choice((0, 1, 5, 40)))]

    def call() -> Any:
        words = native.WordPieces(
            pieces, chosen_scores, chosen_ids, byte_ids, prefix=chance.random() < 0.5, memory_bytes=memory_bytes
        )
        words.encode(texts)
        return words.encode(chance.choice((list, tuple, iter))(texts))

    def check(answer: Any) -> None:
        tokens, lengths = answer
        ends = np.cumsum(lengths)
        expect(lengths.size == len(texts) and tokens.size == (ends[-1] if texts else 0), "lengths")
        spelling = [*(bytes([byte]) for byte in range(256)), *(piece.encode() for piece in pieces)]
        order = {int(number): spelling[256 + place] for place, number in enumerate(chosen_ids)}
        for text, end, length in zip(texts, ends, lengths, strict=True):
            spelled = b"".join(order.get(i) or spelling[i] for i in tokens[end - length : end].tolist())
            wanted = text.replace(" ", "\u2581").encode()
            expect(spelled in (wanted, "\u2581".encode() + wanted), f"{text!r} is spelled {spelled!r}")

    return outcome_of(call, None, check)
