"""A keyed permutation of [0, size): the order of samples, computed on the fly instead of stored.

An alternating Feistel network permutes w-bit numbers, 2^w being the smallest power of two that is not below ``size``.
A result outside [0, size) is permuted again until it is inside ("cycle walking": Black and Rogaway, Ciphers with
arbitrary finite domains, CT-RSA 2002); that takes fewer than two tries on average. Nothing is built, so opening costs
the same at any size.

The order defined here is for ever: checkpoints refer to samples by their place in it. The tests hold golden values.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from megalrps.errors import InputError
from megalrps.fingerprint import canonical_json

try:
    import megalrps._native as _native
except ImportError:  # not built: see setup.py
    _native = None

IMPLEMENTATION = "numpy" if _native is None else "native"
"""What computes permutations here: ``native`` (csrc/permutation.cpp) where it was built, else ``numpy``."""

LARGEST_SIZE = 1 << 62
ROUNDS = 16
"""Each round halves the distance to a uniform choice among all permutations of 3 or 4 elements; after 16 it is 2e-5."""

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class KeyedPermutation:
    """The bijection of [0, ``size``) that belongs to ``key``, for any size from 1 to 2^62.

    Both implementations give the same numbers. ``native`` runs without the GIL and answers a small batch some 25 times
    faster than ``numpy``, which pays for its many calls; for large batches they are alike.
    """

    def __init__(self, size: int, key: bytes, *, implementation: str = IMPLEMENTATION) -> None:
        """Derive the round keys of ``size`` and ``key``; ValueError for a size outside [1, 2^62]."""
        if not 1 <= size <= LARGEST_SIZE:
            raise ValueError(f"a permutation has a size from 1 to 2^62, not {size}")
        if implementation not in ("numpy", "native"):
            raise ValueError(f"implementation {implementation!r} is neither numpy nor native")
        if implementation == "native" and _native is None:
            raise InputError("the compiled extension is missing: run python setup.py build_ext --inplace")
        self.size = size
        self.implementation = implementation
        self._round_keys = _round_keys(size, key)

    def __call__(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where each of ``indices``, a flat int64 array [n] in [0, size), is sent: int64 [n]; ValueError for others."""
        if not isinstance(indices, np.ndarray) or indices.dtype != np.int64 or indices.ndim != 1:
            raise ValueError("indices must be a flat numpy array of int64")
        if self.implementation == "native":
            try:
                return _native.permute(np.require(indices, requirements=("C", "A")), self.size, self._round_keys)
            except ValueError as error:  # csrc looks at each index anyway
                raise ValueError(f"indices must lie in [0, {self.size}): {error}") from None
        if indices.size and not (int(indices.min()) >= 0 and int(indices.max()) < self.size):
            raise ValueError(f"indices must lie in [0, {self.size})")
        return _permute(indices, self.size, self._round_keys)


class EpochOrders:
    """The order in which ``size`` samples are drawn, epoch after epoch: each draws every one once, in its own order.

    ``key`` is all that decides the order beside the epoch: JSON values. Several threads may draw at once.
    """

    def __init__(self, size: int, key: Mapping[str, object]) -> None:
        self.size = size
        self._key = dict(key)
        self._permutations: dict[int, KeyedPermutation] = {}

    def __call__(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The number in [0, size) of each of draws ``indices`` [n] (int64), [n]; ValueError for a negative one."""
        size, listed = self.size, indices.tolist()
        epoch = listed[0] // size if listed else 0
        if not listed or (min(listed) >= epoch * size and max(listed) < (epoch + 1) * size):  # nearly always
            return self._permutation(epoch)(indices - epoch * size if epoch else indices)
        epochs, places = np.divmod(indices, size)
        drawn = np.empty_like(places)
        for each in np.unique(epochs):
            of_epoch = epochs == each
            drawn[of_epoch] = self._permutation(int(each))(places[of_epoch])
        return drawn

    def _permutation(self, epoch: int) -> KeyedPermutation:
        if epoch < 0:
            raise ValueError("sample indices start at 0")
        if epoch not in self._permutations:
            key = hashlib.blake2b(canonical_json({"epoch": epoch, **self._key}).encode()).digest()
            self._permutations[epoch] = KeyedPermutation(self.size, key)
        return self._permutations[epoch]


def _round_keys(size: int, key: bytes) -> npt.NDArray[np.uint64]:
    """A 64-bit key for each round, [ROUNDS]; hashing in the size makes the orders of two sizes unrelated."""
    message = size.to_bytes(8, "little") + key
    digests = (
        hashlib.blake2b(message, digest_size=8, salt=round_.to_bytes(1, "little"), person=b"megalrps-order").digest()
        for round_ in range(ROUNDS)
    )
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def _permute(indices: npt.NDArray[np.int64], size: int, round_keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """The reference: csrc/permutation.cpp computes the same, number by number."""
    width = (size - 1).bit_length()
    values = _encrypt(indices.astype(np.uint64), width, round_keys)
    outside = np.flatnonzero(values >= np.uint64(size))
    while outside.size:
        walked = _encrypt(values[outside], width, round_keys)
        values[outside] = walked
        outside = outside[walked >= np.uint64(size)]
    return values.astype(np.int64)


def _encrypt(values: npt.NDArray[np.uint64], width: int, round_keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Permute [0, 2^width): even rounds change the low half by the high one, odd rounds the reverse."""
    low_bits = width // 2
    low_mask = np.uint64((1 << low_bits) - 1)
    high_mask = np.uint64((1 << (width - low_bits)) - 1)
    low, high = values & low_mask, values >> np.uint64(low_bits)
    for round_, round_key in enumerate(round_keys):
        if round_ % 2 == 0:
            low ^= _split_mix(round_key, high) & low_mask
        else:
            high ^= _split_mix(round_key, low) & high_mask
    return (high << np.uint64(low_bits)) | low


def _split_mix(seed: Any, counter: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Number ``counter`` of the SplitMix64 stream from ``seed`` (Steele, Lea, Flood, OOPSLA 2014), modulo 2^64."""
    mixed = counter * _GAMMA
    mixed += seed
    mixed ^= mixed >> np.uint64(30)
    mixed *= _MIX_1
    mixed ^= mixed >> np.uint64(27)
    mixed *= _MIX_2
    mixed ^= mixed >> np.uint64(31)
    return mixed
