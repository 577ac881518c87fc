"""A run: a checked job in its directory, with the state that is being trained and the record of what has been."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from megalrps.checkpoint.errors import CheckpointError, FencedError
from megalrps.checkpoint.garbage import prune
from megalrps.checkpoint.lineage import Lineage, read_lineage
from megalrps.checkpoint.names import checkpoint_name, path_of
from megalrps.checkpoint.provenance import versions
from megalrps.checkpoint.publication import Publish, Publisher, publish_at_once
from megalrps.checkpoint.record import CheckpointRecord
from megalrps.checkpoint.store import Store
from megalrps.errors import PreemptedError
from megalrps.fingerprint import fingerprint
from megalrps.parallel.mesh import Mesh
from megalrps.parallel.world import World
from megalrps.paths.plan import Segment
from megalrps.training.allowed import Decisions
from megalrps.training.console import Log
from megalrps.training.continuation import as_planned, check_continuation, differences_in_rounding
from megalrps.training.control import Agreed, Control
from megalrps.training.metrics import MetricsFile
from megalrps.training.prepare import Job
from megalrps.training.run_directory import RunDirectory
from megalrps.training.signals import StopRequest
from megalrps.training.snapshot import Background, Left
from megalrps.training.state import TrainState
from megalrps.training.watch import Watch


@dataclass
class Run:
    """One launch's hold on the paths that it trains in a run directory.

    ``world``, all ranks, decides, writes and fails together; ``mesh`` has the groups that train. ``metrics`` and
    ``publisher`` are None on every rank but the first. ``paths`` are the ones this launch trains. ``background``: what
    writes checkpoints while training goes on; None: nothing does. ``allowed``: what was changed that changes results.
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
    background: Background | None = None
    allowed: Decisions = field(default_factory=dict)

    def finished(self, segment: Segment) -> str | None:
        """The checkpoint that ended ``segment``, or None where it is still to be trained."""
        return finished_by(self.lineage, self.job, segment)

    def source(self, segment: Segment) -> str | None:
        """The checkpoint that ``segment`` starts from; None: the random initialisation."""
        return source_of(self.job, segment)

    def refresh(self) -> None:
        """Look at what the lineage holds now: other launches may have trained other paths of it.

        Raises FencedError on every rank where another has a path of this one: what it has made of it is not for this
        one to go on with. Collective.
        """
        self._check_hold()
        found = self.world.decided(lambda: read_lineage(self.store.directory))
        self.world.together(lambda: check_continuation(found, self.job, self.directory.root))
        self.lineage = as_planned(found, self.job)

    def load_first(self, names: list[str]) -> CheckpointRecord:
        """Load the first undamaged of ``names`` into the live state; set aside, and say, the damaged before it."""
        loaded = self.store.load_first(names, self.state.tensors())
        self.state.filled()
        record = self.lineage.records[loaded.manifest.name]
        for refusal, name in zip(loaded.refused, names, strict=False):
            self._step_back(path_of(name), loaded.manifest.name, loaded.manifest.digest)
            self.log.say(f"{refusal}; kept as {self._set_aside(name)}")
        self.state.checkpoint = loaded.manifest.name
        self.state.path, self.state.step, self.state.train_seconds = record.path, record.step, record.train_seconds
        self.state.skipped, self.state.recent_losses = record.skipped, list(record.recent_losses)
        self.state.skipped_in_a_row = record.skipped_in_a_row
        return record

    def say_differences(self, record: CheckpointRecord) -> None:
        """Say what may change the last bits beside those of the launch that made the live state, ``record``'s."""
        if self.world.is_first and self.state.checkpoint is not None:
            made_by = self.store.manifest(self.state.checkpoint).versions
            differences = differences_in_rounding(record, made_by, self.job, versions())
            if differences:
                self.log.say(f"the last bits may differ from that launch's: {'; '.join(differences)}")

    def commit(self, segment: Segment, kind: str, *, in_background: bool = False) -> None:
        """Save the live state, durably, as a ``kind`` of checkpoint of ``segment``; drop those it outdates.

        ``in_background``: return as soon as the state is copied, where the run has a :attr:`background`; what comes of
        it is for :meth:`agree` to notice. A save that is still in flight is waited for. Collective.
        """
        name = checkpoint_name(segment.path, self.state.step)
        waited = self.finish_save()
        self.watch.enter("saving", f"of {kind} checkpoint {name}")
        if name in self.lineage.refused:
            self.log.say(f"{name} was not used and is saved again; the old one is kept as {self._set_aside(name)}")
        record = self._record(segment, kind)
        publish = self._publish(name, record)
        if self.background is None or not in_background:
            try:
                self.store.save(name, self.state.tensors(), record.to_json(), publish)
            except CheckpointError:
                self._check_hold()
                raise
            self._saved(name, self.world.decided(self._without_outdated))
            return
        if waited is not None:
            self.log.say(f"--save-interval is short: {name} waited {waited:.1f} s until the one before it was written")
        then = partial(self.background.world.decided, self._without_outdated)
        self.background.saves.start(name, self.background.snapshot.take(), record.to_json(), publish, then)

    def finish_save(self) -> float | None:
        """Wait for the save in flight; the seconds that took, None where there was none to be waited for. Collective.

        What went wrong with it on any rank is raised on all of them; then its checkpoint is not there.
        """
        if self.background is None or not self.background.saves.busy:
            return None
        saves, started = self.background.saves, time.perf_counter()
        self.watch.enter("saving", f"of {saves.name}, in the background until now")
        name, waits = saves.name, not saves.ended
        try:
            left = self.world.together(saves.finish)
        except Exception:
            self._check_hold()
            raise
        self._saved(name, left)
        return time.perf_counter() - started if waits else None

    def agree(self) -> Agreed:
        """What the ranks know together after an update, the end of a save in the background among it. Collective.

        Where that has failed on any rank, all of them raise it.
        """
        leases = self.publisher.leases if self.publisher is not None else None
        saves = self.background.saves if self.background is not None else None
        self.watch.enter("agreement of the ranks", f"after step {self.state.step} of path {self.state.path}")
        stop, interval = self.stop.reason, self.job.config.runtime.exit_interval
        if stop is None and interval is not None and self.state.step % interval == 0:
            stop = "--exit-interval"
        agreed = self.control.agree(
            stop=stop,
            fenced=leases is not None and leases.lost is not None,
            saving=saves is not None and saves.busy and not saves.ended,
            save_failed=saves is not None and saves.failed,
        )
        if saves is not None and agreed.save_failed:
            saves.abandon()  # where another rank's thread has died alone, this one's waits for it in a collective
            self._check_hold()
            self.world.agree(saves.error)
        elif saves is not None and saves.busy and not agreed.saving:
            self._saved(saves.name, saves.finish())  # well, on every rank
        return agreed

    def leave_if_asked(self, when: str) -> None:
        """Raise PreemptedError on every rank if any was asked to stop ``when`` there is nothing to save. Collective."""
        leases = self.publisher.leases if self.publisher is not None else None
        fenced = leases is not None and leases.lost is not None
        agreed = self.control.agree(stop=self.stop.reason, fenced=fenced, saving=False, save_failed=False)
        if agreed.fenced:
            self.give_way()
        if agreed.stop is not None:
            text = f"stopped by {agreed.stop} {when}: there was nothing to save; the same command goes on from there"
            raise self.world.told_once(PreemptedError(text, agreed.stop))

    def give_way(self) -> None:
        """Raise FencedError on every rank: another launch has a path of this one. Collective."""

        def fenced() -> None:
            if self.publisher is not None:
                raise self.publisher.leases.lost or FencedError("another launch has taken this one's paths over")

        self.world.together(fenced)

    def _check_hold(self) -> None:
        """Raise FencedError on every rank where another launch has a path of this one, by the leases. Collective.

        A launch that wakes up in a save finds what it has written removed, or the name taken, by who has the path now.
        """

        def check() -> None:
            if self.publisher is not None:
                with self.publisher.references.locked() as locked:
                    self.publisher.leases.check_all(locked)

        self.world.together(check)

    def drop_lines_after(self, segment: Segment) -> None:
        """Drop the metrics of ``segment`` beyond the live state: its steps from here on are done (again) now."""
        dropped = self.metrics.drop(segment.path, self.state.step, segment.end) if self.metrics is not None else 0
        if dropped:
            self.log.say(f"dropped {dropped} lines of metrics of path {segment.path}: those steps are done again")

    def _publish(self, name: str, record: CheckpointRecord) -> Publish:
        """What makes the checkpoint ``name`` visible; on the first rank, and with a :attr:`background` on its thread.

        Nothing else may move this launch's references meanwhile, and nothing does: the live state is restored, which
        may step a head back, when no save is in flight.
        """
        metrics, publisher = self.metrics, self.publisher
        if metrics is None or publisher is None:
            return publish_at_once
        move = publisher.publish(name, record)

        def publish(rename: Callable[[], None], digest: str) -> None:
            metrics.sync()  # a checkpoint covers only lines that are on the disk
            move(rename, digest)

        return publish

    def _saved(self, name: str, left: Left) -> None:
        """Take note that the checkpoint ``name`` is committed; it holds the live state if no update was made since."""
        self.lineage, complaint = left
        if complaint is not None:
            self.log.say(complaint)
        if self.state.path is not None and name == checkpoint_name(self.state.path, self.state.step):
            self.state.checkpoint = name

    def _set_aside(self, name: str) -> Path:
        """Hide the damaged ``name`` and keep its files for a person; returns where they are. Collective."""

        def hide() -> Path:
            assert self.publisher is not None
            return self.publisher.set_aside(name, self.store.directory)

        return self.world.decided(hide)

    def _without_outdated(self) -> Left:
        """Remove the periodic checkpoints that ``--save-keep`` has no room for and nothing names. The first rank's."""
        assert self.publisher is not None
        keep = self.job.config.checkpoint.save_keep
        lineage, _, complaint = prune(self.store.directory, self.publisher.references, keep, self.publisher.leases)
        return as_planned(lineage, self.job), complaint

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
            samples=job.consumed(segment.path, step, self.lineage.records.values()),
            tokens=tokens,
            train_seconds=self.state.train_seconds,
            config=job.resolved(),
            data=job.data_fingerprints(),
            layout=asdict(job.layout),
            random={"seed": job.config.training.seed},
            allowed=self.allowed,
            skipped=self.state.skipped,
            skipped_in_a_row=self.state.skipped_in_a_row,
            recent_losses=tuple(self.state.recent_losses),
        )


def source_of(job: Job, segment: Segment) -> str | None:
    """The checkpoint that ``segment`` starts from; None: the random initialisation."""
    fork = job.plan.source(segment)
    return checkpoint_name(fork.path, fork.step) if fork else None


def finished_by(lineage: Lineage, job: Job, segment: Segment) -> str | None:
    """The checkpoint of ``lineage`` that ended ``segment`` of the job's plan, or None."""
    return lineage.finished(segment.path, segment.end, job.plan.segment_fingerprint(segment))
