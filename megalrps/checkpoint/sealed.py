"""Small JSON files that prove themselves: one text with its own digest, the seal, replaced whole. Imports no torch.

A flipped bit, half a file or one that was edited by hand is told from what was written.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalrps.checkpoint.errors import DamagedReferenceError, UnknownFormatError
from megalrps.files import write_text
from megalrps.fingerprint import fingerprint

_LARGEST_BYTES = 1 << 16


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Replace ``path`` by ``value`` (a JSON object) and its seal, the digest of it, atomically and durably."""
    sealed = {**value, "seal": fingerprint(dict(value))}
    write_text(path, json.dumps(sealed, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def read_sealed(path: Path, format_: int, mend: str) -> dict[str, Any] | None:
    """The object in ``path``, without its seal; None where there is no file.

    Raises DamagedReferenceError, ending with ``mend``, for a file that :func:`write_sealed` did not write, and
    UnknownFormatError for one whose ``format`` is not ``format_``.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_LARGEST_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DamagedReferenceError(f"{path} cannot be read ({error.strerror or os.strerror(0)}): {mend}") from error
    try:
        value = json.loads(content.decode())
        seal = value.pop("seal")
        written = json.dumps(value | {"seal": seal}, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        if seal != fingerprint(value) or written.encode() != content:
            raise ValueError("its seal is not that of its content")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedReferenceError(f"{path} is damaged ({type(error).__name__}: {error}): {mend}") from error
    if value.get("format") != format_:
        raise UnknownFormatError(
            f"{path}: format {value.get('format')!r}, this version reads {format_}: use the megalrps that wrote it"
        )
    return dict(value)
