"""Fast tokenizers, and the comparison with the reference library that goes on for as long as they are used.

That a fast one gives the same ids is proved by tests (tests/faults/test_tokenizer_identity.py) for the models that its
module admits. A proof may have a gap, so some documents of every job are encoded by the reference library as well: a
difference ends the job before it can spread.
"""

import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megalrps.data.tokenizer import CutAtSpaces, Encoded, Tokenizer
from megalrps.errors import InputError

ONE_IN = 1024
"""Share of the documents that are compared: those whose hash says so, whichever worker has them."""
FIRST = 4
"""Documents that a tokenizer compares before any other."""
_HASHED_CHARACTERS = 256
_COMPARED_CHARACTERS = 16_384
WORD_END = re.compile(r"[A-Za-z](?= )")
"""Where long texts are cut."""
_SHOWN_CHARACTERS = 60


class OutsideError(Exception):
    """Why a fast backend is not used for a model: one line."""


class FastBackend(Protocol):
    """What computes ids in place of the reference library."""

    name: str
    """With its version, if it has one of its own."""
    can_be_cut: bool
    """Whether the ids of a text that ends where a space follows a letter are the first ids of the longer text."""
    cut_at_spaces: CutAtSpaces
    """As in Tokenizer."""
    ids_behind: int
    """Ids that are added behind those of every text."""

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """As in Tokenizer."""


class CheckedTokenizer:
    """A fast backend in the place of ``reference``, with which some documents are compared; it is of one thread."""

    def __init__(self, reference: Tokenizer, fast: FastBackend, model: Path) -> None:
        self.kind, self.vocab_size = reference.kind, reference.vocab_size
        self.eod, self.fingerprint = reference.eod, reference.fingerprint
        self.backend, self.cut_at_spaces = fast.name, fast.cut_at_spaces
        self.why = f"same ids as {reference.backend}, which one document in {ONE_IN:,} is compared with"
        self._reference, self._fast, self._model = reference, fast, model
        self._first = FIRST

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Token ids of the texts, in order; InputError where those of the reference differ."""
        encoded = self._fast.encode_batch(texts)
        chosen = [i for i, text in enumerate(texts) if i < self._first or _is_chosen(text)]
        self._first = max(0, self._first - len(texts))
        if chosen:
            ends = np.cumsum(encoded.lengths)
            for i in chosen:
                self._compare(texts[i], encoded.tokens[ends[i] - encoded.lengths[i] : ends[i]])
        return encoded

    def _compare(self, text: str, ids: npt.NDArray[np.int32] | npt.NDArray[np.uint32]) -> None:
        beginning = self._beginning(text)
        expected = self._reference.encode_batch([beginning]).tokens
        if len(beginning) < len(text):
            expected = expected[: expected.size - self._fast.ids_behind]
            ids = ids[: expected.size]
        if not np.array_equal(expected, ids):
            shown = text[:_SHOWN_CHARACTERS]
            raise InputError(
                f"--tokenizer-model {self._model}: {self.backend} and {self._reference.backend} give different tokens "
                f"for the document that begins {shown!a}; pass --tokenizer-backend reference"
            )

    def _beginning(self, text: str) -> str:
        """The text, or of a long one as much as is enough, where it can be cut."""
        if not self._fast.can_be_cut or len(text) <= _COMPARED_CHARACTERS:
            return text
        found = WORD_END.search(text, _COMPARED_CHARACTERS)
        return text[: found.end()] if found else text


def _is_chosen(text: str) -> bool:
    head = text[:_HASHED_CHARACTERS].encode(errors="surrogatepass")
    return zlib.crc32(head, len(text) & 0xFFFF_FFFF) % ONE_IN == 0
