"""How references follow the checkpoints that training makes, and how they are put right when a launch opens a lineage.

All of it under the lineage's lock and with the path's fencing number looked at first. Imports no torch.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from megalrps.checkpoint.errors import CorruptCheckpointError, DamagedReferenceError, LostCheckpointError
from megalrps.checkpoint.leases import HeldLeases
from megalrps.checkpoint.lineage import Lineage, read_lineage, refuse_unknown_format
from megalrps.checkpoint.manifest import read_manifest
from megalrps.checkpoint.names import REFUSED, hide, path_of
from megalrps.checkpoint.record import CheckpointRecord
from megalrps.checkpoint.references import LockedReferences, Reference, References

Publish = Callable[[Callable[[], None], str], None]
"""What makes a checkpoint that is written visible: it is given the rename, to be called once, and the digest."""


def publish_at_once(rename: Callable[[], None], digest: str) -> None:
    """Nobody has to be asked and no reference moved."""
    rename()


class Publisher:
    """Moves the references of the paths that ``leases`` hold, and of no others.

    ``heads`` is where each path's head was when this launch last moved or read it: what compare-and-swap compares.
    """

    def __init__(self, references: References, leases: HeldLeases) -> None:
        self.references = references
        self.leases = leases
        self.heads: dict[str, str | None] = {}

    def publish(self, name: str, record: CheckpointRecord) -> Publish:
        """What :meth:`megalrps.checkpoint.store.Store.save` calls to make the checkpoint ``name`` visible.

        Raises FencedError or MovedReferenceError, before anything is visible, where another launch has the path.
        """

        def publish(rename: Callable[[], None], digest: str) -> None:
            with self.references.locked() as locked:
                fence = self.leases.check(locked, record.path)
                expected = self._head(record.path)
                locked.check("heads", record.path, expected)  # before the checkpoint is visible, not after
                rename()
                self._keep(locked, name, record, digest, fence)
                locked.move("heads", record.path, name, digest, expected=expected, fence=fence)
                self.heads[record.path] = name

        return publish

    def step_back(self, path: str, to: str | None, digest: str = "") -> None:
        """Point the head of ``path`` to the older ``to``, or to nothing: what it pointed to turned out damaged."""
        with self.references.locked() as locked:
            fence = self.leases.check(locked, path)
            head = self._head(path)
            if head is not None and to is None:
                locked.drop("heads", path, expected=head)
            elif to is not None:
                locked.move("heads", path, to, digest, expected=head, fence=fence)
            self.heads[path] = to

    def set_aside(self, name: str, checkpoints: Path) -> Path:
        """Hide the damaged checkpoint ``name`` and keep its files for a person; returns where they are.

        Raises FencedError where another launch has its path: by now it may have saved a whole one of that name.
        """
        with self.references.locked() as locked:
            self.leases.check(locked, path_of(name))
            return hide(checkpoints, name, REFUSED)

    def reconcile(self, checkpoints: Path) -> list[str]:
        """Bring references and checkpoints together after whatever has happened to earlier launches; what to say.

        A head goes forward to a whole checkpoint whose launch died between the rename and the move, and back from a
        periodic one that is damaged; references of older versions' runs are made. Raises LostCheckpointError where a
        reference points to nothing, and CorruptCheckpointError where it points to a damaged fork or release, or to
        other bytes than it says: neither is mended without a person. Raises UnknownFormatError for a checkpoint of our
        paths, or one that a reference points to, that a later version of ours has made.
        """
        with self.references.locked() as locked:
            lineage = read_lineage(checkpoints)  # under the lock: launches of other paths commit meanwhile
            for name in lineage.refused:
                if path_of(name) in self.leases.paths:
                    refuse_unknown_format(checkpoints / name)
            said = list(self._remade(locked))
            for reference in self.references.all():
                if reference.kind != "heads":
                    self._check(reference, lineage, checkpoints)
            for path in sorted(self.leases.paths):
                fence = self.leases.check(locked, path)
                for name in lineage.all():
                    record = lineage.records[name]
                    # one that is there was looked at above; of two releases of a version, it says which counts
                    if (
                        record.path == path
                        and record.permanent
                        and self.references.read(*_keeper(name, record)) is None
                    ):
                        self._keep(locked, name, record, read_manifest(checkpoints / name).digest, fence)
                said += self._settle_head(locked, path, lineage, checkpoints, fence)
        return said

    def _remade(self, locked: LockedReferences) -> Iterator[str]:
        """Set damaged heads of our paths aside: what they said follows from the checkpoints."""
        for path in sorted(self.leases.paths):
            try:
                self.references.read("heads", path)
            except DamagedReferenceError as error:
                locked.set_aside("heads", path)
                yield f"{error}: made again from the checkpoints"

    def _check(self, reference: Reference, lineage: Lineage, checkpoints: Path) -> None:
        name = reference.checkpoint
        mend = (
            f"restore {checkpoints / name} from a copy, or give it up by python tools/lineage.py forget "
            f"{reference.title} --run {checkpoints.parent} (what a plan still needs of it is trained again)"
        )
        if name in lineage.refused:
            refuse_unknown_format(checkpoints / name)
            raise CorruptCheckpointError(f"{reference.title}: {lineage.refused[name]}; {mend}")
        if name not in lineage.records:
            raise LostCheckpointError(f"{reference.title} points to {name}, which is not there: {mend}")
        digest = read_manifest(checkpoints / name).digest
        if digest != reference.digest:
            raise CorruptCheckpointError(
                f"{reference.title} points to {name} of digest {reference.digest[:12]}, but {digest[:12]} is there: "
                f"{mend}"
            )

    def _settle_head(
        self, locked: LockedReferences, path: str, lineage: Lineage, checkpoints: Path, fence: int
    ) -> Iterator[str]:
        reference = self.references.read("heads", path)
        head = reference.checkpoint if reference else None
        self.heads[path] = head
        if reference is not None and head not in lineage.refused:
            self._check(reference, lineage, checkpoints)
        newest = next((name for name in reversed(lineage.all()) if lineage.records[name].path == path), None)
        if newest == head:
            return
        if newest is None:
            assert head is not None
            locked.drop("heads", path, expected=head)
            yield f"heads/{path} pointed to {head}, which is damaged: the path is begun again where it starts"
        else:
            digest = read_manifest(checkpoints / newest).digest
            locked.move("heads", path, newest, digest, expected=head, fence=fence)
            if head is not None:
                yield f"heads/{path} moved from {head} to {newest}"
        self.heads[path] = newest

    def _head(self, path: str) -> str | None:
        return self.heads.get(path)

    def _keep(self, locked: LockedReferences, name: str, record: CheckpointRecord, digest: str, fence: int) -> None:
        """Make the reference that keeps a permanent checkpoint for good."""
        if not record.permanent:
            return
        kind, title = _keeper(name, record)
        found = self.references.read(kind, title)
        if found is None or (found.checkpoint, found.digest) != (name, digest):
            locked.move(kind, title, name, digest, expected=found.checkpoint if found else None, fence=fence)


def _keeper(name: str, record: CheckpointRecord) -> tuple[str, str]:
    """Kind and name of the reference that keeps the permanent checkpoint ``name`` for good."""
    return ("releases", record.version) if record.kind == "release" else ("forks", name)
