"""The increment manifest ``PREFIX.json``: what a Megatron dataset does not say about itself.

Name, counts, the tokenizer, SHA-256 digests of both files and of groups of their blocks
(:mod:`megalrps.data.block_digests`), and a digest of itself, so that a changed byte is noticed. Version 1 had no
digests of blocks; it is read and written as it was.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from megalrps.data.block_digests import BLOCK_BYTES, GROUP_BLOCKS, BlockDigests, DatasetDigests
from megalrps.data.block_reading import digest_dataset
from megalrps.data.index_format import DTYPE_CODES, REMAKE, bin_path, index_bytes, manifest_path
from megalrps.data.indexed import IndexedDataset, IndexedDatasetWriter
from megalrps.errors import InputError
from megalrps.files import write_json
from megalrps.fingerprint import fingerprint

FORMAT = "megalrps-increment"
VERSION = 2
_WITHOUT_BLOCKS = 1

LARGEST_MANIFEST = 1 << 24
"""Bytes; the digests of 4 GiB of tokens take 70."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
DIGEST = re.compile(r"[0-9a-f]{64}")
_NOT_YET = "0" * 64


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
    blocks: BlockDigests | None = None
    """Digests of the groups of ``PREFIX.blocks``; None in a manifest of version 1."""

    @property
    def bin_bytes(self) -> int:
        """Size of ``PREFIX.bin``."""
        return self.tokens * np.dtype(self.dtype).itemsize

    @property
    def idx_bytes(self) -> int:
        """Size of ``PREFIX.idx``."""
        return index_bytes(self.sequences, self.documents)

    @property
    def fingerprint(self) -> str:
        """Identity of the content: both files and the tokenizer, whatever the increment's name and place."""
        return fingerprint({"bin": self.bin_digest, "idx": self.idx_digest, "tokenizer": asdict(self.tokenizer)})

    def to_json(self) -> dict[str, Any]:
        """The manifest as the object stored in ``PREFIX.json``, its own digest included."""
        version = _WITHOUT_BLOCKS if self.blocks is None else VERSION
        body = {"format": FORMAT, "version": version, **asdict(self), "sources": list(self.sources)}
        if self.blocks is None:
            del body["blocks"]
        else:
            groups = {name: list(body["blocks"][name]) for name in ("bin_groups", "idx_groups")}
            body["blocks"] = {**body["blocks"], **groups}
        return {**body, "digest": fingerprint(body)}

    @classmethod
    def from_json(cls, value: Any) -> "IncrementManifest":
        """The manifest of a stored object; ValueError says what is wrong with it."""
        body = checked_body(value, FORMAT, range(_WITHOUT_BLOCKS, VERSION + 1))
        blocks = _stored_blocks(body.pop("blocks", None)) if value["version"] == VERSION else None
        tokenizer = TokenizerIdentity(**typed_fields(TokenizerIdentity, body.pop("tokenizer", None)))
        sources = body.pop("sources", None)
        if not _is_list_of_text(sources):
            raise ValueError("sources is not a list of file names")
        manifest = cls(
            tokenizer=tokenizer,
            sources=tuple(sources),
            blocks=blocks,
            **typed_fields(cls, body, ("tokenizer", "sources", "blocks")),
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
        groups = () if self.blocks is None else (*self.blocks.bin_groups, *self.blocks.idx_groups)
        if not all(DIGEST.fullmatch(digest) for digest in (self.bin_digest, self.idx_digest, *groups)):
            raise ValueError("a digest is not 64 hexadecimal digits")
        if self.blocks is not None:
            self.blocks.check(self.bin_bytes, self.idx_bytes)


def describe_written(
    writer: IndexedDatasetWriter,
    *,
    name: str,
    tokenizer: TokenizerIdentity,
    text_bytes: int,
    append_eod: bool,
    sources: tuple[str, ...],
) -> IncrementManifest:
    """The manifest of what ``writer`` has just put in place; no file is read again.

    Raises InputError for a name that cannot be used and for token ids outside the tokenizer's vocabulary.
    """
    check_vocabulary(writer.prefix, 0, writer.highest_token, tokenizer.vocab_size)
    manifest = IncrementManifest(
        name=name,
        tokens=writer.token_count,
        documents=writer.document_count,
        sequences=writer.sequence_count,
        text_bytes=text_bytes,
        dtype=writer.dtype.name,
        append_eod=append_eod,
        tokenizer=tokenizer,
        sources=sources,
        **digest_fields(writer.digests),
    )
    return checked_manifest(writer.prefix, manifest)


def describe_dataset(
    prefix: Path | str,
    *,
    name: str,
    tokenizer: TokenizerIdentity,
    text_bytes: int,
    append_eod: bool,
    sources: tuple[str, ...],
    block_bytes: int = BLOCK_BYTES,
    group_blocks: int = GROUP_BLOCKS,
) -> IncrementManifest:
    """The manifest of the finished dataset ``prefix``: opens it, counts, and reads both files once for their digests.

    Writes those of the blocks to ``PREFIX.blocks``. Raises InputError for a name that cannot be used and for token ids
    outside the tokenizer's vocabulary.
    """
    dataset = IndexedDataset(prefix)

    def inspect(block: bytes) -> None:
        tokens = np.frombuffer(block, dataset.dtype)
        check_vocabulary(prefix, int(tokens.min()), int(tokens.max()), tokenizer.vocab_size)

    manifest = IncrementManifest(
        name=name,
        tokens=dataset.tokens_count,
        documents=dataset.document_count,
        sequences=len(dataset),
        text_bytes=text_bytes,
        dtype=dataset.dtype.name,
        append_eod=append_eod,
        tokenizer=tokenizer,
        sources=sources,
        bin_digest=_NOT_YET,
        idx_digest=_NOT_YET,
    )
    checked_manifest(prefix, manifest)  # before the time is spent
    digests = digest_dataset(prefix, block_bytes, group_blocks, inspect)
    return checked_manifest(prefix, replace(manifest, **digest_fields(digests)))


def digest_fields(digests: DatasetDigests) -> dict[str, Any]:
    """The fields of a manifest that hold ``digests``."""
    return {"bin_digest": digests.bin_digest, "idx_digest": digests.idx_digest, "blocks": digests.blocks}


def checked_manifest(prefix: Path | str, manifest: IncrementManifest) -> IncrementManifest:
    """``manifest``; InputError, naming ``prefix``, for values that no increment can have."""
    try:
        manifest.check()
    except ValueError as error:
        raise InputError(f"{prefix}: cannot be an increment: {error}") from None
    return manifest


def check_vocabulary(prefix: Path | str, lowest: int, highest: int, vocab_size: int) -> None:
    """Raise InputError unless token ids from ``lowest`` to ``highest`` lie in a vocabulary of ``vocab_size``."""
    if lowest < 0 or highest >= vocab_size:
        raise InputError(
            f"{bin_path(prefix)}: token id {lowest if lowest < 0 else highest} is outside the tokenizer's vocabulary "
            f"of {vocab_size}; pass the tokenizer that made these tokens"
        )


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
            content = file.read(LARGEST_MANIFEST + 1)
    except FileNotFoundError:
        raise InputError(f"{path}: no such manifest; check the path, {REMAKE}, or tools/adopt_dataset.py") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the data path") from error
    return parse_manifest(content, str(path))


def parse_manifest(content: bytes, name: str) -> IncrementManifest:
    """The manifest that the file ``name`` holds; InputError as :func:`read_manifest`."""
    if len(content) > LARGEST_MANIFEST:
        raise InputError(f"{name}: larger than any manifest; check the data path, or {REMAKE}")
    try:
        return IncrementManifest.from_json(json.loads(content))
    except (ValueError, RecursionError) as error:  # ValueError covers bad JSON and bad UTF-8
        raise InputError(f"{name}: not a valid increment manifest ({error}); {REMAKE}") from None


def checked_body(value: Any, stored_format: str, versions: range) -> dict[str, Any]:
    """The fields of a stored manifest whose format, version and digest are right; ValueError says what is not."""
    if not isinstance(value, dict) or value.get("format") != stored_format:
        raise ValueError(f"it does not say format {stored_format!r}")
    if type(value.get("version")) is not int or value["version"] not in versions:
        known = f"{versions[0]} is" if len(versions) == 1 else f"{versions[0]} to {versions[-1]} are"
        raise ValueError(f"format version {value.get('version')!r}, where only {known} known")
    body = {key: item for key, item in value.items() if key != "digest"}
    if value.get("digest") != fingerprint(body):
        raise ValueError("its digest does not fit its content")
    return {key: item for key, item in body.items() if key not in ("format", "version")}


def typed_fields(kind: type, value: Any, without: tuple[str, ...] = ()) -> Mapping[str, Any]:
    """``value``, if it has the fields of the dataclass ``kind`` but ``without``, each of its type; or ValueError."""
    types = {field.name: field.type for field in fields(kind) if field.name not in without}
    if not isinstance(value, dict) or value.keys() != types.keys():
        raise ValueError(f"it does not have exactly the fields {', '.join(types)}")
    wrong = [name for name, expected in types.items() if type(value[name]) is not expected]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: not of the right type")
    return value


def _stored_blocks(value: Any) -> BlockDigests:
    """The digests of blocks of a stored manifest."""
    lists = ("bin_groups", "idx_groups")
    if not isinstance(value, dict) or not all(_is_list_of_text(value.get(name)) for name in lists):
        raise ValueError("blocks does not have two lists of digests")
    numbers = typed_fields(BlockDigests, {key: item for key, item in value.items() if key not in lists}, lists)
    bin_groups, idx_groups = (tuple(value[name]) for name in lists)
    return BlockDigests(bin_groups=bin_groups, idx_groups=idx_groups, **numbers)


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
