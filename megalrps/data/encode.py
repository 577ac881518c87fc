"""Tokenizing one part of the input: texts in, a file of tokens out for each key, and what is to be known of them.

A part's file holds the tokens of its documents end to end, as the dataset stores them, and then the number of tokens
of each document, int64.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from megalrps.data.dates import parse_day
from megalrps.data.json_lines import BadDocument, Documents, Text
from megalrps.data.parts import Part, read_part
from megalrps.data.tokenizer import CutAtSpaces, Encoded, Tokenizer, load_tokenizer

_PIECE_BYTES = 1 << 20
_WORD_END = re.compile(rb"[A-Za-z](?= )")
PART_SUFFIX = ".tokens"
"""What the files of finished parts end in."""


@dataclass(frozen=True)
class EncoderSpec:
    """How documents become tokens; small, so that it travels to workers."""

    tokenizer_type: str
    tokenizer_model: str
    eod_token: str | None
    special_tokens: bool
    backend: str
    json_keys: tuple[str, ...]
    date_key: str | None
    append_eod: bool
    """End each document that has tokens with the end-of-document token."""
    dtype: str
    """Integer type that the tokens are stored in."""
    stop_at_bad: bool
    """Whether a bad line ends its part at once: whoever puts the parts together will stop there."""


@dataclass(frozen=True)
class EncodedTexts:
    """The documents of one part under one key."""

    tokens: int
    documents: int
    empty: int
    """Documents without tokens."""
    text_bytes: int
    """UTF-8 bytes of the texts."""
    digest: str
    """SHA-256 of the part's file."""


@dataclass(frozen=True)
class BadTally:
    """Bad lines of one kind in one part."""

    count: int
    first: int
    """Number of the first one among the part's lines, from 1."""
    detail: str


