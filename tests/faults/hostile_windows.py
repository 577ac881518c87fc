"""Calls with hostile arguments of functions that read windows, and documents, through the arrays of an index."""

import contextlib
import random
from typing import Any

import numpy as np
from hostile_calls import (
    INTEGERS,
    NOT_INTEGERS,
    SHAPES_OF_ARRAYS,
    expect,
    is_integer,
    is_sound_array,
    outcome_of,
    unaligned,
)

EXTREMES = (0, -1, 1, 2, 7, 2**31 - 1, -(2**31), 2**40, 2**61, 2**62, 2**63 - 1, -(2**63))
TOKEN_TYPES = ("uint8", "int8", "uint16", "int16", "int32", "int64")


def is_stored_array(values: object, dtypes: tuple[str, ...]) -> bool:
    """Whether it may be an array of a file: flat, of such numbers, aligned or not."""
    return (
        isinstance(values, np.ndarray)
        and values.dtype.name in dtypes
        and values.dtype.newbyteorder("=") == values.dtype
        and values.ndim == 1
        and (values.size < 2 or values.strides[0] == values.itemsize)
    )


def hostile_integer(chance: random.Random, sound: int, share: float = 0.15) -> Any:
    return chance.choice((*INTEGERS, *NOT_INTEGERS)) if chance.random() < share else sound


def hostile_array(chance: random.Random, values: np.ndarray, share: float = 0.2) -> Any:
    if chance.random() < share:
        with contextlib.suppress(ValueError):  # some have no such view
            return chance.choice(SHAPES_OF_ARRAYS)(values)
    return unaligned(values) if chance.random() < 0.5 else values


def hostile_starts(chance: random.Random, count: int, length: object) -> Any:
    room = max(count - int(length), 0) if is_integer(length, 0, count) else 0  # type: ignore[call-overload]
    places = [chance.randint(0, room) for _ in range(chance.choice((0, 1, 3)))]
    if chance.random() < 0.2:
        places.append(chance.choice((-1, count, room + 1, 2**62, 2**63 - 1, -(2**63))))
    starts = np.array(places, np.int64)
    return chance.choice(SHAPES_OF_ARRAYS)(starts) if chance.random() < 0.2 else starts


def are_windows(starts: Any, length: object, count: int) -> bool:
    """Whether a sound call may have them; no window at all may have any length."""
    if not is_sound_array(starts, np.int64) or not is_integer(length, 0, count):
        return False
    return all(0 <= start <= count - int(length) for start in starts.tolist())  # type: ignore[call-overload]


def call_gather(chance: random.Random, native: Any) -> str:
    from megalrps.data import windows

    dtype = np.dtype(chance.choice(TOKEN_TYPES))
    numbers = [chance.randint(0, 100) for _ in range(chance.choice((0, 1, 9, 64)))]
    tokens = np.array(numbers, dtype)
    if tokens.size and chance.random() < 0.2:
        limits = np.iinfo(dtype)
        tokens[chance.randrange(tokens.size)] = chance.choice((limits.min, limits.max))
    length = hostile_integer(chance, chance.randint(0, tokens.size))
    starts = hostile_starts(chance, tokens.size, length)
    vocabulary = hostile_integer(chance, 101)
    given = hostile_array(chance, tokens)
    valid: bool | None = is_stored_array(given, TOKEN_TYPES) and is_integer(vocabulary, 1, 2**63 - 1)
    valid = valid and are_windows(starts, length, given.size)
    if not valid and is_sound_array(starts, np.int64) and not starts.size:
        valid = None  # of no window the length does not matter

    def check(answer: Any) -> None:
        if valid:
            rows, outside = windows._gather(given, starts, int(length), int(vocabulary))
            expect(answer[1] == outside, f"found the token outside in {answer[1]}, not {outside}")
            if outside < 0:
                expect(answer[0].dtype == np.int64 and np.array_equal(answer[0], rows), "gathered something else")

    return outcome_of(lambda: native.gather(given, starts, length, vocabulary), valid, check)


