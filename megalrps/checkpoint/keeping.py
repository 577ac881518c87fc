"""What a person decides to keep and to give up: pins, and references to what is damaged. Imports no torch."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megalrps.checkpoint.errors import (
    CorruptCheckpointError,
    DamagedReferenceError,
    HeldError,
    MissingCheckpointError,
    MovedReferenceError,
)
from megalrps.checkpoint.leases import Leases
from megalrps.checkpoint.lineage import read_lineage
from megalrps.checkpoint.manifest import read_manifest
from megalrps.checkpoint.names import REFUSED, checkpoint_name, hide, path_of
from megalrps.checkpoint.references import KINDS, LockedReferences, Reference, References
from megalrps.checkpoint.shards import damage
from megalrps.errors import InputError
from megalrps.paths.plan import Plan, Segment


@dataclass(frozen=True)
class Forgotten:
    """What :func:`forget` did: the references that are gone, the damaged checkpoint or file that was set aside."""

    references: tuple[str, ...]
    checkpoint: str | None
    """What they pointed to; None where the reference's own file could not be read."""
    set_aside: Path | None


def pin(checkpoints: Path, references: References, name: str, label: str, note: str) -> Reference:
    """Keep the checkpoint ``name`` under ``label`` until it is unpinned.

    Raises InputError where the label names another checkpoint, and as
    :func:`megalrps.checkpoint.manifest.read_manifest`.
    """
    references.prepare()
    with references.locked() as locked:
        digest = read_manifest(checkpoints / name).digest
        found = references.read("pins", label)
        if found is not None and found.checkpoint != name:
            raise InputError(f"pins/{label} keeps {found.checkpoint}: unpin it first, or name another with --as")
        expected = found.checkpoint if found else None
        return locked.move("pins", label, name, digest, expected=expected, note=note)


def unpin(references: References, label: str) -> Reference:
    """Drop the pin ``label``; MissingCheckpointError where there is none."""
    _require_lineage(references)
    with references.locked() as locked:
        found = references.read("pins", label)
        if found is None:
            raise MissingCheckpointError(f"there is no pin {label}{_among(references.names('pins'))}")
        locked.drop("pins", label, expected=found.checkpoint)
    return found


def forget(checkpoints: Path, references: References, kind: str, name: str, *, whole_too: bool) -> Forgotten:
    """Drop the reference ``kind``/``name`` whose checkpoint is damaged or gone, or, ``whole_too``, any.

    A damaged checkpoint is set aside, and the heads that point to it are dropped with it: its path goes on from an
    older one. A reference whose own file is damaged is set aside. Raises InputError for one whose checkpoint is whole,
    and HeldError where a launch trains the path.
    """
    if kind not in KINDS:
        raise InputError(f"{kind}/{name}: there are references of the kinds {', '.join(KINDS)}")
    _require_lineage(references)
    reference = _read_or_set_aside(references, kind, name)
    if isinstance(reference, Path):
        return Forgotten((f"{kind}/{name}",), None, reference)
    complaint = _complaint(checkpoints, reference)  # every byte is read, which takes its time: not under the lock
    if complaint is None and not whole_too:
        raise InputError(
            f"{reference.title} points to {reference.checkpoint}, which is whole: --yes forgets it all the same"
        )
    with references.locked() as locked:
        if references.read(kind, name) != reference:
            raise MovedReferenceError(f"{reference.title} was moved meanwhile: look at it again")
        held = _held(references, path_of(reference.checkpoint))
        if kind != "pins" and held is not None:
            raise held
        return _drop(locked, checkpoints, reference, damaged=complaint is not None and held is None)


def trained_again(plan: Plan, checkpoints: Path, name: str) -> tuple[Segment, int] | None:
    """The segment of ``plan`` that ends with the checkpoint ``name``, and how many steps the next launch trains of it.

    None where the plan has no such segment or its end is there.
    """
    lineage = read_lineage(checkpoints)
    for segment in plan.segments:
        if checkpoint_name(segment.path, segment.end) == name:
            fingerprint = plan.segment_fingerprint(segment)
            if lineage.finished(segment.path, segment.end, fingerprint) is not None:
                return None
            newest = lineage.latest(segment.path, fingerprint, segment.start, segment.end)
            return segment, segment.end - (lineage.records[newest].step if newest else segment.start)
    return None


def _read_or_set_aside(references: References, kind: str, name: str) -> Reference | Path:
    with references.locked() as locked:
        try:
            found = references.read(kind, name)
        except DamagedReferenceError:
            return locked.set_aside(kind, name)
    if found is None:
        raise MissingCheckpointError(f"there is no reference {kind}/{name}{_among(references.names(kind))}")
    return found


def _complaint(checkpoints: Path, reference: Reference) -> str | None:
    """Why what ``reference`` points to is not the checkpoint it names; None where it is, every byte of it."""
    directory = checkpoints / reference.checkpoint
    try:
        manifest = read_manifest(directory)
    except (CorruptCheckpointError, MissingCheckpointError) as error:
        return str(error)
    if manifest.digest != reference.digest:
        return f"{directory} is another than {reference.title} names"
    return next(filter(None, map(partial(damage, directory, content=True), manifest.shards)), None)


def _drop(locked: LockedReferences, checkpoints: Path, reference: Reference, *, damaged: bool) -> Forgotten:
    references, name = locked.references, reference.checkpoint
    gone, aside = [reference], None
    if damaged and (checkpoints / name).exists():
        heads = (references.read("heads", path) for path in references.names("heads"))
        gone += [head for head in heads if head is not None and head.checkpoint == name and head != reference]
        aside = hide(checkpoints, name, REFUSED)
    for each in gone:
        locked.drop(each.kind, each.name, expected=each.checkpoint)
    return Forgotten(tuple(each.title for each in gone), name, aside)


def _held(references: References, path: str) -> HeldError | None:
    """The refusal where a launch trains ``path``, which would be surprised."""
    for lease in Leases(references).held():
        if lease.path == path:
            return HeldError(f"path {path} is being trained by another launch ({lease.holder}): stop it first")
    return None


def _require_lineage(references: References) -> None:
    if not references.directory.is_dir():
        raise InputError(f"{references.directory} is not there: no launch has made references for this run yet")


def _among(names: tuple[str, ...]) -> str:
    return f": there are {', '.join(names)}" if names else ": there is none"
