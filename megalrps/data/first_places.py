"""Which of equal texts stays: the first one of the earliest increment, whatever the order in which they are read."""

import hashlib
from array import array

import numpy as np
import numpy.typing as npt

_BUCKETS = 64


class FirstPlaces:
    """Looks at all texts once, in any order, and then says of each, in the same order, whether it is the first one.

    Memory: a digest of 16 bytes and the increment, 18 bytes a text, and about 3 more while they are sorted; afterwards
    1 bit a text. Of 2^64 different texts, two would have one digest.
    """

    def __init__(self) -> None:
        self._digests = bytearray()
        self._increments = array("H")
        self._stay: npt.NDArray[np.uint8] | None = None
        self._texts = self._asked = 0

    def look(self, text: str, increment: int) -> None:
        """One text more, of the increment number ``increment``."""
        self._digests += hashlib.blake2b(text.encode(), digest_size=16).digest()
        self._increments.append(increment)
        self._texts += 1

    def take(self) -> bool:
        """Whether the next of the texts that were looked at is the first one."""
        if self._stay is None:
            self._stay = self._find()
        if self._asked == self._texts:
            raise RuntimeError("more texts are asked for than were looked at")
        byte, bit = divmod(self._asked, 8)
        self._asked += 1
        return bool(self._stay[byte] >> (7 - bit) & 1)

    def _find(self) -> npt.NDArray[np.uint8]:
        """A bit for each text; sorted by parts of the digests, so that little memory is added."""
        digests = np.frombuffer(self._digests, "<u8").reshape(-1, 2)
        increments = np.frombuffer(self._increments, np.uint16)
        stay = np.zeros(self._texts, np.bool_)
        bucket_of = (digests[:, 0] % _BUCKETS).astype(np.uint8)
        for bucket in range(_BUCKETS):
            places = np.flatnonzero(bucket_of == bucket)
            low, high, increment = digests[places, 0], digests[places, 1], increments[places]
            order = np.lexsort((increment, high, low))  # stable: of equal ones, the first read stays first
            low, high = low[order], high[order]
            is_first = np.ones(len(order), np.bool_)
            is_first[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
            stay[places[order[is_first]]] = True
        del digests, increments
        self._digests, self._increments = bytearray(), array("H")
        return np.packbits(stay)
