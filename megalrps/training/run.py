"""A run: a checked job in its directory, with the state that is being trained and the record of what has been."""

from dataclasses import asdict, dataclass, field

from megalrps.checkpoint.errors import FencedError
from megalrps.checkpoint.leases import Leases
from megalrps.checkpoint.lineage import Lineage, read_lineage
from megalrps.checkpoint.names import checkpoint_name, path_of
from megalrps.checkpoint.publication import Publisher
from megalrps.checkpoint.record import CheckpointRecord
from megalrps.checkpoint.store import Store
from megalrps.fingerprint import fingerprint
from megalrps.parallel.mesh import Mesh
from megalrps.parallel.world import World
from megalrps.paths.plan import Segment
from megalrps.training.console import Log
from megalrps.training.control import Agreed, Control
from megalrps.training.metrics import MetricsFile
from megalrps.training.prepare import Job
from megalrps.training.run_directory import RunDirectory
from megalrps.training.signals import StopRequest
from megalrps.training.state import TrainState
from megalrps.training.watch import Watch


@dataclass
class Run:
    """One launch's hold on the paths that it trains in a run directory.

    ``world``, all ranks, decides, writes and fails together; ``mesh`` has the groups that train. ``metrics`` and
    ``publisher`` are None on every rank but the first. ``paths`` are the ones this launch trains.
    """

    job: Job
    world: World
    mesh: Mesh
    directory: RunDirectory
    store: Store
    lineage: Lineage
    state: TrainState
    paths: frozenset[str]
    metrics: MetricsFile | None
    publisher: Publisher | None
    log: Log
    stop: StopRequest
    control: Control
    watch: Watch = field(default_factory=Watch)

    def finished(self, segment: Segment) -> str | None:
        """The checkpoint that ended ``segment``, or None where it is still to be trained."""
        return finished_by(self.lineage, self.job, segment)

    def source(self, segment: Segment) -> str | None:
        """The checkpoint that ``segment`` starts from; None: the random initialisation."""
        return source_of(self.job, segment)

    def refresh(self) -> None:
        """Look at what the lineage holds now: other launches may have trained other paths of it."""
        self.lineage = self.world.decided(lambda: read_lineage(self.store.directory))

    def load_first(self, names: list[str]) -> CheckpointRecord:
        """Load the first undamaged of ``names`` into the live state; set aside, and say, the damaged before it."""
        loaded = self.store.load_first(names, self.state.tensors())
        self.state.filled()
        record = self.lineage.records[loaded.manifest.name]
        for refusal, name in zip(loaded.refused, names, strict=False):
            self._step_back(path_of(name), loaded.manifest.name, loaded.manifest.digest)
            self.log.say(f"{refusal}; kept as {self.store.set_aside(name)}")
        self.state.checkpoint = loaded.manifest.name
        self.state.path, self.state.step, self.state.train_seconds = record.path, record.step, record.train_seconds
        self.state.skipped, self.state.recent_losses = record.skipped, list(record.recent_losses)
        return record

    def commit(self, segment: Segment, kind: str) -> None:
        """Save the live state, durably, as a ``kind`` of checkpoint of ``segment``; drop those it outdates."""
        self.watch.enter(f"saving {kind} checkpoint of {segment.path} at step {self.state.step}")
        if self.metrics is not None:
            self.metrics.sync()  # a checkpoint covers only lines that are on the disk
        name = checkpoint_name(segment.path, self.state.step)
        if name in self.lineage.refused:
            self.log.say(f"{name} was not used and is saved again; the old one is kept as {self.store.set_aside(name)}")
        record = self._record(segment, kind)
        publish = {} if self.publisher is None else {"publish": self.publisher.publish(name, record)}
        self.store.save(name, self.state.tensors(), record.to_json(), **publish)
        self.state.checkpoint = name
        self._prune()

    def agree(self) -> Agreed:
        """What the ranks know together after an update. Collective."""
        leases = self.publisher.leases if self.publisher is not None else None
        self.watch.enter("agreement of the ranks")
        stop, interval = self.stop.reason, self.job.config.runtime.exit_interval
        if stop is None and interval is not None and self.state.step % interval == 0:
            stop = "--exit-interval"
        return self.control.agree(
            stop=stop, fenced=leases is not None and leases.lost is not None, saving=False, save_failed=False
        )

    def give_way(self) -> None:
        """Raise FencedError on every rank: another launch has a path of this one. Collective."""

        def fenced() -> None:
            if self.publisher is not None:
                raise self.publisher.leases.lost or FencedError("another launch has taken this one's paths over")

        self.world.together(fenced)

    def drop_lines_after(self, segment: Segment) -> None:
        """Drop the metrics of ``segment`` beyond the live state: its steps from here on are done (again) now."""
        dropped = self.metrics.drop(segment.path, self.state.step, segment.end) if self.metrics is not None else 0
        if dropped:
            self.log.say(f"dropped {dropped} lines of metrics of path {segment.path}: those steps are done again")

    def _prune(self) -> None:
        """Remove the periodic checkpoints that ``--save-keep`` has no room for and nothing names."""
        self.lineage, outdated = self.world.decided(self._outdated)
        for name in outdated:
            self.store.remove(name)

    def _outdated(self) -> tuple[Lineage, list[str]]:
        assert self.publisher is not None
        references, leases = self.publisher.references, Leases(self.publisher.references)
        lineage = read_lineage(self.store.directory)
        with references.locked():
            used = {reference.checkpoint for reference in references.all()}
            used.update(name for lease in leases.held() for name in lease.reads)
        keep = self.job.config.checkpoint.save_keep
        return lineage, [name for name in lineage.prunable(keep, used) if path_of(name) in self.paths]

    def _step_back(self, path: str, to: str, digest: str) -> None:
        """Take the head of ``path`` back to what was loaded instead of the damaged checkpoint it points to."""

        def move() -> None:
            if self.publisher is not None and path in self.paths:
                self.publisher.step_back(path, *((to, digest) if path_of(to) == path else (None,)))

        self.world.together(move)

    def _record(self, segment: Segment, kind: str) -> CheckpointRecord:
        job, step = self.job, self.state.step
        tokens = step * job.config.training.global_batch_size * job.config.data.seq_length
        return CheckpointRecord(
            path=segment.path,
            version=segment.version,
            kind=kind,
            step=step,
            parent=self.source(segment),
            segment_fingerprint=job.plan.segment_fingerprint(segment),
            curve_fingerprint=fingerprint(job.plan.path(segment.path).curve.until(segment.end).to_json()),
            plan_fingerprint=job.plan.fingerprint,
            samples=job.consumed(segment.path, step),
            tokens=tokens,
            train_seconds=self.state.train_seconds,
            config=job.resolved(),
            data=job.data_fingerprints(),
            layout=asdict(job.layout),
            random={"seed": job.config.training.seed},
            skipped=self.state.skipped,
            recent_losses=tuple(self.state.recent_losses),
        )


def source_of(job: Job, segment: Segment) -> str | None:
    """The checkpoint that ``segment`` starts from; None: the random initialisation."""
    fork = job.plan.source(segment)
    return checkpoint_name(fork.path, fork.step) if fork else None


def finished_by(lineage: Lineage, job: Job, segment: Segment) -> str | None:
    """The checkpoint of ``lineage`` that ended ``segment`` of the job's plan, or None."""
    return lineage.finished(segment.path, segment.end, job.plan.segment_fingerprint(segment))
