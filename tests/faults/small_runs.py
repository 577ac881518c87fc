"""A run directory as training keeps it, but of a few small tensors; and the check that nothing of it is lost.

What ``training.opening.open_run``, ``Run.commit`` and ``Run._prune`` do with the package's store, references, leases
and metrics, in their order, without a model: a save costs milliseconds.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megalrps.checkpoint import garbage
from megalrps.checkpoint.errors import CheckpointExistsError
from megalrps.checkpoint.leases import Leases
from megalrps.checkpoint.lineage import Lineage, read_lineage
from megalrps.checkpoint.manifest import Manifest
from megalrps.checkpoint.names import checkpoint_name, path_of
from megalrps.checkpoint.publication import Publisher
from megalrps.checkpoint.record import CheckpointRecord
from megalrps.checkpoint.references import References
from megalrps.checkpoint.store import Loaded, Store
from megalrps.files import write_json
from megalrps.training.metrics import MetricsFile, StepMetrics
from megalrps.training.run_directory import RunDirectory

PATH = "main"
KEPT = 2
"""Periodic checkpoints that a run keeps (--save-keep)."""
KINDS = {3: "fork", 6: "release"}
"""Of the checkpoints of these steps; the others are periodic."""
LONG = 60.0
"""Seconds of a lease: more than any test takes."""


class ViolationError(AssertionError):
    """A promise of docs/reliability.md that was not kept."""


def require(condition: object, broken: str) -> None:
    """Raise ViolationError unless ``condition`` holds."""
    if not condition:
        raise ViolationError(broken)


def name_of(step: int) -> str:
    """The name of the checkpoint of ``step``."""
    return checkpoint_name(PATH, step)


def state_of(step: int) -> dict[str, torch.Tensor]:
    """The tensors of ``step``: 20,820 bytes, of odd sizes, a function of the step alone."""
    generator = torch.Generator().manual_seed(step)
    return {f"x{size}": torch.randn(size, generator=generator) for size in (3, 200, 5000)} | {"s": torch.tensor(step)}


def record_of(step: int) -> CheckpointRecord:
    """The record of ``step``, with the last fork before it as the parent."""
    parents = [name_of(fork) for fork in sorted(KINDS) if fork < step]
    return CheckpointRecord(
        path=PATH,
        version="v1",
        kind=KINDS.get(step, "periodic"),
        step=step,
        parent=parents[-1] if parents else None,
        segment_fingerprint="5e9",
        curve_fingerprint="c0e",
        plan_fingerprint="91a",
        samples={"a": step},
        tokens=16 * step,
        train_seconds=1.5 * step,
        config={"training": {"lr": 1e-05}},
        data={"a": "da7a"},
    )


def line_of(step: int) -> StepMetrics:
    """The line of metrics of ``step``."""
    return StepMetrics(PATH, "v1", step, 2.5, 1e-05, 1.0, 16 * step, step, 0.25, 64.0)


@dataclass
class Launch:
    """A launch that holds the run at ``root``; ``publisher`` and ``metrics`` are rank 0's."""

    root: Path
    store: Store
    lineage: Lineage
    publisher: Publisher | None
    metrics: MetricsFile | None
    said: Sequence[str]
    seconds_to_open: float

    def save(self, step: int) -> str:
        """Train up to ``step``, so to speak, and commit it; nothing is removed. Returns the digest."""
        name, record, metrics = name_of(step), record_of(step), self.metrics
        if self.publisher is None or metrics is None:
            return self.store.save(name, state_of(step), record.to_json())
        metrics.write(line_of(step))
        move = self.publisher.publish(name, record)

        def publish(rename: Callable[[], None], digest: str) -> None:
            metrics.sync()
            move(rename, digest)

        return self.store.save(name, state_of(step), record.to_json(), publish)

    def save_again(self, step: int) -> None:
        """Try to save what is there already, which is refused and changes nothing."""
        try:
            self.store.save(name_of(step), state_of(step), record_of(step).to_json())
        except CheckpointExistsError:
            return

    def prune(self) -> None:
        """Remove what KEPT has no room for."""
        if self.publisher is not None:
            garbage.prune(self.store.directory, self.publisher.references, KEPT, self.publisher.leases)

    def load(self) -> tuple[Loaded, dict[str, torch.Tensor]]:
        """Load the newest whole checkpoint and put the damaged before it aside, as ``Run.load_first`` does."""
        assert self.publisher is not None
        names = self.lineage.resumable(PATH, "5e9", 0, 1 << 30)
        tensors = blank()
        loaded = self.store.load_first(names, tensors)
        for name in names[: len(loaded.refused)]:
            self.publisher.step_back(PATH, loaded.manifest.name, loaded.manifest.digest)
            self.store.set_aside(name)
        return loaded, tensors


def blank() -> dict[str, torch.Tensor]:
    """Tensors to load into."""
    return {name: torch.zeros_like(tensor) for name, tensor in state_of(0).items()}


