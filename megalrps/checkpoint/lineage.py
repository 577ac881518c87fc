"""The lineage: what has really been trained, read from the committed manifests alone. Imports no torch.

There is no index beside the manifests that could disagree with them. A damaged or foreign directory is never used in
silence: it is listed in :attr:`Lineage.refused` with the reason, and questions are answered from the others.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from megalrps.checkpoint.errors import CheckpointError, UnknownFormatError
from megalrps.checkpoint.manifest import read_manifest
from megalrps.checkpoint.names import checkpoint_directories
from megalrps.checkpoint.record import CheckpointRecord
from megalrps.errors import InputError


@dataclass(frozen=True)
class Lineage:
    """The checkpoints of one run by name, as they were when :func:`read_lineage` looked."""

    records: Mapping[str, CheckpointRecord]
    """What every usable checkpoint says of itself."""
    refused: Mapping[str, str]
    """Why each other directory in the store is not used, by its name; one line each."""

    def all(self) -> tuple[str, ...]:
        """All usable checkpoints, in the order of training: by step, then by name."""
        return tuple(sorted(self.records, key=lambda name: (self.records[name].step, name)))

    def finished(self, path: str, end: int, segment_fingerprint: str) -> str | None:
        """The checkpoint that ended the segment of ``path`` at step ``end``, or None: it is still to be trained."""
        found = self.resumable(path, segment_fingerprint, end - 1, end)
        return next((name for name in found if self.records[name].permanent), None)

    def latest(self, path: str, segment_fingerprint: str, start: int, end: int) -> str | None:
        """The newest checkpoint inside the segment (start, end] of ``path``, or None: begin at its start."""
        return next(iter(self.resumable(path, segment_fingerprint, start, end)), None)

    def resumable(self, path: str, segment_fingerprint: str, start: int, end: int) -> tuple[str, ...]:
        """All checkpoints inside the segment (start, end] of ``path``, newest first.

        For :meth:`megalrps.checkpoint.store.Store.load_first`: where a file turns out damaged, the next one is loaded.
        """
        inside = [
            (record.step, record.permanent, name)
            for name, record in self.records.items()
            if record.path == path and record.segment_fingerprint == segment_fingerprint and start < record.step <= end
        ]
        return tuple(name for _, _, name in sorted(inside, reverse=True))

    def ancestors(self, name: str) -> tuple[str, ...]:
        """The checkpoints ``name`` descends from, nearest first, as far as they are there; see :meth:`orphans`."""
        chain: list[str] = []
        parent = self.records[name].parent
        while parent is not None and parent in self.records:
            chain.append(parent)
            parent = self.records[parent].parent
        return tuple(chain)

    def children(self, name: str | None) -> tuple[str, ...]:
        """The checkpoints whose segments began from ``name`` (None: random weights), in the order of training."""
        return tuple(child for child in self.all() if self.records[child].parent == name)

    def orphans(self) -> Mapping[str, str]:
        """The checkpoints whose parent is missing or refused, with that parent's name."""
        parents = {name: self.records[name].parent for name in self.all()}
        return {name: parent for name, parent in parents.items() if parent is not None and parent not in self.records}

    def releases(self) -> tuple[str, ...]:
        """The released checkpoints, in the order of training."""
        return tuple(name for name in self.all() if self.records[name].kind == "release")

    def prunable(self, keep: int, used: Collection[str] = ()) -> tuple[str, ...]:
        """The periodic checkpoints that are not among the newest ``keep`` of their path, oldest first.

        Forks, releases and ends are never among them, nor is anything another checkpoint descends from or that is
        ``used``: what references and leases name.
        """
        if keep < 0:
            raise ValueError(f"cannot keep {keep} checkpoints")
        needed: set[str | None] = {*used, *(record.parent for record in self.records.values())}
        for path in {record.path for record in self.records.values()}:
            periodic = [
                name for name in self.all() if self.records[name].path == path and not self.records[name].permanent
            ]
            needed.update(periodic[max(0, len(periodic) - keep) :])
        return tuple(name for name in self.all() if not self.records[name].permanent and name not in needed)


def read_lineage(directory: Path) -> Lineage:
    """The lineage that the committed checkpoints in ``directory`` form; empty where there is no directory.

    Reads manifests, not tensors: that every byte of a checkpoint is right is found out when it is loaded.
    """
    records: dict[str, CheckpointRecord] = {}
    refused: dict[str, str] = {}
    for name in checkpoint_directories(directory):
        try:
            records[name] = CheckpointRecord.from_json(read_manifest(directory / name).record)
        except (CheckpointError, InputError) as error:
            refused[name] = str(error) if str(directory / name) in str(error) else f"{directory / name}: {error}"
        except ValueError as error:
            refused[name] = f"{directory / name} is not a checkpoint of a lineage ({error})"
    return Lineage(*_without_backward_parents(records, refused))


def refuse_unknown_format(checkpoint: Path) -> None:
    """Raise UnknownFormatError where the directory ``checkpoint`` is a whole one that a later version has made.

    It is not damaged: to go on without it would train again, and write over, what that version has trained.
    """
    try:
        CheckpointRecord.from_json(read_manifest(checkpoint).record)
    except UnknownFormatError as error:
        raise UnknownFormatError(f"checkpoint {checkpoint.name}: {error}") from error
    except (CheckpointError, ValueError):
        return


def _without_backward_parents(
    records: Mapping[str, CheckpointRecord], refused: Mapping[str, str]
) -> tuple[dict[str, CheckpointRecord], dict[str, str]]:
    """A child is trained after its parent; what says otherwise is refused, so that every chain of parents ends."""
    backward = {
        name: f"{name} (step {record.step}) names a parent, {record.parent}, that is not before it"
        for name, record in records.items()
        if record.parent is not None and record.parent in records and records[record.parent].step >= record.step
    }
    return {name: record for name, record in records.items() if name not in backward}, {**refused, **backward}
