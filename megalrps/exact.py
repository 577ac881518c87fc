"""Shares that users give as text, taken exactly: 0.7 is seven tenths, not the nearest binary fraction."""

import re
from fractions import Fraction

LARGEST_PERIOD = 1_000_000
"""Of an order in which sources are drawn by exact shares: the common denominator of the shares."""

_NUMBER = re.compile(r"[0-9]{1,18}(\.[0-9]{0,18})?(e-?[0-9]{1,2})?|\.[0-9]{1,18}|[0-9]{1,18}/[0-9]{1,18}")


def exact_share(text: str) -> Fraction:
    """The number that ``text`` writes, as 0.05, 137.2, 5e-3 or 1/3; never negative. ValueError for anything else."""
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{text!r} is not a number such as 0.05 or 1/3")
    try:
        return Fraction(text)
    except ZeroDivisionError:
        raise ValueError(f"{text!r} divides by zero") from None


def percent(share: Fraction) -> str:
    """A share for a reader: 5 %, 33.3 %, 0.01 %."""
    return f"{float(100 * share):.3g} %"
