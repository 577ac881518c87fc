"""Garbage: what nothing needs any more. Decided as data, by reachability, and only then carried out. Imports no torch.

Needed is what references name, what live launches hold or read, what is younger than a grace period (a writer's work
is not referenced yet), the newest periodic checkpoints of each path, and all that any of these descends from. Age alone
removes nothing: a clock that jumps makes garbage of no checkpoint that is reachable. What goes lies in ``RUN/trash``
for the grace period before it is deleted (git's ``gc.pruneExpire`` is for the same writers).
"""

import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from megalrps.checkpoint.errors import DamagedReferenceError, UnknownFormatError
from megalrps.checkpoint.leases import HeldLeases, Lease, Leases
from megalrps.checkpoint.lineage import Lineage, read_lineage, refuse_unknown_format
from megalrps.checkpoint.manifest import read_manifest
from megalrps.checkpoint.names import REFUSED, TRASH, hidden_directories, hide, name_of_hidden, path_of, state_of_hidden
from megalrps.checkpoint.references import Reference, References
from megalrps.files import sync_directory

GRACE_DAYS = 14.0
DAY = 86400.0

_OURS = re.compile(r".+-[0-9]{8,}")
"""What :func:`megalrps.checkpoint.names.checkpoint_name` makes."""


@dataclass(frozen=True)
class Found:
    """One directory of a run that may be garbage; ``name`` is the checkpoint that it is, was, or was to be."""

    kind: str
    """checkpoint; damaged: one that cannot be read; leftover: of a save or removal that died; set aside; trash."""
    name: str
    place: Path
    age: float
    """Seconds since it was made, by its manifest or its file system, whichever says less; negative: in the future."""
    bytes: int


@dataclass(frozen=True)
class Inventory:
    """All that :func:`decide` looks at. ``leases`` are those whose holders are not known to be gone."""

    lineage: Lineage
    references: tuple[Reference, ...]
    leases: tuple[Lease, ...]
    found: tuple[Found, ...]


@dataclass(frozen=True)
class Verdict:
    """Whether something goes, and why or why not, in words."""

    found: Found
    goes: bool
    why: str


def decide(inventory: Inventory, keep: int, grace: float) -> tuple[Verdict, ...]:
    """What goes and what stays: a function of what there is, of ``keep`` and of ``grace`` (seconds) alone.

    ``keep``: how many periodic checkpoints of each path stay that nothing names. What goes comes before what it
    descends from, so that whoever dies between two removals leaves no orphan.
    """
    if keep < 0:
        raise ValueError(f"cannot keep {keep} checkpoints")
    why = _why_kept(inventory, keep, grace)
    verdicts = [_judge(found, why, inventory, grace) for found in inventory.found]
    records = inventory.lineage.records
    steps = {name: record.step for name, record in records.items()}
    return tuple(sorted(verdicts, key=lambda verdict: -steps.get(verdict.found.name, 0)))


def survey(run: Path, references: References, now: float) -> Inventory:
    """What there is in the run directory ``run`` at ``now`` (seconds of the epoch); under the lineage's lock.

    Raises DamagedReferenceError and UnknownFormatError: while something cannot be read that may name checkpoints or
    descend from them, nothing is garbage.
    """
    checkpoints = run / "checkpoints"
    lineage = read_lineage(checkpoints)
    for name in lineage.refused:
        refuse_unknown_format(checkpoints / name)
    found = [_found("checkpoint", name, checkpoints / name, now) for name in lineage.records]
    found += [_found("damaged", name, checkpoints / name, now) for name in lineage.refused]
    for place in hidden_directories(checkpoints):
        kind = "set aside" if state_of_hidden(place.name) == REFUSED else "leftover"
        found.append(_found(kind, name_of_hidden(place.name), place, now))
    if (run / "trash").is_dir():
        found += [_found("trash", place.name, place, now) for place in sorted((run / "trash").iterdir())]
    return Inventory(lineage, references.all(), Leases(references).held(), tuple(found))


def collect(
    run: Path, references: References, *, keep: int, grace: float, now: float, apply: bool
) -> tuple[Verdict, ...]:
    """Decide and, with ``apply``, move what goes to ``run/trash``, and delete what has lain there for ``grace``.

    Under the lineage's lock but for the deleting: whoever takes a lease, moves a reference or commits does so before or
    after all of it. Raises as :func:`survey`.
    """
    with references.locked():
        verdicts = decide(survey(run, references, now), keep, grace)
        gone = [verdict.found for verdict in verdicts if verdict.goes]
        if apply:
            _move_to_trash([each.place for each in gone if each.kind != "trash"], run / "trash")
    if apply:
        for each in gone:
            if each.kind == "trash":
                _delete(each.place)
    return verdicts


def prune(
    checkpoints: Path, references: References, keep: int, leases: HeldLeases
) -> tuple[Lineage, tuple[str, ...], str | None]:
    """Remove the periodic checkpoints of a launch's paths that are not the newest ``keep`` and that nothing names.

    ``leases`` are the launch's; raises FencedError where another has one of them. Returns what is left, the names of
    what was removed and, where nothing was because a reference or lease cannot be read, why. Chosen and hidden under
    one lock: what is pinned or read by a new launch is so before, and stays, or after, and is not there.
    """
    with references.locked() as locked:
        leases.check_all(locked)
        lineage = read_lineage(checkpoints)
        try:
            used = {reference.checkpoint for reference in references.all()}
            used.update(name for lease in Leases(references).held() for name in lease.reads)
        except (DamagedReferenceError, UnknownFormatError) as error:
            return lineage, (), f"old checkpoints are not removed: {error}"
        outdated = tuple(name for name in lineage.prunable(keep, used) if path_of(name) in leases.paths)
        hidden = [hide(checkpoints, name, TRASH) for name in outdated]
    for place in hidden:
        _delete(place)
    left = {name: record for name, record in lineage.records.items() if name not in outdated}
    return Lineage(left, lineage.refused), outdated, None


