"""How a launch takes hold of a run: everything checked, the paths' leases taken, references and metrics put right."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megalrps.checkpoint.background import BackgroundSave
from megalrps.checkpoint.errors import LostCheckpointError
from megalrps.checkpoint.leases import Leases
from megalrps.checkpoint.lineage import Lineage, read_lineage
from megalrps.checkpoint.names import path_of
from megalrps.checkpoint.publication import Publisher
from megalrps.checkpoint.references import KINDS, References
from megalrps.checkpoint.store import Store
from megalrps.config import Config
from megalrps.errors import InputError, PreemptedError
from megalrps.files import write_json, write_text
from megalrps.parallel.mesh import Mesh
from megalrps.parallel.world import World, collective_timeout
from megalrps.training.allowed import texts_of
from megalrps.training.assemble import assemble, job_mesh
from megalrps.training.console import Log, announce
from megalrps.training.continuation import as_planned, check_continuation, difference_between_ranks, identity
from megalrps.training.control import Control
from megalrps.training.describe import describe_size
from megalrps.training.implementations import check_implementations, describe_implementations
from megalrps.training.metrics import MetricsFile
from megalrps.training.prepare import Job, prepare
from megalrps.training.run import Run, finished_by, source_of
from megalrps.training.run_directory import RunDirectory
from megalrps.training.run_state import RunState
from megalrps.training.signals import STOP_REASONS, StopRequest
from megalrps.training.snapshot import Background, Left, Snapshot
from megalrps.training.watch import Watch


def check_place(job: Job) -> None:
    """Raise InputError where :func:`open_run` would refuse the job's directory; makes and changes nothing."""
    directory = RunDirectory(Path(str(job.config.checkpoint.save)))
    directory.check()
    references = References(directory.lineage)  # read before the checkpoints: whoever prunes one has a newer one
    acknowledged = [f"{kind}/{name}" for kind in KINDS for name in references.names(kind)]
    lineage = read_lineage(directory.checkpoints)
    _check_load(job, lineage, directory, acknowledged)
    check_continuation(lineage, job, directory.root)


@contextmanager
def open_run(config: Config, world: World, stop: StopRequest | None = None) -> Iterator[Run]:
    """Check everything, take hold of the paths to be trained, and stand ready to train what the plan still lacks.

    Collective. ``stop``: who asks for an early end. Raises InputError, before anything is trained or written over, for
    options, data or a directory that cannot be used or that belong to another run, and HeldError, having written
    nothing at all, where another launch trains one of the paths.
    """
    timeout = timedelta(minutes=config.runtime.distributed_timeout_minutes)
    stop = stop or StopRequest(config.runtime.exit_duration_in_mins)
    watch = Watch(world.rank, world.size, world.store, timeout.total_seconds())
    with watch, ExitStack() as stack, watch.explained():
        job = world.together(lambda: prepare(config, world.size))
        world.agree(difference_between_ranks(world.gathered(identity(job))))
        world.together(lambda: _check_device(job, world))
        paths = world.together(lambda: _paths(job))
        directory = RunDirectory(Path(str(config.checkpoint.save)))
        world.decided(lambda: check_place(job))
        _leave_if_asked(world, stop)
        publisher = world.together(lambda: _take_hold(job, paths, directory, stop, stack) if world.is_first else None)
        told = world.together(lambda: _told(publisher, config, paths, directory, world, stack) if publisher else None)
        store = Store(directory.checkpoints, world.group)
        store.prepare(lambda name: path_of(name) in paths)
        found = world.decided(lambda: read_lineage(store.directory))
        allowed = world.together(lambda: check_continuation(found, job, directory.root))
        lineage = as_planned(found, job)
        said = world.together(lambda: publisher.reconcile(store.directory) if publisher else [])
        backend = "gloo" if world.group is None else dist.get_backend(world.group)
        mesh = job_mesh(job, world, collective_timeout(config.runtime.distributed_timeout_minutes, backend))
        control = Control(dist.new_group(backend="gloo", timeout=timeout) if world.group is not None else None)
        run = world.together(
            lambda: _opened(job, world, mesh, directory, store, lineage, paths, publisher, control, stop, stack)
        )
        run.watch, run.allowed = watch, allowed
        if told is not None:
            told.trained = run.state
            watch.last_words.append(told.ended)
        for line in (*said, *(f"allowed: {text}" for text in texts_of(allowed))):
            run.log.say(line)
        if config.checkpoint.async_save:
            run.background = _background(config, world, run, stack)
        yield run


def _background(config: Config, world: World, run: Run, stack: ExitStack) -> Background:
    """What writes checkpoints while training goes on; it ends before anything else of the run does. Collective."""
    timeout = timedelta(minutes=config.runtime.distributed_timeout_minutes)
    group = dist.new_group(backend="gloo", timeout=timeout) if world.group is not None else None
    # an exception is told before the watch gives this rank up, which waits with it
    saves: BackgroundSave[Left] = BackgroundSave(Store(run.store.directory, group), timeout.total_seconds() / 2)
    snapshot = world.together(lambda: Snapshot(run.state))
    among = replace(world, device=torch.device("cpu"), group=group)
    return Background(among, stack.enter_context(saves), snapshot)


def _paths(job: Job) -> frozenset[str]:
    """The paths that this launch trains."""
    known = [path.name for path in job.plan.paths]
    asked = job.config.runtime.paths
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise InputError(f"--paths {unknown[0]} is not a path of the plan: it has {', '.join(known)}")
    return frozenset(asked or known)


