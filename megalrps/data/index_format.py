"""The format of Megatron's indexed dataset: names of the files, header and token types of the index.

Both files are byte for byte those of Megatron-LM's ``IndexedDataset`` (``megatron/core/datasets/indexed_dataset.py``),
so datasets go both ways. All numbers are little-endian; an index has these parts, nothing between and nothing after:

====== ===== ==========================================================================================
offset bytes content
====== ===== ==========================================================================================
0      9     magic ``MMIDIDX\\0\\0``
9      8     version 1, uint64
17     1     dtype code of the tokens, uint8
18     8     number of sequences S, uint64
26     8     number of entries of the document array D = documents + 1, uint64
34     4 S   length of each sequence in tokens, int32
..     8 S   byte offset of each sequence in ``PREFIX.bin``, int64
..     8 D   index of the first sequence of each document, int64, then S
====== ===== ==========================================================================================
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np

from megalrps.errors import InputError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPE_CODES: dict[str, int] = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}
"""Codes of the integer token types. 6 and 7 are floats, in an order that differs between versions: refused."""
REMAKE = "run tools/preprocess_data.py again"
"""The mend for a damaged dataset, in every message about one."""

_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_NAMES = {code: name for name, code in DTYPE_CODES.items()}
HEADER_BYTES = _HEADER.size
LONGEST_SEQUENCE = 2**31 - 1
_UINT16_VOCABULARY = 65500


def bin_path(prefix: Path | str) -> Path:
    """The file of the token ids of the dataset ``prefix``."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path | str) -> Path:
    """The index of the dataset ``prefix``; a dataset exists when this file does."""
    return Path(f"{prefix}.idx")


def manifest_path(prefix: Path | str) -> Path:
    """The increment manifest of the dataset ``prefix`` (see :mod:`megalrps.data.manifest`)."""
    return Path(f"{prefix}.json")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type Megatron stores the ids of ``vocab_size`` tokens in: uint16 for fewer than 65500, else int32."""
    return np.dtype(np.uint16 if vocab_size < _UINT16_VOCABULARY else np.int32)


def blocks_path(prefix: Path | str) -> Path:
    """The digests of the blocks of both files of the dataset ``prefix`` (see :mod:`megalrps.data.block_digests`)."""
    return Path(f"{prefix}.blocks")


def index_bytes(sequences: int, documents: int) -> int:
    """Size of an index of so many sequences and documents (Python integers: no count can overflow)."""
    return HEADER_BYTES + 12 * sequences + 8 * (documents + 1)


def index_header(dtype: np.dtype[Any], sequences: int, documents: int) -> bytes:
    """The first bytes of an index."""
    return _HEADER.pack(MAGIC, VERSION, DTYPE_CODES[dtype.name], sequences, documents + 1)


def parse_header(header: bytes, size: int, path: Path) -> tuple[np.dtype[Any], int, int]:
    """Token type, number of sequences and of document entries of an index that begins with ``header``.

    InputError, naming ``path``, if its ``size`` does not fit them.
    """
    if len(header) < HEADER_BYTES or header[: len(MAGIC)] != MAGIC:
        raise InputError(f"{path}: not an index of token data (bad magic bytes); check the data path, or {REMAKE}")
    _, version, code, sequences, document_entries = _HEADER.unpack(header[:HEADER_BYTES])
    if version != VERSION:
        raise InputError(f"{path}: index version {version}, where only {VERSION} is known; {REMAKE}")
    if code not in _DTYPE_NAMES:
        kind = "tokens of a floating-point type" if code in (6, 7) else f"an unknown token type (code {code})"
        raise InputError(f"{path}: holds {kind}; {REMAKE}")
    expected = index_bytes(sequences, document_entries - 1)
    if sequences and size == expected + sequences:
        raise InputError(f"{path}: a multimodal index (a mode for each sequence); write the text without --multimodal")
    if size != expected or document_entries == 0:
        raise InputError(f"{path}: has {size} bytes where its header says {expected}: cut short or damaged; {REMAKE}")
    return np.dtype(_DTYPE_NAMES[code]).newbyteorder("<"), sequences, document_entries
