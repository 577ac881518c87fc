"""How many faults each test of this folder injects, from which seed, and what came of them.

``conftest.py`` sets what pytest's options say (--full-faults, --faults-seed, --faults-json) before a test file is
read, so that :func:`count` and :func:`seed` hold in parametrisation too.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

FIXED_SEED = 20_240_607


@dataclasses.dataclass
class Session:
    """What the options say of this session, and which figures this process has recorded."""

    full: bool = False
    seed: int = FIXED_SEED
    json_file: Path | None = None
    recorded: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def parts(self) -> Path | None:
        """The lines of :func:`record` until the session ends, from every worker."""
        return None if self.json_file is None else self.json_file.with_name(self.json_file.name + ".parts")


SESSION = Session()


def count(name: str, small: int, full: int) -> int:
    """``small``, or ``full`` with --full-faults. ``name`` says in the source of which fault."""
    if not 0 < small <= full:
        raise ValueError(f"{name}: 0 < small <= full, not {small} and {full}")
    return full if SESSION.full else small


def seed() -> int:
    """The seed of every random fault: fixed; with --full-faults a fresh one a session, or that of --faults-seed."""
    return SESSION.seed


def record(name: str, **figures: Any) -> None:
    """Keep a fault's figures (JSON values) for --faults-json: ``{name: figures}``; calls of one name add to each other.

    A figure recorded twice is an error: one of the two would be lost.
    """
    known = SESSION.recorded.setdefault(name, {})
    merge(name, known, figures)
    line = json.dumps({name: figures}) + "\n"
    if SESSION.parts is not None:
        descriptor = os.open(SESSION.parts, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(descriptor, line.encode())  # one write, so that the lines of two workers do not mix
        finally:
            os.close(descriptor)


def merge(name: str, known: dict[str, Any], figures: dict[str, Any]) -> None:
    """Add ``figures`` to those ``known`` of ``name``."""
    if twice := sorted(known.keys() & figures.keys()):
        raise ValueError(f"{name}: recorded twice: {', '.join(twice)}")
    known.update(figures)


def write_figures() -> None:
    """At the end of the session: the lines of all workers as one JSON object in --faults-json's file."""
    if SESSION.json_file is None or SESSION.parts is None:
        return
    figures: dict[str, dict[str, Any]] = {}
    for line in SESSION.parts.read_text().splitlines() if SESSION.parts.exists() else ():
        for name, part in json.loads(line).items():
            merge(name, figures.setdefault(name, {}), part)
    SESSION.json_file.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n")
    SESSION.parts.unlink(missing_ok=True)
