"""A run: a checked job in its directory, with the state that is being trained and the record of what has been."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from megalrps.checkpoint.lineage import Lineage, read_lineage
from megalrps.checkpoint.names import checkpoint_name
from megalrps.checkpoint.record import CheckpointRecord
from megalrps.checkpoint.store import Store
from megalrps.config import Config
from megalrps.errors import InputError
from megalrps.files import write_json, write_text
from megalrps.fingerprint import fingerprint
from megalrps.parallel.mesh import Mesh
from megalrps.parallel.world import World
from megalrps.paths.cost import cost_steps
from megalrps.paths.plan import Segment
from megalrps.training.assemble import assemble, job_mesh
from megalrps.training.console import Log
from megalrps.training.continuation import check_continuation, difference_between_ranks, identity
from megalrps.training.describe import describe_size
from megalrps.training.implementations import check_implementations, describe_implementations
from megalrps.training.metrics import MetricsFile
from megalrps.training.prepare import Job, prepare
from megalrps.training.run_directory import RunDirectory
from megalrps.training.state import TrainState


@dataclass
class Run:
    """One launch's hold on a run directory.

    ``world``, all ranks, decides, writes and fails together; ``mesh`` has the groups that train. ``metrics`` is None on
    every rank but the first.
    """

    job: Job
    world: World
    mesh: Mesh
    directory: RunDirectory
    store: Store
    lineage: Lineage
    state: TrainState
    metrics: MetricsFile | None
    log: Log

    def finished(self, segment: Segment) -> str | None:
        """The checkpoint that ended ``segment``, or None where it is still to be trained."""
        return _finished(self.lineage, self.job, segment)

    def source(self, segment: Segment) -> str | None:
        """The checkpoint that ``segment`` starts from; None: the random initialisation."""
        fork = self.job.plan.source(segment)
        return checkpoint_name(fork.path, fork.step) if fork else None

    def load_first(self, names: list[str]) -> CheckpointRecord:
        """Load the first undamaged of ``names`` into the live state; set aside, and say, the damaged before it."""
        loaded = self.store.load_first(names, self.state.tensors())
        self.state.filled()
        for refusal, name in zip(loaded.refused, names, strict=False):
            self.log.say(f"{refusal}; kept as {self.store.set_aside(name)}")
        record = self.lineage.records[loaded.manifest.name]
        self.state.checkpoint = loaded.manifest.name
        self.state.path, self.state.step, self.state.train_seconds = record.path, record.step, record.train_seconds
        return record

    def commit(self, segment: Segment, kind: str) -> None:
        """Save the live state, durably, as a ``kind`` of checkpoint of ``segment``; drop those it outdates."""
        if self.metrics is not None:
            self.metrics.sync()  # a checkpoint covers only lines that are on the disk
        name = checkpoint_name(segment.path, self.state.step)
        if name in self.lineage.refused:
            self.log.say(f"{name} was not used and is saved again; the old one is kept as {self.store.set_aside(name)}")
        self.store.save(name, self.state.tensors(), self._record(segment, kind).to_json())
        self.state.checkpoint = name
        self.lineage = self.world.decided(lambda: read_lineage(self.store.directory))
        for outdated in self.lineage.prunable(self.job.config.checkpoint.save_keep):
            self.store.remove(outdated)

    def drop_lines_after(self, segment: Segment) -> None:
        """Drop the metrics of ``segment`` beyond the live state: its steps from here on are done (again) now."""
        dropped = self.metrics.drop(segment.path, self.state.step, segment.end) if self.metrics is not None else 0
        if dropped:
            self.log.say(f"dropped {dropped} lines of metrics of path {segment.path}: those steps are done again")

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
        )


def check_place(job: Job) -> None:
    """Raise InputError where :func:`open_run` would refuse the job's directory; makes and changes nothing."""
    directory = RunDirectory(Path(str(job.config.checkpoint.save)))
    directory.check()
    check_continuation(read_lineage(directory.checkpoints), job, directory.root)


@contextmanager
def open_run(config: Config, world: World) -> Iterator[Run]:
    """Check everything, take hold of the run directory, and stand ready to train what its plan still lacks.

    Collective. Raises InputError, before anything is trained or written over, for options, data or a directory that
    cannot be used or that belong to another run.
    """
    with ExitStack() as stack:
        job = world.together(lambda: prepare(config, world.size))
        world.agree(difference_between_ranks(world.gathered(identity(job))))
        world.together(lambda: _check_device(job, world))
        directory = RunDirectory(Path(str(config.checkpoint.save)))
        world.decided(lambda: _take_hold(directory, stack))
        store = Store(directory.checkpoints, world.group)
        store.prepare()
        lineage = world.decided(lambda: read_lineage(store.directory))
        world.together(lambda: check_continuation(lineage, job, directory.root))
        mesh = job_mesh(job, world, timedelta(minutes=config.runtime.distributed_timeout_minutes))
        yield world.together(lambda: _opened(job, world, mesh, directory, store, lineage, stack))


def _check_device(job: Job, world: World) -> None:
    """Raise InputError where the device has not the kernels, or the ranks cannot exchange what the layout asks for."""
    check_implementations(job, world.device.type)
    if job.layout.pp > 1 and world.device.type == "cuda" and dist.get_backend(world.group) == "gloo":
        raise InputError(
            "--distributed-backend gloo passes no tensors of a GPU from one pipeline stage to the next: use nccl, or "
            "leave --pipeline-model-parallel-size out"
        )


def _take_hold(directory: RunDirectory, stack: ExitStack) -> None:
    directory.create()
    stack.enter_context(directory.held())


def _opened(
    job: Job, world: World, mesh: Mesh, directory: RunDirectory, store: Store, lineage: Lineage, stack: ExitStack
) -> Run:
    metrics = None
    if world.is_first:
        write_json(directory.plan, job.plan.to_json())
        write_text(directory.config, job.config.to_yaml())
        metrics = stack.enter_context(MetricsFile(directory.metrics, _covered(lineage)))
    done = sum(segment.steps for segment in job.plan.segments if _finished(lineage, job, segment))
    total = cost_steps(job.plan)
    log = stack.enter_context(Log(job.config.logging, speaks=world.is_first, total_steps=total, done_steps=done))
    log.say(describe_size(job))
    log.say(f"run         {directory.root}: {done:,} of {total:,} steps done")
    for line in describe_implementations(job, world.device.type):
        log.say(line)
    for reason in lineage.refused.values():
        log.say(f"not used: {reason}")
    if metrics is not None and metrics.dropped:
        log.say(f"dropped {metrics.dropped} lines of metrics that no checkpoint covers: those steps are done again")
    return Run(job, world, mesh, directory, store, lineage, assemble(job, mesh), metrics, log)


def _finished(lineage: Lineage, job: Job, segment: Segment) -> str | None:
    """The checkpoint of ``lineage`` that ended ``segment`` of the job's plan, or None."""
    return lineage.finished(segment.path, segment.end, job.plan.segment_fingerprint(segment))


def _covered(lineage: Lineage) -> dict[str, int]:
    """For each path, the last step that a checkpoint holds."""
    covered: dict[str, int] = {}
    for record in lineage.records.values():
        covered[record.path] = max(covered.get(record.path, 0), record.step)
    return covered
