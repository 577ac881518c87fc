"""Trees of checkpoints that nobody trained: manifests with records, and shards of a few bytes."""

import os
import random
import time
from collections.abc import Iterable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from megalrps.checkpoint.leases import Lease, Leases, Place, this_place
from megalrps.checkpoint.manifest import Chunk, Manifest, TensorEntry, render
from megalrps.checkpoint.names import checkpoint_name
from megalrps.checkpoint.record import CheckpointRecord
from megalrps.checkpoint.references import References
from megalrps.checkpoint.shards import Shard

DAY = 86400.0
SHARD = "rank-00000.bin"
CONTENT = bytes(range(64))


def record(path: str, step: int, kind: str = "periodic", parent: str | None = None) -> CheckpointRecord:
    """A record of a segment that began from ``parent``."""
    return CheckpointRecord(
        path=path,
        version="v1" if path == "main" else path,
        kind=kind,
        step=step,
        parent=parent,
        segment_fingerprint="s",
        curve_fingerprint="c",
        plan_fingerprint="p",
        samples={"a": step * 8},
        tokens=step * 128,
        train_seconds=float(step),
        config={},
        data={},
    )


def add(checkpoints: Path, value: CheckpointRecord, *, age_days: float = 0.0, now: float | None = None) -> str:
    """Make the checkpoint of ``value`` as if it were ``age_days`` old; returns its name."""
    name = checkpoint_name(value.path, value.step)
    directory = checkpoints / name
    directory.mkdir(parents=True)
    (directory / SHARD).write_bytes(CONTENT)
    (directory / "manifest.json").write_text(render(manifest_of(name, value, age_days, now).to_json()))
    age(directory, age_days, now)
    return name


def manifest_of(name: str, value: CheckpointRecord, age_days: float = 0.0, now: float | None = None) -> Manifest:
    made = time.gmtime((time.time() if now is None else now) - age_days * DAY)
    shard = Shard(SHARD, len(CONTENT), sha256(CONTENT).hexdigest())
    tensor = TensorEntry("uint8", (64,), (Chunk((0,), (64,), SHARD, 0, 64),))
    created = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", made)
    return Manifest(name, created, {"megalrps": "0"}, (shard,), {"x": tensor}, value.to_json())


def age(place: Path, days: float, now: float | None = None) -> None:
    """Let ``place`` have been changed so many days ago."""
    moment = (time.time() if now is None else now) - days * DAY
    os.utime(place, (moment, moment))


def flip_bit(path: Path, position: int = 0) -> None:
    """Change one bit of a file, however it is protected."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


def prepared(run: Path) -> References:
    """The references of a run directory, with all directories made."""
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    references = References(run / "lineage")
    references.prepare()
    Leases(references).prepare()
    return references


def refer(references: References, kind: str, name: str, checkpoint: str, digest: str = "0" * 64) -> None:
    """Make a reference by hand."""
    with references.locked() as locked:
        locked.move(kind, name, checkpoint, digest, expected=None)


def leased(
    references: References,
    path: str,
    *,
    reads: Iterable[str] = (),
    place: Place | None = None,
    owner: str = "somebody",
    beats: int = 0,
    fence: int = 1,
    seconds: float = 0.0,
) -> Lease:
    """Write a lease as another launch would: by default of this process, so of one that lives."""
    lease = Lease(path, fence, owner, place or this_place(), beats, tuple(reads), "2026-01-01T00:00:00+00:00", seconds)
    with references.locked() as locked:
        Leases(references)._write(locked, lease)
    return lease


def elsewhere(pid: int = 7) -> Place:
    """A process of another host: whether it lives cannot be looked up."""
    return Place("elsewhere", "its-boot", "pid:[1]", pid, 1)


def gone() -> Place:
    """A process of this host that has ended: its number was used again, or never was."""
    return replace(this_place(), started=1)


def random_records(chance: random.Random) -> dict[str, CheckpointRecord]:
    """A random tree: paths that leave others, segments that end, periodic checkpoints between, branches of branches."""
    records: dict[str, CheckpointRecord] = {}
    for number in range(chance.randint(1, 5)):
        path = "main" if number == 0 else f"v{number}"
        ends = [name for name, value in records.items() if value.permanent]
        parent = chance.choice([*ends, None]) if ends else None
        step = records[parent].step if parent else 0
        for _ in range(chance.randint(0, 7)):
            step += chance.randint(1, 3)
            kind = chance.choice(("periodic", "periodic", "fork", "end", "release"))
            name = checkpoint_name(path, step)
            records[name] = record(path, step, kind, parent)
            parent = name if records[name].permanent else parent
    return records