@contextmanager
def launched(root: Path, seconds: float = LONG) -> Iterator[Launch]:
    """A launch of this process, or of the ranks of its process group together, on the run at ``root``."""
    started = time.monotonic()
    with ExitStack() as stack:
        directory = RunDirectory(root)
        publisher, metrics, said = None, None, []
        is_first = not dist.is_initialized() or dist.get_rank() == 0
        if is_first:
            directory.create()
            references = References(directory.lineage)
            references.prepare()
            leases = Leases(references)
            leases.prepare()
            publisher = Publisher(references, stack.enter_context(leases.acquire({PATH: ()}, seconds=seconds)))
        store = Store(directory.checkpoints)
        store.prepare(lambda name: path_of(name) == PATH)
        lineage = read_lineage(store.directory)
        if publisher is not None:
            said = publisher.reconcile(store.directory)
            write_json(directory.plan, {"paths": [PATH]})
            steps = [record.step for record in lineage.records.values()]
            metrics = stack.enter_context(MetricsFile(directory.metrics, {PATH: max(steps, default=0)}))
        yield Launch(root, store, lineage, publisher, metrics, said, time.monotonic() - started)


def acknowledge(log: Path, step: int) -> None:
    """Note, where no crash of this process can undo it, that the save of ``step`` has returned."""
    with open(log, "a") as file:
        file.write(f"{step}\n")
        file.flush()
        os.fsync(file.fileno())


def acknowledged(log: Path) -> list[int]:
    """What :func:`acknowledge` has noted."""
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def must_be_kept(acknowledged: Sequence[int]) -> set[int]:
    """The steps that pruning leaves: forks and releases for good, of the others the newest KEPT."""
    periodic = [step for step in acknowledged if step not in KINDS]
    return {step for step in acknowledged if step in KINDS} | set(periodic[-KEPT:])


@dataclass(frozen=True)
class Survived:
    """What the next launch found: seconds until it was open, and what it had to say of references it mended."""

    seconds: float
    said: tuple[str, ...]


def check_survivors(root: Path, acknowledged: Sequence[int], goes_on: bool = True, seconds: float = LONG) -> Survived:
    """Launch again after whatever happened to ``root``; raises ViolationError where a promise was broken.

    ``acknowledged``: the steps whose saves had returned. With ``goes_on`` the launch makes one more checkpoint.
    """
    check_references(root, acknowledged)
    try:
        with launched(root, seconds) as launch:
            check_launch(launch, acknowledged)
            if goes_on:
                _go_on(launch)
            return Survived(launch.seconds_to_open, tuple(launch.said))
    except ViolationError:
        raise
    except Exception as error:
        raise ViolationError(f"the next launch ends: {type(error).__name__}: {error}") from error


def check_references(root: Path, acknowledged: Sequence[int]) -> None:
    """The references that were acknowledged are there before anybody has mended them."""
    references = References(root / "lineage")
    try:
        head = references.read("heads", PATH)
        forks = [references.read("forks", name_of(step)) for step in acknowledged if KINDS.get(step) == "fork"]
        released = [references.read("releases", "v1") for step in acknowledged if KINDS.get(step) == "release"]
    except Exception as error:
        raise ViolationError(f"a reference does not read: {error}") from error
    newest = name_of(max(acknowledged)) if acknowledged else None
    require(newest is None or (head is not None and head.checkpoint >= newest), f"the head is stale: not at {newest}")
    require(None not in (*forks, *released), "an acknowledged fork or release has no reference")


def check_launch(launch: Launch, acknowledged: Sequence[int]) -> None:
    """An open launch holds all that was acknowledged, whole; its references resolve; nothing half-made is there."""
    names = set(launch.store.names())
    entries = {entry.name for entry in launch.store.directory.iterdir() if not entry.name.endswith(".refused")}
    require(entries == names, f"something half-made is visible or left: {sorted(entries ^ names)}")
    lost = {name_of(step) for step in must_be_kept(acknowledged)} - names
    require(not lost, f"acknowledged and lost: {sorted(lost)}")
    require(not launch.lineage.refused, f"a torn checkpoint is visible: {launch.lineage.refused}")
    digests = {}
    for name in sorted(names):
        digests[name] = _load_whole(launch.store, name).digest
    assert launch.publisher is not None
    references = launch.publisher.references.all()
    for reference in references:
        found = digests.get(reference.checkpoint)
        require(found == reference.digest, f"{reference.title} does not resolve: {reference.checkpoint} is {found}")
    head = [reference.checkpoint for reference in references if reference.kind == "heads"]
    newest = launch.lineage.all()[-1:]
    require(tuple(head) == newest, f"the head points to {head}, the newest checkpoint is {newest}")
    fence = max((reference.fence for reference in references), default=0)
    lease = Leases(launch.publisher.references).read(PATH)
    require(lease is not None and lease.fence >= fence, "the fencing number fell: an older launch could come back")
    covered = max(acknowledged, default=0)
    lines = (launch.root / "metrics.jsonl").read_bytes().splitlines()
    require(len(lines) >= covered, f"{covered} steps are acknowledged, and {len(lines)} lines of metrics there")


def _load_whole(store: Store, name: str) -> Manifest:
    tensors = blank()
    try:
        manifest = store.load(name, tensors)
    except Exception as error:
        raise ViolationError(f"a torn checkpoint is visible: {error}") from error
    whole = state_of(int(name.rpartition("-")[2]))
    differing = [key for key in whole if not torch.equal(whole[key], tensors[key])]
    require(not differing, f"{name} loads other bytes in {differing}")
    return manifest


def _go_on(launch: Launch) -> None:
    """One more checkpoint after the newest, and the head follows it."""
    assert launch.publisher is not None
    newest = [launch.lineage.records[name].step for name in launch.lineage.all()]
    step = max(newest, default=0) + 1
    launch.save(step)
    head = launch.publisher.references.read("heads", PATH)
    require(head is not None and head.checkpoint == name_of(step), "the run does not go on: its head stands still")
    launch.store.verify(name_of(step))
