"""Dates of documents."""

import functools
import re
from datetime import date

_DATE = re.compile(r"(\d{4})(?:-(\d\d)(?:-(\d\d)(?:[T ].*)?)?)?", re.ASCII | re.DOTALL)
_CACHED = 1 << 12


def parse_day(value: object) -> str | None:
    """The day (``YYYY-MM-DD``) of a date or time; the first one of a month or year; None for anything else."""
    return _parse(value) if isinstance(value, str) else None


@functools.lru_cache(_CACHED)
def _parse(value: str) -> str | None:
    found = _DATE.fullmatch(value)
    if found is None:
        return None
    try:
        return date(*(int(part or 1) for part in found.groups())).isoformat()
    except ValueError:
        return None