def _why_kept(inventory: Inventory, keep: int, grace: float) -> Mapping[str, str]:
    """Why each checkpoint that stays does, by name: of several reasons the first of those of :func:`_roots`."""
    records, refused = inventory.lineage.records, inventory.lineage.refused
    why: dict[str, str] = {}
    for name, reason in _roots(inventory, keep, grace):
        why.setdefault(name, reason)
    unreadable = {reference.checkpoint for reference in inventory.references} - records.keys()
    unreadable |= {name for lease in inventory.leases for name in lease.reads if name in refused}
    waiting = list(why)
    while waiting:
        name = waiting.pop()
        parent = records[name].parent if name in records else None
        if parent is not None and parent not in why:
            why[parent] = f"{name} descends from it"
            waiting.append(parent)
        if parent is not None and parent not in records:
            unreadable.add(parent)
        if unreadable and not waiting:
            # Of what they descend from nothing can be read; a parent is always the end of a segment.
            ends = [each for each, record in records.items() if record.permanent and each not in why]
            why.update({each: f"{min(unreadable)}, which cannot be read, may descend from it" for each in ends})
            waiting += ends
    return why


def _roots(inventory: Inventory, keep: int, grace: float) -> Iterator[tuple[str, str]]:
    """The names that stay for a reason of their own, with the reason; some are of nothing that is there."""
    records = inventory.lineage.records
    for reference in inventory.references:
        yield reference.checkpoint, reference.title
    for lease in inventory.leases:
        for name in lease.reads:
            yield name, f"the launch of path {lease.path} reads it ({lease.holder})"
    held = {lease.path: lease for lease in inventory.leases}
    heads = {
        r.name: records[r.checkpoint].step
        for r in inventory.references
        if r.kind == "heads" and r.checkpoint in records
    }
    paths = {name: record.path for name, record in records.items()} | {
        name: path_of(name) for name in inventory.lineage.refused
    }
    for name, path in paths.items():
        if path in held:
            yield name, f"a launch holds path {path} ({held[path].holder})"
        elif path not in heads:
            yield name, f"path {path} has no head to go by: its next launch makes it"
        elif name in records and records[name].step > heads[path]:
            yield name, f"it is beyond the head of path {path}: its next launch moves it there"
        if name in inventory.lineage.refused and not _OURS.fullmatch(name):
            yield name, "its name is not that of a checkpoint"
    yield from _newest(inventory.lineage, keep)
    for each in inventory.found:
        if each.kind in ("checkpoint", "damaged") and each.age < grace:
            yield each.name, _young(each, grace)


def _newest(lineage: Lineage, keep: int) -> Iterator[tuple[str, str]]:
    for path in sorted({record.path for record in lineage.records.values()}):
        of_path = [name for name in lineage.all() if lineage.records[name].path == path]
        periodic = [name for name in of_path if not lineage.records[name].permanent]
        for name in periodic[max(0, len(periodic) - keep) :]:
            yield name, f"it is among the newest {keep} of path {path}"


def _judge(found: Found, why: Mapping[str, str], inventory: Inventory, grace: float) -> Verdict:
    holder = next((lease for lease in inventory.leases if lease.path == path_of(found.name)), None)
    if found.kind in ("checkpoint", "damaged"):
        reason = why.get(found.name)
    elif found.kind != "trash" and holder is not None:
        reason = f"the launch that holds path {holder.path} may be writing it ({holder.holder})"
    else:
        reason = _young(found, grace) if found.age < grace else None
    if reason is not None:
        return Verdict(found, False, reason)
    what = {
        "checkpoint": "nothing refers to it or descends from it",
        "damaged": "it is damaged, and nothing refers to it or descends from it",
        "leftover": "it is what a save or removal that died has left",
        "set aside": "it was set aside as damaged",
        "trash": "it was removed",
    }[found.kind]
    return Verdict(found, True, f"{what}, {found.age / DAY:.1f} days old")


def _young(found: Found, grace: float) -> str:
    return f"it is {found.age / DAY:.1f} days old, the grace period {grace / DAY:g}"


def _found(kind: str, name: str, place: Path, now: float) -> Found:
    made = place.lstat().st_mtime if os.path.lexists(place) else now  # a removal that goes on meanwhile
    if kind == "checkpoint":
        made = max(made, datetime.fromisoformat(read_manifest(place).created).timestamp())
    return Found(kind, name, place, now - made, bytes_of(place))


def bytes_of(directory: Path) -> int:
    """The bytes of all files under ``directory``, as far as they are there."""
    total = 0
    for folder, _, files in os.walk(directory):
        for file in files:
            try:
                total += (Path(folder) / file).lstat().st_size
            except FileNotFoundError:
                continue
    return total


def _move_to_trash(places: Collection[Path], trash: Path) -> None:
    if not places:
        return
    trash.mkdir(exist_ok=True)
    sync_directory(trash.parent)
    for place in places:
        try:
            os.utime(place)  # from now on the grace period runs again; before the move, so that none is cut short
            place.rename(trash / f"{place.name.removeprefix('.')}.{secrets.token_hex(8)}")
        except FileNotFoundError:  # a removal that went on meanwhile has ended
            continue
    for changed in {place.parent for place in places}:
        sync_directory(changed)
    sync_directory(trash)


def _delete(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
