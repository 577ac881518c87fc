"""The sample stream: its order depends on content, seed and index, and on nothing else."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalrps.data.increment import OpenIncrement
from megalrps.data.stream import SampleStream, sequential_windows
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
    tokens = np.arange(21, dtype=np.int32)
    tokens[7] = token
    damaged = make_increment(21, dtype=np.int32)
    damaged.dataset.tokens = tokens
    stream = SampleStream([good, OpenIncrement(damaged.manifest, damaged.dataset)], LENGTH, seed=0)
    with pytest.raises(InputError, match=rf"{damaged.dataset.prefix}\.bin: holds a token outside"):
        stream.samples(np.arange(stream.samples_per_epoch))


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
