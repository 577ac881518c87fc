"""``--allow CHANGE=reason``: which changes a launch asks for, and which ones its lineage has taken note of.

A decision is recorded in every checkpoint that is made after it, as ``allowed: {CHANGE: {was, is, reason}}``; where the
same option was changed before, ``earlier`` has those decisions, oldest first. The one with the most before it counts.
"""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from megalrps.checkpoint.lineage import Lineage
from megalrps.errors import InputError
from megalrps.training.decisive import CHANGEABLE, FIXED, FREE, ROUNDING

OF_DATA = "data."
"""Before the name of an increment whose content is another."""

Decisions = Mapping[str, Mapping[str, Any]]
"""By CHANGE: ``was``, ``is``, ``reason``, and ``earlier`` where there were any."""


@dataclass(frozen=True)
class Change:
    """That an option, or the content of an increment, is another than a checkpoint was trained with; JSON values.

    ``name`` is what --allow calls it: a flag without its dashes, or data.INCREMENT.
    """

    name: str
    was: Any
    now: Any

    def __str__(self) -> str:
        if self.name.startswith(OF_DATA):
            return f"increment {self.name.removeprefix(OF_DATA)} has other content than the one trained on"
        return f"--{self.name} was {text_of(self.was)} and is {text_of(self.now)}"


def flag(option: str) -> str:
    """The name of an option on the command line, without dashes before it."""
    return option.replace("_", "-")


def text_of(value: Any) -> str:
    """A value of an option, for a message."""
    if value is None or value == []:
        return "unset"
    return " ".join(str(item) for item in value) if isinstance(value, list) else str(value)


def reasons_given(texts: Collection[str], increments: Collection[str]) -> dict[str, str]:
    """CHANGE -> reason of the ``texts`` of --allow; raises InputError for one that says nothing, or asks too much."""
    changeable = {*map(flag, CHANGEABLE), *(OF_DATA + name for name in increments)}
    reasons: dict[str, str] = {}
    for text in texts:
        change, equals, reason = (part.strip() for part in text.partition("="))
        if not equals or not change or not reason:
            raise InputError(f"--allow {text!r}: say what is changed, and why, as in --allow lr='diverged at step 900'")
        if change in reasons:
            raise InputError(f"--allow {change} is given twice: give one reason")
        if change not in changeable:
            raise _not_to_be_allowed(change, changeable)
        reasons[change] = reason
    return reasons


def _not_to_be_allowed(change: str, changeable: Collection[str]) -> InputError:
    option = change.replace("-", "_")
    if option in FIXED:
        return InputError(f"--allow {change} is not possible: {FIXED[option]}")
    if option in ROUNDING | FREE:
        return InputError(f"--allow {change} is not needed: it may change at any time; leave it out")
    near = difflib.get_close_matches(change, changeable, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return InputError(f"--allow {change} is unknown: {hint}It is one of {', '.join(sorted(changeable))}")


def decisions_of(lineage: Lineage) -> dict[str, Mapping[str, Any]]:
    """The last decision about each change that any checkpoint of ``lineage`` records."""
    last: dict[str, Mapping[str, Any]] = {}
    for name in lineage.all():
        for change, decision in lineage.records[name].allowed.items():
            if change not in last or _turn(decision) > _turn(last[change]):
                last[change] = decision
    return last


def texts_of(decisions: Decisions) -> list[str]:
    """The decisions in words, for the log."""
    return [
        f"{Change(change, each['was'], each['is'])} ({each['reason']})" for change, each in sorted(decisions.items())
    ]


def decision(change: Change, reason: str, before: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is recorded of a ``change`` that is made for ``reason``, after the decision ``before`` about the same."""
    made = {"was": change.was, "is": change.now, "reason": reason}
    if before is None:
        return made
    last = {key: value for key, value in before.items() if key != "earlier"}
    return made | {"earlier": [*before.get("earlier", ()), last]}


def _turn(decision: Mapping[str, Any]) -> int:
    return len(decision.get("earlier", ()))
