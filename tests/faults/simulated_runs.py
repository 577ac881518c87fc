"""Launches of the real loop over real plans and sample orders, with nothing that computes and nothing on a disk.

``train_step`` and the store are fakes: an update takes note of its learning rate and of the samples that all ranks
together draw, and the weights are a hash chain over these, so that two states are equal where their histories are.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from megalrps.checkpoint.lineage import Lineage
from megalrps.checkpoint.record import CheckpointRecord
from megalrps.config import Config
from megalrps.data.stream import SampleBatch
from megalrps.errors import InputError, PreemptedError
from megalrps.parallel.group import Group
from megalrps.parallel.world import World
from megalrps.paths.plan import Window
from megalrps.training import loop
from megalrps.training.continuation import as_planned, check_continuation
from megalrps.training.control import Control
from megalrps.training.loop import Loop
from megalrps.training.prepare import Job, prepare
from megalrps.training.run import Run, source_of
from megalrps.training.run_directory import RunDirectory
from megalrps.training.signals import StopRequest
from megalrps.training.step import Batch, StepResult

CPU = torch.device("cpu")
BEGINNING = b"random weights"

Sample = tuple[str, int]
"""Increment and index in it."""


class KilledError(BaseException):
    """The launch died here, as by kill -9: nothing of it goes on."""


def chained(value: bytes, rate: float, samples: Sequence[Sample]) -> bytes:
    """The weights ``value`` after one more update."""
    return hashlib.blake2b(value + struct.pack("<d", rate) + repr(list(samples)).encode(), digest_size=16).digest()


@dataclass
class Weights:
    """The live state, as :class:`megalrps.training.state.TrainState` is used by the loop and the run."""

    value: bytes = b""
    path: str | None = None
    step: int = 0
    checkpoint: str | None = None
    train_seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    recent_losses: list[float] = field(default_factory=list)

    @property
    def optimizer(self) -> "Weights":
        return self

    def initialise(self, model: Any, seed: int) -> None:
        self.value, self.step = BEGINNING + str(seed).encode(), 0

    def reset(self) -> None:
        self.value = hashlib.blake2b(self.value + b"reset", digest_size=16).digest()

    def tensors(self) -> "Weights":
        return self

    def filled(self) -> None:
        pass


@dataclass
class MemoryStore:
    """Checkpoints by name. ``dies``: before or after which save from now on the launch dies; (0, "") for never."""

    saved: dict[str, tuple[bytes, CheckpointRecord]] = field(default_factory=dict)
    dies: tuple[int, str] = (0, "")

    @property
    def directory(self) -> "MemoryStore":
        return self

    def lineage(self) -> Lineage:
        return Lineage({name: record for name, (_, record) in self.saved.items()}, {})

    def manifest(self, name: str) -> Any:
        return SimpleNamespace(name=name, versions={}, digest=self.saved[name][0].hex())

    def save(self, name: str, state: Weights, record: dict[str, Any], publish: Any) -> None:
        number, moment = self.dies
        self.dies = (number - 1, moment)
        if self.dies == (0, "before"):
            raise KilledError
        assert name not in self.saved, f"{name} is written twice"
        self.saved[name] = state.value, CheckpointRecord.from_json(json.loads(json.dumps(record)))
        if self.dies == (0, "after"):
            raise KilledError

    def load_first(self, names: Sequence[str], state: Weights) -> Any:
        state.value = self.saved[names[0]][0]
        return SimpleNamespace(manifest=self.manifest(names[0]), refused=())


class SimulatedRun(Run):
    """A run without leases and references."""

    def _without_outdated(self) -> tuple[Lineage, str | None]:
        lineage = self.store.lineage()  # type: ignore[attr-defined]
        sources = {source_of(self.job, segment) for segment in self.job.plan.segments} - {None}
        for name in lineage.prunable(self.job.config.checkpoint.save_keep, {str(name) for name in sources}):
            del self.store.saved[name]  # type: ignore[attr-defined]
        return as_planned(self.store.lineage(), self.job), None  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Identified:
    """A sample stream that hands out which samples they are instead of their tokens.

    [n, 2]: the letter that names the increment, as a number, and the index in it.
    """

    stream: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def batch(self, indices: Any) -> SampleBatch:
        ordinals, places = self.stream.locate(indices)
        letters = np.array([ord(increment.manifest.name) for increment in self.stream.increments])
        return SampleBatch(np.stack((letters[ordinals], places), axis=1))


_STREAMS: dict[Any, Any] = {}
"""Streams keep nothing but what follows from increments, length and seed: one serves every history."""


class IdentifiedJob(Job):
    """A job whose samples are known by name, and whose options are turned into JSON once: they do not change."""

    @cached_property
    def _resolved(self) -> dict[str, Any]:
        return super().resolved()

    def resolved(self) -> dict[str, Any]:
        return self._resolved

    def stream(self, window: Window) -> Any:
        contents = tuple(self.data_fingerprints().items())
        key = (window.increments, window.replay, contents, self.config.data.seq_length, self.config.training.seed)
        if key not in _STREAMS:
            _STREAMS[key] = _Identified(super().stream(window))
        return _STREAMS[key]


@dataclass(frozen=True)
class Launch:
    """What one launch is started with, and how it dies: after so many updates, or at one of its saves; 0: it lives."""

    config: Config
    ranks: int = 1
    updates: int = 0
    save: tuple[int, str] = (0, "")


Made = Callable[[str, int, float, list[Sample]], None]
"""Told of every update: its path, its step, its learning rate, and the samples of its batch in their order."""


def simulate(launch: Launch, store: MemoryStore, made: Made, run_directory: Any) -> str:
    """Train as the entry would; returns how it ended: "done", "killed", "stopped", or "waits" for another path."""
    prepared = prepare(launch.config, launch.ranks)
    job = IdentifiedJob(**{each.name: getattr(prepared, each.name) for each in fields(Job)})
    store.dies = launch.save
    with mock.patch("megalrps.training.run.read_lineage", lambda directory: directory.lineage()):
        run = _opened(job, store, run_directory)
        others = [Loop(replace(run, mesh=_mesh(rank, launch.ranks))) for rank in range(1, launch.ranks)]
        run.mesh = _mesh(0, launch.ranks)
        with mock.patch.object(loop, "train_step", _recording(others, made, launch.updates)):
            return _ended(run)


def _ended(run: Run) -> str:
    try:
        loop.train(run)
    except KilledError:
        return "killed"
    except PreemptedError:
        return "stopped"
    except InputError as error:
        if "which is not there yet" not in str(error):
            raise
        return "waits"
    return "done"


def _opened(job: Job, store: MemoryStore, run_directory: Any) -> Run:
    directory: Any = RunDirectory(run_directory)
    lineage = store.lineage()
    allowed = check_continuation(lineage, job, run_directory)
    paths = frozenset(job.config.runtime.paths or [path.name for path in job.plan.paths])
    silent: Any = SimpleNamespace(say=lambda text: None, step=lambda metrics, end: None)
    parts: Any = (store, as_planned(lineage, job), Weights(), paths, None, None, silent, StopRequest(), Control(None))
    return SimulatedRun(job, World(0, 1, CPU, None), _mesh(0, 1), directory, *parts, allowed=allowed)


def _mesh(rank: int, size: int) -> Any:
    return SimpleNamespace(data=Group(rank, size, CPU, None))


def _recording(others: Sequence[Loop], made: Made, dies_after: int) -> Callable[..., StepResult]:
    updates = iter(range(1, 1 << 60))

    def train_step(state: Weights, batch: Batch, *, learning_rate: float, mesh: Any, enter: Any) -> StepResult:
        if dies_after and next(updates) > dies_after:
            raise KilledError
        path, step = str(state.path), state.step + 1
        shares = [batch.tokens, *(other.batch(other.plan.window_at(path, step), step).tokens for other in others)]
        samples = [(chr(letter), index) for letter, index in np.concatenate(shares).tolist()]
        made(path, step, learning_rate, samples)
        state.value, state.checkpoint = chained(state.value, learning_rate, samples), None
        return StepResult(1.0, 1.0)

    return train_step