def _check_load(job: Job, lineage: Lineage, directory: RunDirectory, acknowledged: Sequence[str]) -> None:
    """Raise InputError where ``--load`` does not agree with what is in the directory.

    ``acknowledged`` are the lineage's references. Where there are some and no checkpoint at all, something is missing,
    and no run is begun again because of that: LostCheckpointError.
    """
    load, found = job.config.checkpoint.load, bool(lineage.records or lineage.refused)
    if load == "none" and (found or acknowledged):
        holds = f"{len(lineage.records)} checkpoints" if found else f"the lineage of a run ({acknowledged[0]})"
        raise InputError(
            f"--load none: --save {directory.root} holds {holds}; name a new directory, or leave it out to go on with "
            "them"
        )
    if acknowledged and not found:
        raise LostCheckpointError(
            f"{directory.lineage} has {acknowledged[0]}, and {directory.checkpoints} holds no checkpoint at all: "
            "restore them from a copy, or begin anew in another --save"
        )
    if load == "required" and not found:
        raise InputError(f"--load required: --save {directory.root} holds no checkpoint; name the run, or leave it out")


def _check_device(job: Job, world: World) -> None:
    """Raise InputError where the device has not the kernels, or the ranks cannot exchange what the layout asks for."""
    check_implementations(job, world.device.type)
    if job.layout.pp > 1 and world.device.type == "cuda" and dist.get_backend(world.group) == "gloo":
        raise InputError(
            "--distributed-backend gloo passes no tensors of a GPU from one pipeline stage to the next: use nccl, or "
            "leave --pipeline-model-parallel-size out"
        )


def _leave_if_asked(world: World, stop: StopRequest) -> None:
    """Raise PreemptedError on every rank if any was asked to stop, having written nothing. Collective."""
    reason = max(world.gathered(stop.reason), key=STOP_REASONS.index)
    if reason is not None:
        raise world.told_once(_asked_early(reason))


def _asked_early(reason: str) -> PreemptedError:
    return PreemptedError(f"stopped by {reason} before anything was trained: there was nothing to save", reason)


def _told(
    publisher: Publisher,
    config: Config,
    paths: Collection[str],
    directory: RunDirectory,
    world: World,
    stack: ExitStack,
) -> RunState:
    """On the first rank: ``run_state.json``, from here to the end."""
    file = directory.run_state(config.runtime.paths)
    return stack.enter_context(RunState(file, publisher, paths, world.size))


def _take_hold(
    job: Job, paths: Collection[str], directory: RunDirectory, stop: StopRequest, stack: ExitStack
) -> Publisher:
    """On the first rank: make the directory, and take the leases of ``paths``, unless asked to stop meanwhile."""

    def waiting() -> None:
        if stop.reason is not None:
            raise _asked_early(stop.reason)

    directory.create()
    references = References(directory.lineage)
    references.prepare()
    leases = Leases(references)
    leases.prepare()
    taken = leases.acquire(
        _sources(job, paths),
        seconds=job.config.checkpoint.lease_seconds,
        watching=announce,
        waiting=waiting,
    )
    return Publisher(references, stack.enter_context(taken))


def _sources(job: Job, paths: Collection[str]) -> dict[str, list[str]]:
    """The checkpoints that each of ``paths`` is going to load from another path."""
    reads: dict[str, list[str]] = {path: [] for path in paths}
    for segment in job.plan.segments:
        source = source_of(job, segment)
        if segment.path in reads and source is not None and path_of(source) != segment.path:
            reads[segment.path].append(source)
    return reads


def _opened(
    job: Job,
    world: World,
    mesh: Mesh,
    directory: RunDirectory,
    store: Store,
    lineage: Lineage,
    paths: frozenset[str],
    publisher: Publisher | None,
    control: Control,
    stop: StopRequest,
    stack: ExitStack,
) -> Run:
    metrics = None
    if world.is_first:
        write_json(directory.plan, job.plan.to_json())
        write_text(directory.config, job.config.to_yaml())
        covered = {path: _covered(lineage).get(path, 0) for path in paths}
        metrics = stack.enter_context(MetricsFile(directory.metrics, covered))
    segments = [segment for segment in job.plan.segments if segment.path in paths]
    done = sum(segment.steps for segment in segments if finished_by(lineage, job, segment))
    total = sum(segment.steps for segment in segments)
    log = stack.enter_context(Log(job.config.logging, speaks=world.is_first, total_steps=total, done_steps=done))
    log.say(describe_size(job))
    of = (
        f"{total:,} steps"
        if len(segments) == len(job.plan.segments)
        else f"{total:,} steps of {', '.join(sorted(paths))}"
    )
    log.say(f"run         {directory.root}: {done:,} of {of} done")
    for line in describe_implementations(job, world.device.type):
        log.say(line)
    for reason in lineage.refused.values():
        log.say(f"not used: {reason}")
    if metrics is not None and metrics.dropped:
        log.say(f"dropped {metrics.dropped} lines of metrics that no checkpoint covers: those steps are done again")
    state = assemble(job, mesh)
    return Run(job, world, mesh, directory, store, lineage, state, paths, metrics, publisher, log, stop, control)


def _covered(lineage: Lineage) -> dict[str, int]:
    """For each path, the last step that a checkpoint holds."""
    covered: dict[str, int] = {}
    for record in lineage.records.values():
        covered[record.path] = max(covered.get(record.path, 0), record.step)
    return covered
