"""The keyed permutation: a bijection, uniform, and the same for ever in every implementation."""

import hashlib
from math import factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalrps.data.permutation import IMPLEMENTATION, LARGEST_SIZE, ROUNDS, KeyedPermutation
from megalrps.errors import InputError

IMPLEMENTATIONS = ["numpy", "native"] if IMPLEMENTATION == "native" else ["numpy"]

# (size, key, images of 0, 1, 2, ...). Never change these: they are the order of every run ever trained.
GOLDEN = [
    (1, b"", [0]),
    (2, b"a", [1, 0]),
    (7, b"megalrps", [6, 1, 2, 0, 5, 3, 4]),
    (10, b"megalrps", [6, 4, 2, 1, 5, 7, 3, 8]),
    (1000, b"megalrps", [299, 105, 354, 575, 458, 227, 643, 700]),
    (10**12, b"megalrps", [346157966617, 938028800222, 601947010030, 882822309170, 930983379903]),
    (2**62, b"megalrps", [795647102693467483, 1676452302535541, 2654965716508427431, 3606553735406091690]),
]


def whole(size, key=b"key", implementation=IMPLEMENTATION):
    return KeyedPermutation(size, key, implementation=implementation)(np.arange(size))


def by_definition(size, key, index):
    """The permutation in plain Python integers, from its definition."""
    width = (size - 1).bit_length()
    low_bits = width // 2
    while True:
        high, low = divmod(index, 1 << low_bits)
        for number in range(ROUNDS):
            digest = hashlib.blake2b(
                size.to_bytes(8, "little") + key, digest_size=8, salt=bytes([number]), person=b"megalrps-order"
            ).digest()
            counter = low if number % 2 else high
            mixed = (int.from_bytes(digest, "little") + 0x9E3779B97F4A7C15 * counter) % 2**64
            mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
            mixed ^= mixed >> 31
            if number % 2:
                high ^= mixed % (1 << (width - low_bits))
            else:
                low ^= mixed % (1 << low_bits)
        index = (high << low_bits) + low
        if index < size:
            return index


def assert_uniform(counts):
    """Chi-square: counts of equally likely outcomes lie within five standard deviations of what chance gives."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    assert expected >= 5
    statistic = float(((counts - expected) ** 2).sum() / expected)
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("size", "key", "images"), GOLDEN)
def test_golden_order(size, key, images, implementation):
    assert KeyedPermutation(size, key, implementation=implementation)(np.arange(len(images))).tolist() == images


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 40) | st.integers(1, LARGEST_SIZE), key=st.binary(max_size=80), data=st.data())
def test_every_implementation_follows_the_definition(size, key, data):
    indices = data.draw(st.lists(st.integers(0, size - 1), max_size=5))
    expected = [by_definition(size, key, index) for index in indices]
    for implementation in IMPLEMENTATIONS:
        permutation = KeyedPermutation(size, key, implementation=implementation)
        assert permutation(np.array(indices, np.int64)).tolist() == expected


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_bijection_of_every_size(implementation):
    small = range(1, 10_001) if implementation == "native" else [*range(1, 70), *range(70, 2050, 13)]
    for size in [*small, 2**16 - 1, 2**16, 2**16 + 1, 300_007]:
        # As many images as places, none below 0, none beyond the last, none twice.
        assert np.array_equal(np.bincount(whole(size, implementation=implementation)), np.ones(size)), size


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_orders_of_a_tiny_set_are_equally_likely(size):
    orders = [tuple(whole(size, number.to_bytes(4, "big")).tolist()) for number in range(4000)]
    counts = {order: orders.count(order) for order in set(orders)}
    assert len(counts) == factorial(size)
    assert_uniform(np.array(list(counts.values())))


@pytest.mark.parametrize("size", [5, 6, 7, 8, 9, 12, 16, 17, 20])
def test_every_index_goes_everywhere_equally_often(size):
    orders = np.stack([whole(size, number.to_bytes(4, "big")) for number in range(3000)])
    assert_uniform(np.bincount((orders + size * np.arange(size)).ravel(), minlength=size * size))
    pairs = orders[:, 0] * size + orders[:, 1]
    counts = np.bincount(pairs, minlength=size * size).reshape(size, size)
    assert_uniform(counts[~np.eye(size, dtype=bool)])


@pytest.mark.parametrize("size", [65_536, 100_003, 10**9 + 7, LARGEST_SIZE])
def test_a_large_order_shows_no_pattern(size):
    # At most a tenth of the images, or drawing without replacement makes the counts more even than chance would.
    images = KeyedPermutation(size, b"key")(np.arange(min(60_000, size // 10)))
    assert np.unique(images).size == images.size
    assert_uniform(np.bincount((images.astype(np.float64) / size * 100).astype(int), minlength=100))
    assert_uniform(np.bincount(images & 63, minlength=64))
    # Neighbours are unrelated: the place of an image in eighths against that of the next image.
    eighths = (images.astype(np.float64) / size * 8).astype(int)
    assert_uniform(np.bincount(eighths[:-1:2] * 8 + eighths[1::2], minlength=64))


def test_keys_and_sizes_give_unrelated_orders():
    first, other_key, other_size = whole(5000, b"a"), whole(5000, b"b"), whole(5001, b"a")[:5000]
    assert np.count_nonzero(first == other_key) < 10
    assert np.count_nonzero(first == other_size) < 10


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_answer_does_not_depend_on_what_else_is_asked(implementation):
    permutation = KeyedPermutation(1000, b"key", implementation=implementation)
    images = permutation(np.arange(1000))
    assert permutation(np.arange(1000)[::-3]).tolist() == images[::-3].tolist()
    assert permutation(np.array([7, 7])).tolist() == [images[7]] * 2
    assert permutation(np.array([], np.int64)).size == 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "indices", [np.array([10]), np.array([-1]), np.array([1.0]), np.zeros((1, 1), np.int64), np.array(3), [1]]
)
def test_indices_outside_or_of_another_kind_are_refused(implementation, indices):
    with pytest.raises(ValueError, match="indices must"):
        KeyedPermutation(10, b"key", implementation=implementation)(indices)


def test_sizes_outside_the_range_and_unknown_implementations_are_refused():
    for size in (0, -1, LARGEST_SIZE + 1):
        with pytest.raises(ValueError, match="size from 1"):
            KeyedPermutation(size, b"key")
    with pytest.raises(ValueError, match="neither"):
        KeyedPermutation(1, b"key", implementation="fast")


def test_native_must_be_built_to_be_asked_for(monkeypatch):
    monkeypatch.setattr("megalrps.data.permutation._native", None)
    with pytest.raises(InputError, match="build_ext --inplace"):
        KeyedPermutation(1, b"key", implementation="native")


def test_the_extension_checks_its_arguments_itself():
    native = pytest.importorskip("megalrps._native", reason="the compiled extension was not built")
    indices, keys = np.arange(3), np.ones(ROUNDS, np.uint64)
    assert sorted(native.permute(indices, 3, keys).tolist()) == [0, 1, 2]
    for wrong in ((indices, 2, keys), (indices, 0, keys), (indices, 2**62 + 1, keys), (-indices, 3, keys)):
        with pytest.raises(ValueError, match=r"size must|is outside"):
            native.permute(*wrong)
    with pytest.raises(ValueError, match="one dimension"):
        native.permute(indices[None], 3, keys)
    for wrong in ((indices[::2], 3, keys), (indices.astype(np.int32), 3, keys), (indices, 3, keys.astype(np.int64))):
        with pytest.raises(TypeError):
            native.permute(*wrong)
