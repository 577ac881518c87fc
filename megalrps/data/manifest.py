"""The increment manifest ``PREFIX.json``: what a Megatron dataset does not say about itself.

Name, counts, the tokenizer, SHA-256 digests of both files, and a digest of itself, so that a changed byte is noticed.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megalrps.data.indexed import DTYPE_CODES, REMAKE, IndexedDataset, bin_path, idx_path, manifest_path
from megalrps.errors import InputError
from megalrps.files import write_json
from megalrps.fingerprint import file_digest, fingerprint

FORMAT = "megalrps-increment"
VERSION = 1

_LARGEST_FILE = 1 << 24
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_READ_TOKENS = 1 << 20


@dataclass(frozen=True)
class TokenizerIdentity:
    """Which tokenizer made the tokens; two datasets can be trained together when these are equal."""

    kind: str
    """Megatron's name of the tokenizer type, e.g. ``SentencePieceTokenizer``."""
    vocab_size: int
    """Number of token ids, before any padding of the embedding."""
    eod: int
    """Id of the end-of-document token."""
    fingerprint: str
    """Digest of the tokenizer's files."""


@dataclass(frozen=True)
class IncrementManifest:
    """Everything known about an increment without reading its tokens."""

    name: str
    """Name of the increment: letters, digits, ``.``, ``_``, ``-``."""
    tokens: int
    documents: int
    """Documents, those without tokens included."""
    sequences: int
    text_bytes: int
    """UTF-8 bytes of the text that became the tokens (bits per byte are counted against it)."""
    dtype: str
    """Integer type of the stored tokens, e.g. ``uint16``."""
    append_eod: bool
    """Whether each document ends with the end-of-document token."""
    tokenizer: TokenizerIdentity
    bin_digest: str
    """SHA-256 of ``PREFIX.bin``."""
    idx_digest: str
    """SHA-256 of ``PREFIX.idx``."""
    sources: tuple[str, ...]
    """The files the text was read from, as the user named them."""

    @property
    def fingerprint(self) -> str:
        """Identity of the content: both files and the tokenizer, whatever the increment's name and place."""
        return fingerprint({"bin": self.bin_digest, "idx": self.idx_digest, "tokenizer": asdict(self.tokenizer)})

    def to_json(self) -> dict[str, Any]:
        """The manifest as the object stored in ``PREFIX.json``, its own digest included."""
        body = {"format": FORMAT, "version": VERSION, **asdict(self), "sources": list(self.sources)}
        return {**body, "digest": fingerprint(body)}

    @classmethod
    def from_json(cls, value: Any) -> "IncrementManifest":
        """The manifest of a stored object; ValueError says what is wrong with it."""
        body = _checked_body(value)
        tokenizer = TokenizerIdentity(**_typed_fields(TokenizerIdentity, body.pop("tokenizer", None)))
        sources = body.pop("sources", None)
        if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
            raise ValueError("sources is not a list of file names")
        manifest = cls(
            tokenizer=tokenizer, sources=tuple(sources), **_typed_fields(cls, body, ("tokenizer", "sources"))
        )
        manifest.check()
        return manifest

    def check(self) -> None:
        """Raise ValueError for values that no increment can have."""
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name {self.name!r} is not made of letters, digits, '.', '_' and '-'")
        if min(self.tokens, self.documents, self.sequences, self.text_bytes, self.tokenizer.eod) < 0:
            raise ValueError("a count is negative")
        if self.tokenizer.eod >= self.tokenizer.vocab_size:
            raise ValueError(f"end-of-document token {self.tokenizer.eod} is outside the vocabulary")
        if self.dtype not in DTYPE_CODES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPE_CODES)}")
        if not all(_DIGEST.fullmatch(digest) for digest in (self.bin_digest, self.idx_digest)):
            raise ValueError("a digest is not 64 hexadecimal digits")