class Index:
    """The arrays of an index of random documents, sound or damaged, as a call is handed them."""

    def __init__(self, chance: random.Random) -> None:
        documents = [
            [chance.choice((0, 1, 2, 5, 40))] * chance.choice((0, 1, 1, 1, 3)) for _ in range(chance.randint(0, 12))
        ]
        sequences = [length for document in documents for length in document]
        self.token_bytes: Any = chance.choice((1, 2, 4, 8))
        self.count = sum(sequences)
        lengths = np.array(sequences, np.int32)
        pointers = np.cumsum([0, *sequences], dtype=np.int64)[:-1] * self.token_bytes
        firsts = np.cumsum([0, *map(len, documents)], dtype=np.int64)
        sound = [pointers, lengths, firsts]
        self.damaged = chance.random() < 0.4
        if self.damaged:
            for _ in range(chance.randint(1, 3)):
                array = chance.choice(sound)
                if array.size:
                    near = int(array[chance.randrange(array.size)]) + chance.choice((-1, 0, 1, self.token_bytes))
                    value = chance.choice((near, chance.choice(EXTREMES)))
                    limits = np.iinfo(array.dtype)
                    array[chance.randrange(array.size)] = min(max(value, limits.min), limits.max)
        self.arrays = [hostile_array(chance, array, 0.06) for array in sound]
        dtypes = (("int64",), ("int32",), ("int64",))
        self.valid = all(is_stored_array(array, kind) for array, kind in zip(self.arrays, dtypes, strict=True))
        changed = [
            not self.valid or given.tobytes() != array.tobytes()
            for given, array in zip(self.arrays, sound, strict=True)
        ]
        self.damaged = self.damaged or any(changed)  # other numbers than these, or fewer
        if chance.random() < 0.05:
            self.token_bytes = chance.choice((*INTEGERS, *NOT_INTEGERS))
            self.valid = False if not is_integer(self.token_bytes, 0, 9) else None if self.valid else False
            self.damaged = True
        self.arguments = (*self.arrays, self.token_bytes)

    def soundness(self, others: bool) -> bool | None:
        """Whether a call must be answered; of a damaged index it may be, or not."""
        if self.valid is False or not others:
            return False
        return None if self.damaged else True


def call_document_starts(chance: random.Random, native: Any) -> str:
    from megalrps.data import windows

    index = Index(chance)
    length = hostile_integer(chance, chance.randint(0, index.count))
    if index.damaged and is_integer(length, 10**6, 2**40):
        length = 3  # a damaged index may be of so many tokens, and the window takes the memory it takes
    starts = hostile_starts(chance, index.count, length)
    valid = index.soundness(are_windows(starts, length, index.count))
    if valid is False and index.valid is not False and is_sound_array(starts, np.int64):
        valid = None if index.damaged or not starts.size else False  # a damaged one may be of more tokens

    def check(answer: Any) -> None:
        expect(answer.dtype == np.int32 and answer.shape == (len(starts), int(length)), "an answer of another shape")
        expect(not answer.size or (int(answer.min()) >= 0 and int(answer.max()) < int(length)), "a place outside")
        if valid:
            expected = windows._document_starts(*index.arguments, starts, int(length))
            expect(np.array_equal(answer, expected), f"documents begin at {answer.tolist()}")

    return outcome_of(lambda: native.document_starts(*index.arguments, starts, length), valid, check)


