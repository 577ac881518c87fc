"""Reading JSON that other programs write and edit: every surprise is one line naming file, place and mend."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from megalrps.errors import InputError


class Fields:
    """The members of one JSON object of a file, taken by name and type.

    ``place`` says where in ``source`` the object stands (``releases[0]``; empty for the file's own object), ``mend``
    what the user can do about a file that is not what it should be. Every method raises InputError for a missing member
    or one of another type.
    """

    def __init__(self, value: Any, source: Path | str, place: str, mend: str) -> None:
        self.source, self.place, self.mend = source, place, mend
        if not isinstance(value, dict):
            self.refuse(f"a JSON object is expected, not {type(value).__name__}")
        self._members: dict[str, Any] = value

    def refuse(self, complaint: str) -> NoReturn:
        where = f" ({self.place})" if self.place else ""
        raise InputError(f"{self.source}{where}: {complaint}; {self.mend}")

    def only(self, required: Iterable[str], optional: Iterable[str] = ()) -> None:
        """Refuse members that are missing or unknown, all of them in one message."""
        required = list(required)
        if missing := [name for name in required if name not in self._members]:
            self.refuse(f"no {', '.join(map(repr, missing))}")
        if unknown := sorted(set(self._members) - set(required) - set(optional)):
            self.refuse(f"unknown {', '.join(map(repr, unknown))}")

    def __contains__(self, name: str) -> bool:
        return self._members.get(name) is not None

    def _get(self, name: str) -> Any:
        if name not in self._members:
            self.refuse(f"no {name!r}")
        return self._members[name]

    def text(self, name: str) -> str:
        value = self._get(name)
        if not isinstance(value, str) or not value:
            self.refuse(f"{name!r} must be a text that is not empty, not {value!r}")
        return value

    def count(self, name: str) -> int:
        """A whole number, zero or more."""
        value = self._get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            self.refuse(f"{name!r} must be a whole number >= 0, not {value!r}")
        return value

    def number(self, name: str) -> float:
        """Any number, infinities and not-a-number included: a diverged run logs them."""
        value = self._get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(f"{name!r} must be a number, not {value!r}")
        return float(value)

    def size(self, name: str) -> float:
        """A finite number, zero or more."""
        value = self.number(name)
        if not math.isfinite(value) or value < 0:
            self.refuse(f"{name!r} must be a finite number >= 0, not {value!r}")
        return value

    def sizes(self, name: str) -> dict[str, float]:
        """An object of finite numbers >= 0, in the file's order."""
        inner = self.inner(name)
        return {key: inner.size(key) for key in inner.names()}

    def inner(self, name: str) -> "Fields":
        return Fields(self._get(name), self.source, self._below(name), self.mend)

    def list_of(self, name: str) -> "list[Fields]":
        value = self._get(name)
        if not isinstance(value, list):
            self.refuse(f"{name!r} must be a list, not {value!r}")
        return [
            Fields(item, self.source, f"{self._below(name)}[{index}]", self.mend) for index, item in enumerate(value)
        ]

    def names(self) -> list[str]:
        return list(self._members)

    def members(self) -> Mapping[str, Any]:
        return self._members

    def _below(self, name: str) -> str:
        return f"{self.place}.{name}" if self.place else name


def read_fields(path: Path, mend: str) -> Fields:
    """The one JSON object of the file ``path``; InputError when it cannot be read, is no JSON or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {mend}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {mend}") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise InputError(f"{path}: not JSON ({error}); {mend}") from None
    return Fields(value, path, "", mend)
