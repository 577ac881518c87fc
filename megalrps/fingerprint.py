"""Fingerprints: what makes "the same plan", "the same data" or "the same config" a comparison of two short strings."""

import hashlib
import json
from pathlib import Path
from typing import Any

_READ_BYTES = 1 << 20


def canonical_json(value: Any) -> str:
    """The one JSON text of ``value``: keys sorted, no white space, shortest float repr, no NaN or infinity.

    Raises TypeError for what JSON cannot hold and ValueError for a non-finite float.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(value: Any) -> str:
    """SHA-256 of the canonical JSON of ``value``, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_digest(path: Path | str) -> str:
    """SHA-256 of the bytes of the file ``path``, as 64 hexadecimal digits; reads it in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