def call_packing(chance: random.Random, native: Any) -> str:
    from megalrps.data import packing, windows

    index = Index(chance)
    block = hostile_integer(chance, chance.choice((1, 2, 5, 512)), 0.1)
    length = hostile_integer(chance, chance.choice((1, 2, 3, 8, 41, 2000)), 0.1)
    sound = is_integer(block, 1, 2**31 - 1) and is_integer(length, 1, packing.LONGEST)
    valid = index.soundness(sound)
    expected: list[list[tuple[int, int]]] = []

    def check_counts(answer: Any) -> None:
        steps = np.diff(answer, prepend=0)
        expect(answer.dtype == np.int64 and bool((steps >= 0).all()), "counted backwards")
        if valid:
            blocks = list(
                packing._blocks(windows.IndexOffsets(*index.arguments), packing.Packing(int(length), int(block)))
            )
            expected.extend(sample for each in blocks for sample in each)
            expect(steps.tolist() == [len(each) for each in blocks], f"counted {steps.tolist()}")

    outcome = outcome_of(lambda: native.count_packed(*index.arguments, block, length), valid, check_counts)
    if outcome != "right":
        return outcome
    ends = native.count_packed(*index.arguments, block, length)
    count = min(int(ends[-1]), 1000) if ends.size else 0
    places = [chance.randrange(count) for _ in range(chance.choice((0, 1, 4)))] if count else []
    if chance.random() < 0.2:
        places.append(chance.choice((-1, int(ends[-1]) if ends.size else 0, 2**63 - 1, -(2**63))))
    numbers = chance.choice(SHAPES_OF_ARRAYS)(np.array(places, np.int64))
    spoilt = ends.size and chance.random() < 0.2
    if spoilt:
        ends[chance.randrange(ends.size)] = chance.choice(EXTREMES)
    in_range = is_sound_array(numbers, np.int64) and all(0 <= number < count for number in numbers.tolist())
    if valid is not None:
        valid = None if spoilt and is_sound_array(numbers, np.int64) else in_range
    elif not is_sound_array(numbers, np.int64):
        valid = False

    def check_pieces(answer: Any) -> None:
        bounds, starts, lengths = (each.tolist() for each in answer)
        expect(len(bounds) == len(numbers) + 1 and bounds[-1] == len(starts) == len(lengths), "bounds of other pieces")
        expect(all(2 <= each <= int(length) + 1 for each in lengths), "a piece of no length")
        if valid:
            drawn = [piece for number in numbers.tolist() for piece in expected[number]]
            expect(list(zip(starts, lengths, strict=True)) == drawn, f"other pieces in {numbers.tolist()}")

    arguments = (*index.arguments, block, length, ends, numbers)
    return outcome_of(lambda: native.packed_pieces(*arguments), valid, check_pieces)


def call_fill_packed(chance: random.Random, native: Any) -> str:
    from megalrps.data import packing

    length = hostile_integer(chance, chance.choice((1, 2, 8, 30)), 0.05)
    slots = int(length) + 1 if is_integer(length, 1, 64) else 5
    bounds, lengths = [0], []
    for _ in range(chance.choice((0, 1, 3))):
        room = slots
        while room >= 2 and chance.random() < 0.8:
            lengths.append(chance.randint(2, room))
            room -= lengths[-1]
        bounds.append(len(lengths))
    tokens = np.arange(sum(lengths), dtype=np.int64)
    arrays = [np.array(bounds, np.int64), np.array(lengths, np.int64)]
    spoilt = chance.random() < 0.3
    if spoilt:
        array = chance.choice(arrays)
        if array.size:
            array[chance.randrange(array.size)] = chance.choice((*EXTREMES, 3, slots, slots + 1))
    shaped = [chance.choice(SHAPES_OF_ARRAYS)(array) if chance.random() < 0.2 else array for array in (tokens, *arrays)]
    sound = all(is_sound_array(each, np.int64) for each in shaped) and is_integer(length, 1, packing.LONGEST)
    same = sound and all(np.array_equal(each, array) for each, array in zip(shaped, (tokens, *arrays), strict=True))
    padding = hostile_integer(chance, 7, 0.05)
    valid: bool | None = False
    if sound and is_integer(padding, -(2**63), 2**63 - 1):
        valid = True if same and not spoilt else None

    def check(answer: Any) -> None:
        rows, size = max(len(shaped[1]) - 1, 0), int(length)
        expect([each.shape for each in answer] == [(rows, size + 1), (rows, size), (rows, size)], "other shapes")
        expect(not answer[1].size or 0 <= int(answer[1].min()) <= int(answer[1].max()) < size, "a start outside")
        if valid:
            expected = packing._fill(*shaped, size, int(padding))
            expect(
                all(np.array_equal(one, other) for one, other in zip(answer, expected, strict=True)), "filled otherwise"
            )

    return outcome_of(lambda: native.fill_packed(*shaped, length, padding), valid, check)
