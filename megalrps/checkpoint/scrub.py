"""The scrub: every byte of a run's checkpoints is read, and what references and parents promise is looked up. No torch.

Nothing is changed. Loading finds damage too, but only of what is loaded: a fork that a version of next year starts from
may rot unread, while a copy elsewhere is still whole.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from megalrps.checkpoint.errors import (
    CheckpointError,
    CorruptCheckpointError,
    DamagedReferenceError,
    LostCheckpointError,
    MissingCheckpointError,
    UnknownFormatError,
)
from megalrps.checkpoint.leases import Leases
from megalrps.checkpoint.lineage import Lineage, read_lineage, refuse_unknown_format
from megalrps.checkpoint.manifest import MANIFEST_FILE, Manifest, read_manifest
from megalrps.checkpoint.names import checkpoint_name
from megalrps.checkpoint.record import CheckpointRecord
from megalrps.checkpoint.references import KINDS, Reference, References
from megalrps.checkpoint.shards import Shard, damage
from megalrps.errors import EXIT_DAMAGED, EXIT_LOST, EXIT_UNKNOWN_FORMAT, InputError, ToldError

_THREADS = 8
_BY_STATUS: dict[int, type[ToldError]] = {
    EXIT_DAMAGED: CorruptCheckpointError,
    EXIT_LOST: LostCheckpointError,
    EXIT_UNKNOWN_FORMAT: UnknownFormatError,
}


@dataclass(frozen=True)
class Complaint:
    """One thing that is wrong: with which file or directory, in words, and the exit status that says its kind."""

    place: Path
    text: str
    status: int


@dataclass(frozen=True)
class Scrubbed:
    """What :func:`scrub` looked at, and what is wrong with it."""

    checkpoints: int
    files: int
    bytes: int
    seconds: float
    complaints: tuple[Complaint, ...]

    def error(self) -> ToldError | None:
        """What a program ends with: damage before loss before formats that cannot be read; None where all is well."""
        for status, kind in _BY_STATUS.items():
            if any(complaint.status == status for complaint in self.complaints):
                files = len({complaint.place for complaint in self.complaints})
                return kind(f"{len(self.complaints)} complaints about {files} files, listed above")
        return None


@dataclass(frozen=True)
class _Promises:
    """What the small files of a run say, read at one moment."""

    lineage: Lineage
    manifests: dict[str, Manifest]
    references: tuple[Reference, ...]
    complaints: tuple[Complaint, ...]


def scrub(
    run: Path,
    references: References,
    names: Collection[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scrubbed:
    """Check the checkpoints ``names`` (none: all, and all references and leases) of the run directory ``run``.

    ``progress`` is told the bytes read and those to be read. What a launch removes meanwhile is no loss. Raises
    MissingCheckpointError for a name that is not there.
    """
    started = time.monotonic()
    checkpoints = run / "checkpoints"
    said = _promises(checkpoints, references)
    there = {*said.lineage.records, *said.lineage.refused, *(reference.checkpoint for reference in said.references)}
    if unknown := [name for name in names if name not in there]:
        raise MissingCheckpointError(f"no checkpoint {unknown[0]} in {checkpoints}")
    chosen = sorted(names or said.manifests)
    complaints = [each for each in said.complaints if not names or each.place.name in names]
    complaints += _of_references(said, checkpoints, names)
    for name in chosen:
        if name in said.lineage.records:
            complaints += _of_place(said, name, checkpoints)
    work = [(name, shard) for name in chosen if name in said.manifests for shard in said.manifests[name].shards]
    complaints += _of_bytes(checkpoints, work, progress)
    for name in chosen:
        complaints += _strangers(checkpoints / name, said.manifests.get(name))
    named = {reference.checkpoint for reference in said.references}
    standing = [each for each in complaints if not _was_removed(each.place, checkpoints, named)]
    size = sum(shard.bytes for _, shard in work)
    return Scrubbed(len(chosen), len(work) + len(chosen), size, time.monotonic() - started, tuple(standing))


def _promises(checkpoints: Path, references: References) -> _Promises:
    with ExitStack() as stack:
        try:
            stack.enter_context(references.locked())
        except OSError:  # a directory that is only to be read: what a launch writes meanwhile may be complained about
            stack.close()
        lineage = read_lineage(checkpoints)
        manifests: dict[str, Manifest] = {}
        complaints: list[Complaint] = []
        for name in (*lineage.records, *lineage.refused):
            try:
                manifests[name] = read_manifest(checkpoints / name)
                _refuse_later_version(lineage, checkpoints, name)
            except (CheckpointError, InputError) as error:
                place = checkpoints / name / ("" if isinstance(error, MissingCheckpointError) else MANIFEST_FILE)
                complaints.append(_told(checkpoints / name, error, place))
            else:
                if name in lineage.refused:
                    complaints.append(Complaint(checkpoints / name, lineage.refused[name], EXIT_DAMAGED))
        found: list[Reference] = []
        for kind in KINDS:
            for name in references.names(kind):
                try:
                    reference = references.read(kind, name)
                except (CheckpointError, InputError) as error:
                    complaints.append(_told(references.directory / kind / f"{name}.json", error))
                else:
                    found += [reference] if reference else []
        leases = Leases(references)
        for name in leases.names():
            try:
                leases.read(name)
            except (CheckpointError, InputError) as error:
                complaints.append(_told(leases.directory / f"{name}.json", error))
    return _Promises(lineage, manifests, tuple(found), tuple(complaints))


def _refuse_later_version(lineage: Lineage, checkpoints: Path, name: str) -> None:
    if name in lineage.refused:  # what the lineage has was read in a version that is known
        refuse_unknown_format(checkpoints / name)


def _of_references(said: _Promises, checkpoints: Path, names: Collection[str]) -> Iterator[Complaint]:
    for reference in said.references:
        name = reference.checkpoint
        if names and name not in names:
            continue
        if name not in said.manifests and name not in said.lineage.refused:
            yield Complaint(checkpoints / name, f"{reference.title} points to {name}, which is not there", EXIT_LOST)
        elif name in said.manifests and said.manifests[name].digest != reference.digest:
            text = f"{reference.title} points to another {name}: its manifest's digest is not the one referred to"
            yield Complaint(checkpoints / name, text, EXIT_DAMAGED)


def _of_place(said: _Promises, name: str, checkpoints: Path) -> Iterator[Complaint]:
    """Whether a checkpoint stands where it says, on a parent that is there, referred to, and before it."""
    records = said.lineage.records
    record, place = records[name], checkpoints / name
    if name != checkpoint_name(record.path, record.step):
        proper = checkpoint_name(record.path, record.step)
        text = f"{name} is of path {record.path} and step {record.step}, as {proper} would be"
        yield Complaint(place, text, EXIT_DAMAGED)
    twice = Counter((other.path, other.step) for other in records.values())
    if twice[record.path, record.step] > 1:
        text = f"{name} is not the only checkpoint of path {record.path} at step {record.step}"
        yield Complaint(place, text, EXIT_DAMAGED)
    if record.parent is None:
        return
    if record.parent not in records:
        text = f"{name} descends from {record.parent}, which is not there or cannot be read"
        yield Complaint(checkpoints / record.parent, text, EXIT_LOST)
        return
    if record.parent not in {reference.checkpoint for reference in said.references}:
        text = f"{name} descends from {record.parent}, which no reference keeps: start the run's command once"
        yield Complaint(checkpoints / record.parent, text, EXIT_LOST)
    for what in _backwards(record, records[record.parent]):
        yield Complaint(place, f"{name} has fewer {what} behind it than {record.parent}, its parent", EXIT_DAMAGED)


def _backwards(record: CheckpointRecord, parent: CheckpointRecord) -> Iterator[str]:
    if record.step <= parent.step:
        yield "steps"
    if record.tokens < parent.tokens:
        yield "tokens"
    for increment, samples in sorted(parent.samples.items()):
        if record.samples.get(increment, 0) < samples:
            yield f"samples of {increment}"


def _of_bytes(
    checkpoints: Path, work: list[tuple[str, Shard]], progress: Callable[[int, int], None]
) -> Iterator[Complaint]:
    """Read every byte, several files at a time: hashing leaves the interpreter's lock."""
    total, done = sum(shard.bytes for _, shard in work), 0
    with ThreadPoolExecutor(_THREADS) as threads:
        reading = {
            threads.submit(damage, checkpoints / name, shard, content=True): (name, shard) for name, shard in work
        }
        found: dict[tuple[str, str], Complaint] = {}
        for future in as_completed(reading):
            name, shard = reading[future]
            if text := future.result():
                place = checkpoints / name / shard.file
                found[name, shard.file] = Complaint(place, f"{name}: {text}", EXIT_DAMAGED)
            done += shard.bytes
            progress(done, total)
    yield from (found[key] for key in sorted(found))


def _strangers(checkpoint: Path, manifest: Manifest | None) -> Iterator[Complaint]:
    """Files that the manifest does not know."""
    if manifest is None or not checkpoint.is_dir():
        return
    known = {MANIFEST_FILE, *(shard.file for shard in manifest.shards)}
    for entry in sorted(checkpoint.iterdir()):
        if entry.name not in known:
            text = f"{checkpoint.name} has a file that was not saved with it: {entry.name}"
            yield Complaint(entry, text, EXIT_DAMAGED)


def _was_removed(place: Path, checkpoints: Path, named: Collection[str]) -> bool:
    """Whether what is complained of is a checkpoint that nothing names and that a launch has removed meanwhile."""
    if not place.is_relative_to(checkpoints) or place == checkpoints:
        return False
    name = place.relative_to(checkpoints).parts[0]
    return name not in named and not (checkpoints / name).exists()


def _told(place: Path, error: Exception, file: Path | None = None) -> Complaint:
    status = error.exit_status if isinstance(error, ToldError) else EXIT_DAMAGED
    known = status if status in _BY_STATUS else EXIT_DAMAGED
    assert isinstance(error, CheckpointError | DamagedReferenceError | InputError)
    return Complaint(place if file is None else file, str(error), known)
