"""Packed documents: whole, every label once, the same from numpy, from C++ and in any order of asking."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalrps.data.indexed import bin_path, idx_path
from megalrps.data.packing import PackedDocuments, Packing
from megalrps.data.windows import IMPLEMENTATION
from megalrps.errors import InputError

IMPLEMENTATIONS = ["numpy", "native"] if IMPLEMENTATION == "native" else ["numpy"]
EOD = 2
FIRST = 10  # tokens count up from it, so each says its place
SIZES = [6, 0, 3, 1, 14, 0, 0, 2, 4, 9, 10, 1, 5, 2, 3, 25, 7, 0]


@pytest.fixture(scope="module")
def increment(make_increment):
    return make_increment(sum(SIZES), FIRST, sizes=SIZES)


def opened(increment, length, block, implementation=IMPLEMENTATION, cache=None):
    return PackedDocuments(increment, Packing(length, block), cache, implementation=implementation)


def in_memory(increment, sizes):
    """An increment like ``increment`` of documents of ``sizes``; no file is written."""
    tokens, lengths = FIRST + np.arange(sum(sizes), dtype=np.uint16), np.array(sizes, np.int32)
    dataset = SimpleNamespace(
        prefix=increment.dataset.prefix,
        dtype=tokens.dtype,
        sequence_lengths=lengths,
        sequence_pointers=2 * np.cumsum([0, *sizes[:-1]], dtype=np.int64),
        document_indices=np.arange(len(sizes) + 1),
        document_count=len(sizes),
        read=lambda start, stop: tokens[start:stop],
    )
    return SimpleNamespace(manifest=increment.manifest, dataset=dataset)


def pieces_of(packed):
    """The samples, each a list of (start, length)."""
    bounds, starts, lengths = packed.pieces(np.arange(packed.count))
    pieces = list(zip(starts.tolist(), lengths.tolist(), strict=True))
    return [pieces[first:last] for first, last in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]


def by_definition(sizes, first_token, length):
    """One block packed, looking through all samples for each piece."""
    samples, rest, start = [], [], first_token
    for size in sizes:
        for place in range(0, size - 1, length):
            piece = (start + place, min(length + 1, size - place))
            if piece[1] == length + 1:
                samples.append([piece])
            else:
                rest.append(piece)
        start += size
    packed, used = [], []  # samples that have room, and when they came to that room
    for clock, piece in enumerate(sorted(rest, key=lambda each: (-each[1], each[0]))):
        free = [length + 1 - sum(size for _, size in sample) for sample in packed]
        fitting = [(room, -used[at], at) for at, room in enumerate(free) if room >= piece[1]]
        if fitting:
            at = min(fitting)[2]
            packed[at].append(piece)
            used[at] = clock
        else:
            packed.append([piece])
            used.append(clock)
    return samples + packed


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_golden_samples(increment, implementation):
    """For ever: a resumed run must meet the samples it left."""
    packed = opened(increment, 9, 8, implementation)
    assert pieces_of(packed) == [
        [(10, 10)],
        [(0, 6), (6, 3)],
        [(19, 5), (24, 2)],
        [(39, 10)],
        [(60, 10)],
        [(69, 10)],
        [(30, 9)],
        [(78, 7), (57, 3)],
        [(50, 5), (26, 4)],
        [(55, 2)],
        [(85, 7)],
    ]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 24, 25, 70, 2000])
@pytest.mark.parametrize("block", [1, 4, 18, 512])
def test_every_length_and_block_follows_the_definition(increment, implementation, length, block):
    expected = []
    for first in range(0, len(SIZES), block):
        expected += by_definition(SIZES[first : first + block], sum(SIZES[:first]), length)
    assert pieces_of(opened(increment, length, block, implementation)) == expected


@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 6) | st.integers(0, 90), min_size=1, max_size=60).filter(lambda s: max(s) > 1),
    length=st.integers(1, 40),
    block=st.integers(1, 70),
    order=st.randoms(use_true_random=False),
)
def test_every_token_but_a_first_is_a_label_once(increment, sizes, length, block, order):
    increment, nowhere = in_memory(increment, sizes), Path("/dev/null/nowhere")
    reference = opened(increment, length, block, "numpy", nowhere)
    everything = reference.rows(np.arange(reference.count))
    tokens_BS, starts_BS, counted_BS = everything
    assert [each.dtype.name for each in everything] == ["int64", "int32", "bool"]
    inputs, labels = tokens_BS[:, :-1][counted_BS], tokens_BS[:, 1:][counted_BS]
    assert np.array_equal(labels, inputs + 1)
    begins = np.cumsum([0, *sizes])
    firsts = {int(begin) for begin, size in zip(begins, sizes, strict=False) if size}
    assert sorted(labels.tolist()) == [FIRST + place for place in range(sum(sizes)) if place not in firsts]
    # A run of slots with one start is a piece of one document, and none but padding is two.
    of_document = np.searchsorted(begins, tokens_BS[:, :-1] - FIRST, side="right")
    for tokens_S, starts_S, documents_S in zip(tokens_BS, starts_BS, of_document, strict=True):
        padded = tokens_S[:-1] == EOD
        for start in set(starts_S.tolist()):
            run = starts_S == start
            assert int(np.argmax(run)) == start and (padded[run].all() or len(set(documents_S[run].tolist())) == 1)
    whole = [piece for sample in pieces_of(reference) for piece in sample]
    for begin, size in zip(begins.tolist(), sizes, strict=False):
        assert not 2 <= size <= length + 1 or (begin, size) in whole
    numbers = [order.randrange(reference.count) for _ in range(7)]
    for implementation in IMPLEMENTATIONS:
        rows = opened(increment, length, block, implementation, nowhere).rows(np.array(numbers))
        assert all(np.array_equal(each, part[numbers]) for each, part in zip(rows, everything, strict=True))


def test_documents_are_cut_where_they_must_be_and_filled_up(make_increment):
    increment = make_increment(8, FIRST, sizes=[8])
    tokens_BS, starts_BS, counted_BS = opened(increment, 3, 1).rows(np.arange(3))
    assert tokens_BS.tolist() == [[10, 11, 12, 13], [13, 14, 15, 16], [16, 17, EOD, EOD]]
    assert starts_BS.tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 2]]
    assert counted_BS.tolist() == [[True] * 3, [True] * 3, [True, False, False]]


def test_any_order_of_asking_and_any_number_of_threads_give_the_same(increment):
    packed = opened(increment, 5, 4)
    expected = packed.rows(np.arange(packed.count))

    def row(number):
        return packed.rows(np.array([number]))

    numbers = [*range(packed.count)][::-1] * 3
    with ThreadPoolExecutor(4) as pool:
        for number, rows in zip(numbers, pool.map(row, numbers), strict=True):
            assert all(np.array_equal(each[0], part[number]) for each, part in zip(rows, expected, strict=True))
    shapes = [each.shape for each in packed.rows(np.array([], np.int64))]
    assert shapes == [(0, 6), (0, 5), (0, 5)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_numbers_that_no_sample_has_are_refused(increment, implementation):
    packed = opened(increment, 5, 4, implementation)
    for number in (-1, packed.count, 2**62, -(2**63)):
        with pytest.raises(ValueError, match="no packed sample"):
            packed.rows(np.array([0, number]))


def test_the_counts_are_kept_and_believed_only_where_they_fit(make_increment, tmp_path, monkeypatch):
    increment = make_increment(sum(SIZES), FIRST, sizes=SIZES)
    expected = pieces_of(opened(increment, 9, 4))
    path = Path(f"{increment.dataset.prefix}.packed-9")
    kept = path.read_bytes()
    assert len(kept) == 32 + 8 * 5

    counts = []
    count = PackedDocuments._count
    monkeypatch.setattr(PackedDocuments, "_count", lambda self: counts.append(1) or count(self))
    assert pieces_of(opened(increment, 9, 4)) == expected and not counts
    others = {
        "cut": kept[:-1],
        "longer": kept + b"\0",
        "a count changed": kept[:-8] + bytes([kept[-8] ^ 1]) + kept[-7:],
        "the digest changed": kept[:20] + bytes([kept[20] ^ 1]) + kept[21:],
        "empty": b"",
    }
    for what, content in others.items():
        path.write_bytes(content)
        assert pieces_of(opened(increment, 9, 4)) == expected and len(counts) == 1, what
        assert path.read_bytes() == kept
        counts.clear()
    # Of the same size, but of another rule, or of other data.
    opened(increment, 9, 4, cache=tmp_path)
    assert [file.stat().st_size for file in tmp_path.iterdir()] == [len(kept)] and len(counts) == 1
    other = make_increment(sum(SIZES), FIRST, sizes=SIZES[::-1])
    Path(f"{other.dataset.prefix}.packed-9").write_bytes(kept)
    assert sorted(pieces_of(opened(other, 9, 4))) != sorted(expected) and len(counts) == 2
    opened(other, 9, 4)
    assert len(counts) == 2


def test_a_folder_that_cannot_be_written_costs_a_count_and_is_said(increment, tmp_path):
    (tmp_path / "file").write_text("")
    packed = opened(increment, 9, 4, cache=tmp_path / "file")
    assert packed.note is not None and "text" in packed.note and "--data-cache-path" in packed.note
    assert "\n" not in packed.note and str(tmp_path / "file") in packed.note
    sound = opened(increment, 9, 4)
    assert sound.note is None and pieces_of(packed) == pieces_of(sound)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_damaged_index_is_named(make_increment, tmp_path, implementation):
    increment = make_increment(60, FIRST, sizes=[20, 20, 20])
    packed = opened(increment, 30, 1, implementation)
    pointers, documents = 34 + 3 * 4, 34 + 3 * 12

    def overwrite(offset, number):
        with open(idx_path(increment.dataset.prefix), "r+b") as file:
            file.seek(offset)
            file.write(np.int64(number).tobytes())

    overwrite(pointers + 8, 44)
    told = rf"{increment.dataset.prefix}\.idx: .*damaged.*preprocess_data"
    with pytest.raises(InputError, match=told):
        packed.rows(np.array([0]))
    with pytest.raises(InputError, match=told):
        opened(increment, 30, 1, implementation, tmp_path)
    overwrite(pointers + 8, 40)
    packed.rows(np.array([0, 1, 2]))
    overwrite(documents + 8, 0)  # in order, and every sequence ends where the next begins: the counts know
    with pytest.raises(InputError, match=told):
        packed.rows(np.array([0]))


def test_a_length_that_cannot_be_packed_and_data_that_has_nothing_to_pack(make_increment):
    for length in (0, 2**24 + 1):
        with pytest.raises(InputError, match=f"--seq-length {length}"):
            Packing.of_length(length)
    assert [Packing.of_length(length).block for length in (1, 2048, 2049, 8192)] == [512, 512, 1024, 2048]
    with pytest.raises(InputError, match=r"no document of two tokens.*--pack-documents"):
        opened(make_increment(3, sizes=[1, 1, 1]), 4, 512)


def test_a_token_outside_the_vocabulary_is_not_packed(make_increment):
    increment = make_increment(30, FIRST, sizes=[10, 20])
    packed = opened(increment, 30, 512)
    with open(bin_path(increment.dataset.prefix), "r+b") as file:
        file.write(np.uint16(50_000).tobytes())
    with pytest.raises(InputError, match=rf"{increment.dataset.prefix}\.bin: holds a token outside"):
        packed.rows(np.array([0]))
