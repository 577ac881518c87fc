"""The sample stream: its order depends on content, seed and index, and on nothing else."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalrps.data.indexed import bin_path, idx_path
from megalrps.data.stream import Reading, SampleStream, sequential_windows
from megalrps.errors import InputError

LENGTH = 4


@pytest.fixture(scope="module")
def increments(make_increment):
    """Increments of 12, 1 and 10 windows; tokens count up from 0, 1000 and 2000."""
    return [make_increment(51, 0), make_increment(6, 1000), make_increment(41, 2000)]


def every_window(increments):
    """First tokens of all windows of ``increments``, from the definition."""
    starts = [range(0, increment.dataset.tokens.size - LENGTH, LENGTH) for increment in increments]
    return sorted(
        int(i.dataset.tokens[start]) for i, of_one in zip(increments, starts, strict=True) for start in of_one
    )


def first_tokens(stream, epoch):
    size = stream.samples_per_epoch
    return stream.samples(np.arange(epoch * size, (epoch + 1) * size))[:, 0].tolist()


def overwrite(path, offset, number):
    """Change a file that is mapped: the mapping changes with it."""
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(number.tobytes())


def listed(numbers):
    return " ".join(map(str, numbers))


def test_a_sample_is_a_window_and_the_token_after_it(increments):
    stream = SampleStream(increments, LENGTH, seed=1)
    tokens_NS = stream.samples(np.arange(100))
    assert (tokens_NS.shape, tokens_NS.dtype) == ((100, LENGTH + 1), np.int64)
    assert np.array_equal(tokens_NS - tokens_NS[:, :1], np.tile(np.arange(LENGTH + 1), (100, 1)))
    assert set((tokens_NS[:, 0] % 1000 % LENGTH).tolist()) == {0}


def test_golden_order(increments):
    """For ever: a resumed run must meet the order it left."""
    stream = SampleStream(increments, LENGTH, seed=1234)
    assert stream.samples_per_epoch == 23
    assert listed(first_tokens(stream, 0)) == (
        "40 2028 2032 2008 2000 2020 44 36 28 8 20 4 16 2024 0 12 2012 2004 32 2036 1000 2016 24"
    )
    assert listed(first_tokens(stream, 1)) == (
        "1000 2008 44 2000 36 2016 32 2032 2024 12 4 2036 24 16 40 8 0 2012 2028 28 20 2020 2004"
    )
    assert listed(first_tokens(SampleStream(increments[:1], LENGTH, seed=1234), 0)) == (
        "32 44 4 40 12 24 28 20 36 16 8 0"
    )


@pytest.mark.parametrize("epoch", [0, 1, 2, 10**9])
def test_each_epoch_draws_every_window_of_the_union_once(increments, epoch):
    assert sorted(first_tokens(SampleStream(increments, LENGTH, seed=1), epoch)) == every_window(increments)


def test_epochs_seeds_and_contents_give_other_orders(increments, make_increment):
    order = first_tokens(SampleStream(increments[:1], LENGTH, seed=1), 0)
    assert first_tokens(SampleStream(increments[:1], LENGTH, seed=1), 1) != order
    assert first_tokens(SampleStream(increments[:1], LENGTH, seed=2), 0) != order
    changed = make_increment(tokens=[*range(50), 999])
    assert first_tokens(SampleStream([changed], LENGTH, seed=1), 0) != order


def test_the_name_and_place_of_an_increment_do_not_enter(increments, make_increment):
    copy = make_increment(51, 0, name="another")
    assert copy.dataset.prefix != increments[0].dataset.prefix
    indices = np.arange(40)
    expected = SampleStream(increments, LENGTH, seed=1).samples(indices)
    assert np.array_equal(SampleStream([copy, *increments[1:]], LENGTH, seed=1).samples(indices), expected)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    horizon=st.integers(1, 60),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 4),
    resumed_at=st.integers(0, 60),
    order=st.randoms(use_true_random=False),
)
def test_no_horizon_world_size_batching_or_restart_changes_a_sample(
    increments, horizon, batch_size, world_size, resumed_at, order
):
    expected_NS = SampleStream(increments, LENGTH, seed=1).samples(np.arange(60))
    seen = {}
    for rank in range(world_size):
        stream = SampleStream(increments, LENGTH, seed=1)
        starts = list(range(0, horizon, batch_size))
        order.shuffle(starts)
        for start in starts:
            if start == resumed_at:
                stream = SampleStream(increments, LENGTH, seed=1)
            indices = np.arange(start, min(start + batch_size, horizon))[rank::world_size]
            seen.update(zip(indices.tolist(), stream.samples(indices).tolist(), strict=True))
    assert [seen[index] for index in range(horizon)] == expected_NS[:horizon].tolist()


def test_locate_says_where_samples_come_from(increments):
    stream = SampleStream(increments, LENGTH, seed=1)
    indices = np.array([0, 22, 23, 5, 5, 1000, 10**15])
    ordinals, windows = stream.locate(indices)
    assert (1000 * ordinals + LENGTH * windows).tolist() == stream.samples(indices)[:, 0].tolist()
    ordinals, _ = stream.locate(np.arange(23 * 4))
    assert np.bincount(ordinals).tolist() == [48, 4, 40]


def test_a_single_window_and_no_samples(make_increment):
    stream = SampleStream([make_increment(LENGTH + 1)], LENGTH, seed=0)
    assert stream.samples(np.arange(3)).tolist() == [[0, 1, 2, 3, 4]] * 3
    assert stream.samples(np.array([], np.int64)).shape == (0, LENGTH + 1)


def test_the_last_token_is_only_a_target_and_a_rest_is_not_drawn(make_increment):
    drawn = {count: SampleStream([make_increment(count)], LENGTH, seed=0).samples_per_epoch for count in (5, 8, 9, 13)}
    assert drawn == {5: 1, 8: 1, 9: 2, 13: 3}


def test_mistakes_are_named_with_their_mend(increments, make_increment):
    with pytest.raises(InputError, match=r"set\d+\.bin: increment short has 4 tokens.*--seq-length"):
        SampleStream([*increments, make_increment(4, name="short")], LENGTH, seed=0)
    other = replace(increments[0].manifest.tokenizer, fingerprint="1" * 64)
    with pytest.raises(InputError, match="text and other were made by different tokenizers"):
        SampleStream([*increments, make_increment(51, name="other", tokenizer=other)], LENGTH, seed=0)
    with pytest.raises(InputError, match="--increments"):
        SampleStream([], LENGTH, seed=0)
    with pytest.raises(InputError, match="--seq-length 0"):
        SampleStream(increments, 0, seed=0)
    with pytest.raises(ValueError, match="start at 0"):
        SampleStream(increments, LENGTH, seed=0).samples(np.array([-1]))


@pytest.mark.parametrize("token", [-1, 50_000])
def test_a_token_outside_the_vocabulary_is_not_handed_to_a_model(make_increment, token):
    good = make_increment(20, dtype=np.int32)
    damaged = make_increment(21, dtype=np.int32)
    overwrite(bin_path(damaged.dataset.prefix), 4 * 7, np.int32(token))
    told = rf"{damaged.dataset.prefix}\.bin: holds a token outside"
    for reading in (Reading(), Reading(documents=True), Reading(pack=True)):
        stream = SampleStream([good, damaged], LENGTH, 0, reading)
        with pytest.raises(InputError, match=told):
            stream.batch(np.arange(stream.samples_per_epoch))
    with pytest.raises(InputError, match=told):
        list(sequential_windows(damaged, LENGTH))


def test_an_index_that_contradicts_itself_is_named(make_increment):
    damaged = make_increment(60, sizes=[20, 20, 20])
    stream = SampleStream([damaged], LENGTH, 0, Reading(documents=True))
    stream.batch(np.arange(stream.samples_per_epoch))
    overwrite(idx_path(damaged.dataset.prefix), 34 + 3 * 4 + 8, np.int64(42))
    with pytest.raises(InputError, match=rf"{damaged.dataset.prefix}\.idx: sequence 0 does not end.*preprocess_data"):
        stream.batch(np.arange(stream.samples_per_epoch))


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(2, 30), length=st.integers(1, 40))
def test_evaluation_predicts_every_token_but_the_first_once(make_increment, count, length):
    windows = list(sequential_windows(make_increment(count, 100), length))
    assert all(window.dtype == np.int64 and 2 <= len(window) <= length + 1 for window in windows)
    assert all(len(window) == length + 1 for window in windows[:-1])
    assert np.concatenate([window[1:] for window in windows]).tolist() == list(range(101, 100 + count))
    assert np.concatenate([window[:-1] for window in windows]).tolist() == list(range(100, 99 + count))


def test_evaluation_needs_a_token_to_predict(make_increment):
    with pytest.raises(InputError, match="too short to evaluate on"):
        sequential_windows(make_increment(1), LENGTH)


@pytest.mark.parametrize("count", [0, 1, 7, 40, 100])
def test_consumed_counts_the_samples_of_each_increment(make_increment, count):
    one, two = make_increment(200, name="one"), make_increment(90, 1000, name="two")
    stream = SampleStream([one, two], 8, seed=3)
    ordinals, _ = stream.locate(np.arange(count, dtype=np.int64))
    assert stream.consumed(count) == {"one": int((ordinals == 0).sum()), "two": int((ordinals == 1).sum())}
    halves = stream.consumed(count // 2), stream.consumed(count, count // 2)
    assert {name: halves[0][name] + halves[1][name] for name in ("one", "two")} == stream.consumed(count)


SIZES = [3, 0, 0, 9, 1, 1, 20, 0, 7, 2, 30, 0]
EOD = 2


@pytest.fixture(scope="module")
def documents(make_increment):
    """Two increments of documents that end with EOD; every other token says its place: in the second, 1000 more."""
    tokens = [np.arange(first, first + sum(SIZES)) for first in (100, 1100)]
    for each in tokens:
        each[np.cumsum([size for size in SIZES if size]) - 1] = EOD
    return [make_increment(tokens=each, sizes=SIZES, name=name) for each, name in zip(tokens, "ab", strict=True)]


def test_a_batch_says_where_documents_begin(documents):
    stream = SampleStream(documents, 8, 5, Reading(documents=True))
    indices = np.arange(3 * stream.samples_per_epoch)
    batch = stream.batch(indices)
    assert np.array_equal(batch.tokens_BS, SampleStream(documents, 8, 5).samples(indices))
    assert (batch.starts_BS.dtype, batch.counted_BS) == (np.int32, None)
    begins = np.repeat(np.cumsum([0, *SIZES])[:-1], SIZES)
    windows = stream.locate(indices)[1]
    for starts_S, window in zip(batch.starts_BS, windows.tolist(), strict=True):
        assert starts_S.tolist() == np.maximum(begins[8 * window : 8 * window + 8] - 8 * window, 0).tolist()


def test_labels_after_the_end_of_a_document_count_unless_they_are_left_out(documents):
    indices = np.arange(40)
    plain = SampleStream(documents, 8, 5).batch(indices)
    assert (plain.starts_BS, plain.counted_BS) == (None, None)
    masked = SampleStream(documents, 8, 5, Reading(mask_eod=True)).batch(indices)
    assert np.array_equal(masked.tokens_BS, plain.tokens_BS)
    assert np.array_equal(masked.counted_BS, plain.tokens_BS[:, :-1] != EOD)
    assert 0 < np.count_nonzero(~masked.counted_BS) < masked.counted_BS.size


@pytest.mark.parametrize(
    "reading",
    [Reading(), Reading(documents=True, mask_eod=True), Reading(pack=True), Reading(pack=True, mask_eod=True)],
)
def test_a_batch_is_its_samples_one_by_one(documents, reading):
    stream = SampleStream(documents, 8, 5, reading)
    indices = np.array([5, 0, 31, 5, 100, 7, 2, 10**12], np.int64)
    batch = stream.batch(indices)
    rows = [stream.batch(indices[row : row + 1]) for row in range(len(indices))]
    for name in ("tokens_BS", "starts_BS", "counted_BS"):
        whole, single = getattr(batch, name), [getattr(row, name) for row in rows]
        assert (whole is None and single == [None] * len(rows)) or np.array_equal(whole, np.concatenate(single))
    none = stream.batch(np.array([], np.int64))
    shapes = [None if each is None else each.shape for each in (none.tokens_BS, none.starts_BS, none.counted_BS)]
    documents_asked, masked = reading.documents or reading.pack, reading.mask_eod or reading.pack
    assert shapes == [(0, 9), (0, 8) if documents_asked else None, (0, 8) if masked else None]


@pytest.mark.parametrize("epoch", [0, 3])
def test_packed_each_epoch_has_every_label_of_the_union_once(documents, epoch):
    stream = SampleStream(documents, 8, 5, Reading(pack=True))
    size = stream.samples_per_epoch
    batch = stream.batch(np.arange(epoch * size, (epoch + 1) * size))
    follows = {token: token + 1 for first in (100, 1100) for token in range(first, first + sum(SIZES))}
    inputs, labels = batch.tokens_BS[:, :-1][batch.counted_BS], batch.tokens_BS[:, 1:][batch.counted_BS]
    assert all(label in (EOD, follows[token]) for token, label in zip(inputs.tolist(), labels.tolist(), strict=True))
    # Inputs that count: all tokens but the last of each document.
    lasts = np.cumsum([each for each in SIZES if each]) - 1
    expected = [first + place for first in (100, 1100) for place in range(sum(SIZES)) if place not in lasts]
    assert sorted(inputs.tolist()) == expected


def test_golden_order_of_packed_samples(documents):
    """For ever, as the order of windows is."""
    stream = SampleStream(documents, 8, 1234, Reading(pack=True))
    size = stream.samples_per_epoch
    assert size == 18
    assert listed(first_tokens(stream, 0)) == (
        "114 151 1159 130 1130 1103 1114 1134 134 1151 1143 103 167 1122 122 1167 159 143"
    )
    assert listed(first_tokens(stream, 1)) == (
        "1151 1103 1114 130 134 159 1130 103 114 1134 1143 1167 151 1122 122 167 1159 143"
    )


def test_packed_samples_are_counted_by_increment(documents):
    stream = SampleStream(documents, 8, 5, Reading(pack=True))
    size = stream.samples_per_epoch
    ordinals, numbers = stream.locate(np.arange(size))
    every = [(ordinal, number) for ordinal in (0, 1) for number in range(size // 2)]
    assert sorted(zip(ordinals.tolist(), numbers.tolist(), strict=True)) == every
    assert stream.consumed(size) == {"a": size // 2, "b": size // 2}
    assert sum(stream.consumed(7).values()) == 7


def test_nothing_to_pack_is_named_with_its_mend(documents, make_increment):
    lone = make_increment(9, sizes=[1] * 9, name="lone")
    with pytest.raises(InputError, match=r"increment lone has no document of two tokens.*--pack-documents"):
        SampleStream([*documents, lone], 8, 0, Reading(pack=True))
