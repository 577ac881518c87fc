"""References: small files that say which checkpoints are acknowledged, and so what must never be lost. No torch.

    heads/PATH        the newest checkpoint of a path; moved at every commit
    forks/CHECKPOINT  a state that branches start from; made before the first step of a branch
    releases/VERSION  what a version's users have
    pins/NAME         what a person wants kept

A reference is moved by compare-and-swap under one lock, together with the rename that makes its checkpoint, so whoever
has lost a path neither adds to it nor moves it. What is reachable from references is never collected
(:mod:`megalrps.checkpoint.garbage`): the object model is that of git.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from megalrps.checkpoint.errors import (
    CheckpointError,
    DamagedReferenceError,
    MissingCheckpointError,
    MovedReferenceError,
)
from megalrps.checkpoint.names import REFUSED, check_name, hidden_name
from megalrps.checkpoint.sealed import read_sealed, write_sealed
from megalrps.errors import InputError
from megalrps.files import locked, sync_directory

FORMAT = 1
KINDS = ("heads", "forks", "releases", "pins")

_LOCK = "lock"
_MENDS = dict.fromkeys(KINDS, "the next launch of its path makes it again from the checkpoints") | {
    "pins": "pin the checkpoint again (tools/lineage.py pin)"
}


@dataclass(frozen=True)
class Reference:
    """``kind``/``name`` points to ``checkpoint``, whose manifest has ``digest``."""

    kind: str
    """One of KINDS."""
    name: str
    checkpoint: str
    digest: str
    fence: int
    """The fencing number of the lease it was moved under; 0: by hand."""
    moved: str
    """When, UTC, ISO 8601: for people; nothing is decided by it."""
    note: str = ""
    """Why, for a pin."""

    @property
    def title(self) -> str:
        """As a command line names it."""
        return f"{self.kind}/{self.name}"


class References:
    """The references of one lineage, in ``RUN/lineage``."""

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)

    def prepare(self) -> None:
        """Make the directories where they are not."""
        for kind in KINDS:
            (self.directory / kind).mkdir(parents=True, exist_ok=True)
        sync_directory(self.directory)
        sync_directory(self.directory.parent)

    def read(self, kind: str, name: str) -> Reference | None:
        """The reference, None where there is none; DamagedReferenceError or UnknownFormatError as its file says."""
        path = self._file(kind, name)
        mend = f"remove it (tools/lineage.py forget {kind}/{name}); {_MENDS[kind]}"
        value = read_sealed(path, FORMAT, mend)
        if value is None:
            return None
        try:
            found = Reference(**{key: member for key, member in value.items() if key != "format"})
        except TypeError as error:
            raise DamagedReferenceError(f"{path} is no reference ({error}): {mend}") from error
        if (found.kind, found.name) != (kind, name):
            raise DamagedReferenceError(f"{path} belongs to {found.title}: {mend}")
        return found

    def all(self) -> tuple[Reference, ...]:
        """Every reference, by kind and name; raises as :meth:`read`."""
        found = (self.read(kind, name) for kind in KINDS for name in self.names(kind))
        return tuple(reference for reference in found if reference is not None)

    def readable(self) -> tuple[Reference, ...]:
        """Those of :meth:`all` whose files are whole; :meth:`damaged` says what is wrong with the others."""
        found: list[Reference] = []
        for kind in KINDS:
            for name in self.names(kind):
                with suppress(CheckpointError, InputError):
                    found += [reference] if (reference := self.read(kind, name)) else []
        return tuple(found)

    def damaged(self) -> tuple[str, ...]:
        """Why each file that is no reference is none; one line each, naming the file."""
        complaints = []
        for kind in KINDS:
            for name in self.names(kind):
                try:
                    self.read(kind, name)
                except (CheckpointError, InputError) as error:
                    complaints.append(str(error))
        return tuple(complaints)

    @contextmanager
    def locked(self) -> Iterator["LockedReferences"]:
        """Hold the lineage's one lock: everything that decides what is kept, written or collected is done under it."""
        with locked(self.directory / _LOCK):
            yield LockedReferences(self)

    def names(self, kind: str) -> tuple[str, ...]:
        """Of all references of a kind, those whose files are damaged too."""
        directory = self.directory / kind
        if not directory.is_dir():
            return ()
        return tuple(sorted(entry.stem for entry in directory.glob("*.json") if not entry.name.startswith(".")))

    def _file(self, kind: str, name: str) -> Path:
        assert kind in KINDS
        return self.directory / kind / f"{check_name(name)}.json"


class LockedReferences:
    """What may be done to references, and by whom: who holds :meth:`References.locked`."""

    def __init__(self, references: References) -> None:
        self.references = references

    def move(
        self,
        kind: str,
        name: str,
        checkpoint: str,
        digest: str,
        *,
        expected: str | None,
        fence: int = 0,
        note: str = "",
    ) -> Reference:
        """Point ``kind``/``name``, which points to ``expected`` (None: does not exist), to a committed checkpoint.

        Durable when it returns. Raises MovedReferenceError, and changes nothing, where it points elsewhere.
        """
        self.check(kind, name, expected)
        moved = datetime.now(UTC).isoformat(timespec="seconds")
        reference = Reference(kind, name, check_name(checkpoint), digest, fence, moved, note)
        write_sealed(self.references._file(kind, name), {"format": FORMAT, **asdict(reference)})
        return reference

    def drop(self, kind: str, name: str, *, expected: str) -> None:
        """Remove ``kind``/``name``, which points to ``expected``, durably; raises as :meth:`move`."""
        self.check(kind, name, expected)
        path = self.references._file(kind, name)
        path.unlink()
        sync_directory(path.parent)

    def set_aside(self, kind: str, name: str) -> Path:
        """Hide the damaged file of ``kind``/``name`` and keep it for a person; returns where it is."""
        path = self.references._file(kind, name)
        aside = path.with_name(hidden_name(name, REFUSED))
        path.rename(aside)
        sync_directory(path.parent)
        return aside

    def check(self, kind: str, name: str, expected: str | None) -> None:
        """Raise MovedReferenceError, or MissingCheckpointError where there is none, unless it points to ``expected``.

        None: it does not exist.
        """
        found = self.references.read(kind, name)
        points_to = found.checkpoint if found else None
        if points_to != expected:
            if points_to is None:
                raise MissingCheckpointError(f"there is no reference {kind}/{name} in {self.references.directory}")
            raise MovedReferenceError(
                f"{kind}/{name} points to {points_to}, not to {expected or 'nothing'}: somebody else has moved it"
            )