@dataclass(frozen=True)
class EncodedPart:
    """What was made of one part."""

    number: int
    whole: bool
    """False where a bad line ended the work; there are then no files."""
    lines: int
    """Lines or rows, blank ones included."""
    texts: dict[str, EncodedTexts]
    """By key."""
    bad: dict[str, BadTally]
    """By kind."""
    days: tuple[str, str] | None
    """First and last day among the documents' dates."""
    undated: int
    """Documents without a date, where dates were asked for."""

    def to_json(self) -> dict[str, Any]:
        """As an object of a journal."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "EncodedPart":
        """The inverse of :meth:`to_json`; KeyError or TypeError for what cannot be."""
        texts = {key: EncodedTexts(**each) for key, each in value["texts"].items()}
        bad = {kind: BadTally(**each) for kind, each in value["bad"].items()}
        days = tuple(value["days"]) if value["days"] is not None else None
        return cls(**{**value, "texts": texts, "bad": bad, "days": days})


def part_path(folder: Path, number: int, key_position: int) -> Path:
    """The file of part ``number`` for the key at ``key_position``."""
    return folder / f"{number:08d}.{key_position}{PART_SUFFIX}"


def partial_part_path(folder: Path, number: int, key_position: int, run: str) -> Path:
    """The same, until the part is accepted, of the run called ``run``."""
    return folder / f"{number:08d}.{key_position}.{run}.partial"


class PartEncoder:
    """Tokenizes parts into files of ``folder``, under the partial names of ``run`` until somebody accepts them."""

    def __init__(self, spec: EncoderSpec, folder: Path, run: str, tokenizer: Tokenizer | None = None) -> None:
        """``tokenizer``: that of ``spec``, if it is loaded already."""
        self._spec = spec
        self._folder, self._run = folder, run
        self._tokenizer = tokenizer or load_tokenizer(
            spec.tokenizer_type,
            spec.tokenizer_model,
            eod_token=spec.eod_token,
            special_tokens=spec.special_tokens,
            backend=spec.backend,
        )

    def describe(self) -> str:
        """What tokenizes, and why that."""
        return f"{self._tokenizer.backend}: {self._tokenizer.why}"

    def encode(self, part: Part) -> EncodedPart:
        """Read, tokenize and write ``part``."""
        spec = self._spec
        tally = _PartTally(part.number, bool(spec.date_key))
        with ExitStack() as stack:
            files = [
                stack.enter_context(_TokensFile(partial_part_path(self._folder, part.number, place, self._run)))
                for place in range(len(spec.json_keys))
            ]
            for documents in read_part(part, spec.json_keys, spec.date_key):
                tally.add(documents)
                if documents.bad and spec.stop_at_bad:
                    return tally.finished(whole=False, texts={})
                self._encode(documents, files)
            texts = {key: file.finish() for key, file in zip(spec.json_keys, files, strict=True)}
        return tally.finished(whole=True, texts=texts)

    def _encode(self, documents: Documents, files: Sequence["_TokensFile"]) -> None:
        for file in files:
            texts = documents.texts.pop(0)
            if any(isinstance(text, bytearray) for text in texts):
                self._encode_singly(texts, file)
                continue
            strings = cast(list[str], texts)
            text_bytes = sum(len(text) if text.isascii() else len(text.encode()) for text in strings)
            file.add(self._stored(self._tokenizer.encode_batch(strings)), text_bytes)

    def _encode_singly(self, texts: list[Text], file: "_TokensFile") -> None:
        """The same for texts of which some are long: these in pieces, where the tokenizer can be asked for pieces."""
        texts.reverse()
        while texts:
            text = texts.pop()  # and gone
            size = len(text.encode()) if isinstance(text, str) else len(text)
            tokens = 0
            for piece in pieces_of(text, self._tokenizer.cut_at_spaces):
                encoded = self._tokenizer.encode_batch([piece])
                del piece
                tokens += encoded.tokens.size
                file.add_tokens(encoded.tokens.astype(self._spec.dtype, copy=False))
                del encoded
            if tokens and self._spec.append_eod:
                file.add_tokens(np.array([self._tokenizer.eod], self._spec.dtype))
                tokens += 1
            file.add_lengths(np.array([tokens]), size)

    def _stored(self, encoded: Encoded) -> Encoded:
        if self._spec.append_eod:
            encoded = with_eod(encoded, self._tokenizer.eod)
        return Encoded(encoded.tokens.astype(self._spec.dtype, copy=False), encoded.lengths)


def pieces_of(text: Text, cut_at_spaces: CutAtSpaces) -> Iterator[str]:
    """``text`` as strings that are tokenized one after the other; whole, unless it is long and can be cut."""
    start = 0
    if isinstance(text, bytearray) and cut_at_spaces is not None:
        while len(text) - start > 2 * _PIECE_BYTES and (found := _WORD_END.search(text, start + _PIECE_BYTES)):
            if len(text) - found.end() < _PIECE_BYTES:
                break
            yield text[start : found.end()].decode()
            start = found.end() + (cut_at_spaces == "drop")
    yield text if isinstance(text, str) else text[start:].decode() if start else text.decode()


def with_eod(encoded: Encoded, eod: int) -> Encoded:
    """``encoded`` with the token ``eod`` at the end of every document that has tokens."""
    filled = encoded.lengths > 0
    lengths = encoded.lengths + filled
    tokens = np.empty(encoded.tokens.size + np.count_nonzero(filled), np.int32)
    ends = np.cumsum(lengths)[filled] - 1
    is_text = np.ones(tokens.size, np.bool_)
    is_text[ends] = False
    tokens[is_text] = encoded.tokens
    tokens[ends] = eod
    return Encoded(tokens, lengths)


class _TokensFile:
    """Writes the file of one part and key; a context manager that leaves nothing of an unfinished one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self._lengths: list[npt.NDArray[np.int64]] = []
        self._tokens = self._text_bytes = 0
        self._finished = False

    def __enter__(self) -> "_TokensFile":
        self._file: IO[bytes] = open(self._path, "wb", buffering=0)
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        if not self._finished:
            self._path.unlink(missing_ok=True)

    def add(self, encoded: Encoded, text_bytes: int) -> None:
        """Append documents made of ``text_bytes``."""
        self.add_tokens(encoded.tokens)
        self.add_lengths(encoded.lengths, text_bytes)

    def add_tokens(self, tokens: npt.NDArray[Any]) -> None:
        """Append tokens [T] of documents whose lengths follow."""
        self._write(np.ascontiguousarray(tokens, tokens.dtype.newbyteorder("<")).data.cast("B"))
        self._tokens += tokens.size

    def add_lengths(self, lengths: npt.NDArray[np.int64], text_bytes: int) -> None:
        """Append the lengths [n] of documents made of ``text_bytes``."""
        self._lengths.append(lengths)
        self._text_bytes += text_bytes

    def finish(self) -> EncodedTexts:
        """Write the lengths; what is in the file."""
        lengths = np.concatenate([np.empty(0, "<i8"), *self._lengths])
        self._write(lengths.data.cast("B"))
        self._finished = True
        empty = int(np.count_nonzero(lengths == 0))
        return EncodedTexts(self._tokens, lengths.size, empty, self._text_bytes, self._digest.hexdigest())

    def _write(self, content: memoryview) -> None:
        self._digest.update(content)
        while len(content):
            content = content[self._file.write(content) :]


class _PartTally:
    """What adds up while a part is read."""

    def __init__(self, number: int, dated: bool) -> None:
        self._number = number
        self._dated = dated
        self._lines = self._undated = 0
        self._bad: dict[str, BadTally] = {}
        self._days: tuple[str, str] | None = None

    def add(self, documents: Documents) -> None:
        for bad in documents.bad:
            self._add_bad(bad)
        self._lines += documents.lines
        if self._dated:
            days = [day for date in documents.dates if (day := parse_day(date)) is not None]
            self._undated += len(documents.numbers) - len(days)
            if days:
                found = self._days or (days[0], days[0])
                self._days = min(found[0], *days), max(found[1], *days)

    def _add_bad(self, bad: BadDocument) -> None:
        known = self._bad.get(bad.kind) or BadTally(0, self._lines + bad.number, bad.detail)
        self._bad[bad.kind] = BadTally(known.count + 1, known.first, known.detail)

    def finished(self, *, whole: bool, texts: dict[str, EncodedTexts]) -> EncodedPart:
        return EncodedPart(self._number, whole, self._lines, texts, self._bad, self._days, self._undated)


def read_lengths(file: IO[bytes], texts: EncodedTexts, token_bytes: int) -> npt.NDArray[np.int64]:
    """The tokens of each document [n] of a part's open file; leaves the file at its start."""
    file.seek(texts.tokens * token_bytes)
    content = file.read(8 * texts.documents)
    file.seek(0)
    return np.frombuffer(content, "<i8").astype(np.int64)
