"""The order in which sources are drawn: every prefix of it gives each source its share, to less than one draw."""

import random
from fractions import Fraction

import numpy as np
import pytest

from megalrps.data.apportionment import Apportionment
from megalrps.errors import InputError
from megalrps.exact import exact_share, percent


def order_of(*weights: object) -> Apportionment:
    return Apportionment([exact_share(str(weight)) for weight in weights])


def drawn(order: Apportionment, count: int) -> str:
    return "".join(map(str, order(np.arange(count))[0].tolist()))


def random_weights(seed: int) -> list[int]:
    generator = random.Random(seed)
    largest = generator.choice([2, 9, 60, 1000])
    return [generator.randint(1, largest) for _ in range(generator.randint(1, 12))]


@pytest.mark.parametrize("seed", range(60))
def test_every_prefix_gives_every_source_its_share_within_tijdemans_bound(seed: int):
    weights = random_weights(seed)
    order = order_of(*weights)
    count = 2 * order.period + 1
    members, ranks = order(np.arange(count, dtype=np.int64))
    of_member_MK = np.cumsum(members == np.arange(len(weights))[:, None], axis=1)
    assert np.array_equal(ranks, of_member_MK[members, np.arange(count)] - 1), weights
    quotas_M1 = np.array([int(share * order.period) for share in order.shares])[:, None]
    away = int(np.abs(of_member_MK * order.period - quotas_M1 * np.arange(1, count + 1)).max())
    bound = 1 - Fraction(1, max(1, 2 * len(weights) - 2)) if len(weights) > 1 else 0
    assert Fraction(away, order.period) <= bound, weights
    for prefix in (0, 1, order.period - 1, order.period, count):
        assert order.counts(prefix) == np.bincount(members[:prefix], minlength=len(weights)).tolist(), (weights, prefix)


def test_golden_orders():
    """For ever: a resumed run must meet the order it left."""
    assert drawn(order_of(1), 3) == "000"
    assert drawn(order_of(0.95, 0.05), 40) == "0000000000100000000000000000001000000000"
    assert drawn(order_of(0.7, 0.3), 20) == "01000100100100010010"
    assert drawn(order_of(5, 3, 2), 20) == "01020102010102010201"
    assert drawn(order_of(1, 1, 1, 1), 8) == "01230123"
    assert drawn(order_of("1/3", "1/2", "1/6"), 12) == "101201101201"
    assert drawn(order_of(137.2, 56.1, 3, 0.9), 60) == "001000100100100100010010010001001001002001000100100010010010"


def test_a_draw_is_the_same_whatever_is_asked_beside_it():
    order = order_of(13, 7, 1)
    members, ranks = order(np.arange(210))
    shuffled = np.random.default_rng(0).permutation(210)
    assert np.array_equal(order(shuffled)[0], members[shuffled])
    assert np.array_equal(order(shuffled)[1], ranks[shuffled])
    far = 21 * 10**15
    later_members, later_ranks = order(np.arange(far, far + 210))
    assert np.array_equal(later_members, members)
    assert np.array_equal(later_ranks, ranks + 10**15 * np.array([13, 7, 1])[members])
    assert order.counts(far + 1) == [13 * 10**15 + 1, 7 * 10**15, 10**15]


def test_only_the_ratios_of_the_weights_enter_and_all_their_digits():
    assert drawn(order_of("0.7", "0.2", "0.1"), 30) == drawn(order_of(14, 4, 2), 30)
    assert order_of("0.7", "0.2", "0.1").period == 10, "0.7 was taken as the nearest binary fraction"
    assert order_of("137.2", "0.001").shares == (Fraction(137200, 137201), Fraction(1, 137201))


@pytest.mark.parametrize("seed", range(20))
def test_the_longest_prefix_with_so_many_draws_of_a_source(seed: int):
    order = order_of(*random_weights(seed))
    for limit in (0, 1, 5, 37):
        longest = order.longest(0, limit)
        assert (order.counts(longest)[0], order.counts(longest + 1)[0]) == (limit, limit + 1), seed


def test_weights_that_no_order_can_be_made_of():
    with pytest.raises(InputError, match=r"repeat only after 20,000,003 samples.* such as 300 700$"):
        order_of("6.000001", 14.000002)
    with pytest.raises(InputError, match=r"weights 1 0: give one or more, each above 0"):
        order_of(1, 0)
    with pytest.raises(ValueError, match="start at 0"):
        order_of(1, 2)(np.array([-1]))


@pytest.mark.parametrize("text", ["", "x", "-1", "nan", "inf", "1/0", "1e999", "1_0", " 1", "1.5/2", "٣"])
def test_what_is_no_exact_number_is_refused(text: str):
    with pytest.raises(ValueError, match=r"is not a number such as|divides by zero"):
        exact_share(text)


def test_exact_numbers_and_how_they_are_shown():
    texts = {"0.05": "1/20", "137.2": "686/5", "5e-3": "1/200", "1/3": "1/3", "2/4": "1/2", "1": "1", ".5": "1/2"}
    assert {text: str(exact_share(text)) for text in texts} == texts
    assert [percent(Fraction(text)) for text in ("1/20", "1/3", "1", "1/10000")] == ["5 %", "33.3 %", "100 %", "0.01 %"]