def describe_dataset(
    prefix: Path | str,
    *,
    name: str,
    tokenizer: TokenizerIdentity,
    text_bytes: int,
    append_eod: bool,
    sources: tuple[str, ...],
) -> IncrementManifest:
    """The manifest of the finished dataset ``prefix``: opens it, counts, and reads both files once for their digests.

    Raises InputError for a name that cannot be used and for token ids outside the tokenizer's vocabulary.
    """
    dataset = IndexedDataset(prefix)
    _check_vocabulary(dataset, tokenizer.vocab_size)
    manifest = IncrementManifest(
        name=name,
        tokens=dataset.tokens.size,
        documents=dataset.document_count,
        sequences=len(dataset),
        text_bytes=text_bytes,
        dtype=dataset.dtype.name,
        append_eod=append_eod,
        tokenizer=tokenizer,
        bin_digest=file_digest(bin_path(prefix)),
        idx_digest=file_digest(idx_path(prefix)),
        sources=sources,
    )
    try:
        manifest.check()
    except ValueError as error:
        raise InputError(f"{prefix}: cannot be an increment: {error}") from None
    return manifest


def check_increment_name(name: str) -> None:
    """Raise InputError unless ``name`` can name an increment (it becomes part of file names and of reports)."""
    if not _NAME.fullmatch(name):
        raise InputError(f"--name {name!r}: use 1 to 128 letters, digits, '.', '_' and '-', a letter or digit first")


def write_manifest(prefix: Path | str, manifest: IncrementManifest) -> Path:
    """Write ``manifest`` at ``PREFIX.json``, atomically; the increment is complete from then on."""
    path = manifest_path(prefix)
    write_json(path, manifest.to_json())
    return path


def read_manifest(prefix: Path | str) -> IncrementManifest:
    """Read ``PREFIX.json``; InputError, naming file and mend, where it is missing, damaged or of another version."""
    path = manifest_path(prefix)
    try:
        with open(path, "rb") as file:
            content = file.read(_LARGEST_FILE + 1)
    except FileNotFoundError:
        raise InputError(f"{path}: no such manifest; check the path, {REMAKE}, or tools/adopt_dataset.py") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the data path") from error
    if len(content) > _LARGEST_FILE:
        raise InputError(f"{path}: larger than any manifest; check the data path, or {REMAKE}")
    try:
        return IncrementManifest.from_json(json.loads(content))
    except (ValueError, RecursionError) as error:  # ValueError covers bad JSON and bad UTF-8
        raise InputError(f"{path}: not a valid increment manifest ({error}); {REMAKE}") from None


def _checked_body(value: Any) -> dict[str, Any]:
    """The fields of a stored manifest whose format, version and digest are right."""
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ValueError(f"it does not say format {FORMAT!r}")
    if value.get("version") != VERSION:
        raise ValueError(f"format version {value.get('version')!r}, where only {VERSION} is known")
    body = {key: item for key, item in value.items() if key != "digest"}
    if value.get("digest") != fingerprint(body):
        raise ValueError("its digest does not fit its content")
    return {key: item for key, item in body.items() if key not in ("format", "version")}


def _typed_fields(kind: type, value: Any, without: tuple[str, ...] = ()) -> Mapping[str, Any]:
    """``value``, if it has the fields of the dataclass ``kind`` but ``without``, each of its type; or ValueError."""
    types = {field.name: field.type for field in fields(kind) if field.name not in without}
    if not isinstance(value, dict) or value.keys() != types.keys():
        raise ValueError(f"it does not have exactly the fields {', '.join(types)}")
    wrong = [name for name, expected in types.items() if type(value[name]) is not expected]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: not of the right type")
    return value


def _check_vocabulary(dataset: IndexedDataset, vocab_size: int) -> None:
    for start in range(0, dataset.tokens.size, _READ_TOKENS):
        block = dataset.tokens[start : start + _READ_TOKENS]
        low, high = int(block.min()), int(block.max())
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise InputError(
                f"{bin_path(dataset.prefix)}: token id {wrong} is outside the tokenizer's vocabulary of {vocab_size}; "
                "pass the tokenizer that made these tokens"
            )
