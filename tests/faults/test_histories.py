"""Whatever happens to a run, each of its updates has the learning rate and the samples that the plan gives its step.

Random histories of a lineage are replayed through the real loop (simulated_runs.py): launches that die at any update or
save, that are stopped, that train some of the paths, on 1, 2 or 4 ranks, with other save intervals, with increments
that arrive meanwhile and learning rates that are changed by --allow. What every update is compared with is written here
once more, from the formulas alone.
"""

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import counts
import numpy as np
import pytest
from simulated_runs import BEGINNING, Launch, MemoryStore, Sample, Weights, chained, simulate
from tiny_job import SEQUENCE_LENGTH, TinyData, command, write_increment

from megalrps.checkpoint.names import checkpoint_name
from megalrps.config import Config, parse_config
from megalrps.data.increment import open_increment
from megalrps.data.stream import SampleStream
from megalrps.errors import InputError
from megalrps.paths.curves import Curve
from megalrps.paths.options import PlanOptions
from megalrps.paths.paradigms import build_plan
from megalrps.paths.plan import Increment, Segment, Window
from megalrps.training.loop import Loop
from megalrps.training.step import Batch

HISTORIES = counts.count("histories", 60, 1000)
BATCH, SEED = 4, 1234
WINDOWS = (11, 23, 16, 9)
"""Samples of each increment: most are gone over more than once."""
EXACT = 1e-12
STEP, RATE = Loop.step, Curve.__call__  # as they are before a test puts a defect into them
STYLES = ("cosine", "knee", "linear", "multi-step", "1-sqrt", "exponential")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """Increments a, b, c and d."""
    place = tmp_path_factory.mktemp("data")
    names = "abcd"[: len(WINDOWS)]
    tokens = [windows * SEQUENCE_LENGTH + 1 for windows in WINDOWS]
    return TinyData(tuple(write_increment(place / each, each, n) for each, n in zip(names, tokens, strict=True)), ())


@dataclass
class Oracle:
    """The closed form of a run that nothing disturbs: geometry, learning rates and samples, from options and steps."""

    data: TinyData
    options: PlanOptions
    streams: dict[str, SampleStream] = field(default_factory=dict)

    @property
    def ends(self) -> list[int]:
        return [0, *itertools.accumulate(self.options.increment_steps)]

    def version(self, path: str) -> int:
        return int(path.removeprefix("v"))

    def decay_steps(self, version: int) -> int:
        return round(self.options.alpha[version - 1] * self.options.increment_steps[version - 1])

    def fork(self, version: int) -> int:
        return self.ends[version] - self.decay_steps(version)

    def span(self, path: str) -> tuple[int, int]:
        """The steps that the path itself trains: start < step <= end."""
        if path == "main":
            return 0, self.fork(len(self.options.increment_steps))
        version = self.version(path)
        start = {"ptfs": 0, "cpt": self.ends[version - 1], "lrps": self.fork(version)}[self.options.paradigm]
        return start, self.ends[version]

    @property
    def paths(self) -> list[str]:
        versions = [f"v{number}" for number in range(1, len(self.options.increment_steps) + 1)]
        return ["main", *versions] if self.options.paradigm == "lrps" else versions

    def trainer(self, path: str, step: int) -> str:
        """The path that makes update ``step`` of the trajectory of ``path``."""
        if step > self.span(path)[0]:
            return path
        return "main" if self.options.paradigm == "lrps" else self.trainer(f"v{self.version(path) - 1}", step)

    def rate(self, path: str, step: int) -> float:
        """The learning rate of an update that ``path`` trains itself."""
        options, (start, end) = self.options, self.span(path)
        warmup = options.lr_warmup_iters or 0
        if options.paradigm == "lrps":
            if path == "main":
                return options.lr * min(1.0, step / warmup) if warmup else options.lr
            return self.decayed(step - start, end - start)
        hold = {"knee": 50, "multi-step": 80}.get(options.lr_decay_style, 0) * (end - start) // 100
        done, held = step - start, max(hold, warmup)
        if done <= held:
            return options.lr * min(1.0, done / warmup) if warmup else options.lr
        return self.decayed(done - held, end - start - held)

    def decayed(self, done: int, length: int) -> float:
        """``done`` of ``length`` steps after the maximal rate."""
        top, bottom, x = self.options.lr, self.options.min_lr, done / length
        match self.options.lr_decay_style:
            case "cosine":
                return bottom + (top - bottom) * (1 + math.cos(math.pi * x)) / 2
            case "multi-step":
                return bottom if done > length // 2 else math.sqrt(top * bottom)
            case "1-sqrt":
                return bottom + (top - bottom) * (1 - math.sqrt(x))
            case "exponential":
                return top * (bottom / top) ** x
        return top + (bottom - top) * x

    def samples(self, path: str, step: int) -> list[Sample]:
        """The batch of an update: its place in the keyed order of the data that the step belongs to."""
        number = next(place for place, end in enumerate(self.ends) if step <= end)
        first, names = (self.ends[number - 1], "abcd"[number - 1])
        if self.options.paradigm == "ptfs":
            first, names = 0, "abcd"[: self.version(path)]
        if names not in self.streams:
            chosen = [open_increment(self.data.increments["abcd".index(name)]) for name in names]
            self.streams[names] = SampleStream(chosen, SEQUENCE_LENGTH, SEED)
        places = np.arange(BATCH, dtype=np.int64) + (step - 1 - first) * BATCH
        return [(names[ordinal], place) for ordinal, place in np.stack(self.streams[names].locate(places), 1).tolist()]

    @property
    def resets(self) -> bool:
        """Whether a branch begins without the moments of the main path."""
        return self.options.paradigm == "lrps" and self.options.branch_optimizer == "reset"

    def weights(self, path: str, rates: dict[tuple[str, int], float]) -> bytes:
        """The state at the end of ``path``; of each update, ``rates`` has the bits of the learning rate."""
        value = BEGINNING + str(SEED).encode()
        for step in range(1, self.span(path)[1] + 1):
            trainer = self.trainer(path, step)
            if self.resets and trainer == path != "main" and step == self.span(path)[0] + 1:
                live = Weights(value)
                live.reset()
                value = live.value
            value = chained(value, rates[trainer, step], self.samples(trainer, step))
        return value


@dataclass
class History:
    """One lineage, launched over and over until its plan is done."""

    data: TinyData
    draw: random.Random
    base: Config
    store: MemoryStore = field(default_factory=MemoryStore)
    rates: dict[tuple[str, int], float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    updates: int = 0
    resumed: int = 0
    ends: list[str] = field(default_factory=list)

    def play(self, place: Path) -> None:
        """Everything that happens to it; what is not as the closed form says is in ``wrong``."""
        versions = self.draw.randint(1, len(WINDOWS))
        arrived = self.draw.randint(1, versions)
        plan, allow = self.plan(versions), set[str]()
        while True:
            now = replace(plan, increment_steps=plan.increment_steps[:arrived])
            self.launch(now, plan, sorted(allow), place)
            oracle = Oracle(self.data, now)
            done = {checkpoint_name(path, oracle.span(path)[1]) for path in oracle.paths} <= self.store.saved.keys()
            if done and arrived == versions:
                break
            if arrived < versions and (done or self.draw.random() < 0.15):
                arrived += 1
            if self.draw.random() < 0.12 and self.store.saved:
                plan = self.changed(plan, allow)
        for path in oracle.paths:
            name = checkpoint_name(path, oracle.span(path)[1])
            if self.store.saved[name][0] != oracle.weights(path, self.rates):
                self.wrong.append(f"{name} is not the state that these updates lead to")

    def plan(self, versions: int) -> PlanOptions:
        """Options of a plan; alphas are given ahead, so that it may grow."""
        steps = tuple(self.draw.randint(6, 12) for _ in range(versions))
        paradigm = self.draw.choice(("lrps", "lrps", "cpt", "ptfs"))
        return PlanOptions(
            paradigm=paradigm,
            alpha=tuple(self.draw.choice((0.2, 0.5, 0.6, 0.75)) for _ in range(versions)),
            increment_steps=steps,
            lr=self.draw.uniform(1e-4, 1e-2),
            min_lr=self.draw.uniform(1e-6, 1e-4),
            lr_decay_style=self.draw.choice(STYLES),
            lr_warmup_iters=self.draw.randint(0, 1 if paradigm == "lrps" else 3),
            branch_optimizer=self.draw.choice(("carry", "reset")),
        )

    def changed(self, plan: PlanOptions, allow: set[str]) -> PlanOptions:
        """Other learning rates; ``allow`` gets what they take."""
        other: dict[str, Any] = {"min_lr": self.draw.uniform(1e-6, 1e-4)}
        if self.draw.random() < 0.5:
            other["lr"] = self.draw.uniform(1e-4, 1e-2)
        allow.update(f"{name.replace('_', '-')}=tried" for name in other)
        return replace(plan, **other)

    def launch(self, now: PlanOptions, whole: PlanOptions, allow: list[str], place: Path) -> None:
        """One launch of the plan as far as its data have arrived, with whatever it is given, to whatever end."""
        oracle, curves = Oracle(self.data, now), rates_of(whole)

        def made(path: str, step: int, rate: float, samples: list[Sample]) -> None:
            self.updates += 1
            self.rates[path, step] = rate
            if rate != curves(path, step) or not math.isclose(rate, oracle.rate(path, step), rel_tol=EXACT):
                self.wrong.append(f"{path} {step}: learning rate {rate!r}, not {curves(path, step)!r}")
            if samples != oracle.samples(path, step):
                self.wrong.append(f"{path} {step}: samples {samples}, not {oracle.samples(path, step)}")

        self.resumed += bool(self.store.saved)
        launch = self.drawn(oracle)
        for reasons in itertools.chain([()], [allow], [[each] for each in allow]):
            try:
                self.ends.append(simulate(with_allowed(launch, tuple(reasons)), self.store, made, place))
                return
            except InputError as error:  # nothing is written yet: it is said, and launched with a reason
                if "--allow" not in str(error):
                    raise
        raise AssertionError(f"--allow {allow} does not let the launch go on")

    def drawn(self, oracle: Oracle) -> Launch:
        """What does not decide the numbers, drawn at random."""
        draw, runtime = self.draw, self.base.runtime
        if draw.random() < 0.3:
            runtime = replace(runtime, paths=tuple(draw.sample(oracle.paths, draw.randint(1, len(oracle.paths)))))
        if draw.random() < 0.2:
            runtime = replace(runtime, exit_interval=draw.randint(2, 9))
        config = replace(
            self.base,
            plan=oracle.options,
            data=replace(self.base.data, increments=self.data.increments[: len(oracle.ends) - 1]),
            checkpoint=replace(
                self.base.checkpoint, save_interval=draw.choice((0, 1, 2, 3, 5)), save_keep=draw.randint(1, 3)
            ),
            runtime=runtime,
        )
        death = draw.choice(("", "update", "save"))
        return Launch(
            config,
            ranks=draw.choice((1, 2, 4)),
            updates=draw.randint(1, 14) if death == "update" else 0,
            save=(draw.randint(1, 3), draw.choice(("before", "after"))) if death == "save" else (0, ""),
        )


def with_allowed(launch: Launch, allow: tuple[str, ...]) -> Launch:
    checkpoint = replace(launch.config.checkpoint, allow=allow)
    return replace(launch, config=replace(launch.config, checkpoint=checkpoint))


def rates_of(options: PlanOptions) -> Callable[[str, int], float]:
    """The learning rates of a run whose increments are all there from the start, as its plan has them."""
    names = "abcd"[: len(options.increment_steps)]
    steps = zip(names, options.increment_steps, strict=True)
    plan = build_plan(tuple(Increment(name, count) for name, count in steps), options)
    return lambda path, step: RATE(plan.path(path).curve, step)


@pytest.fixture(scope="module")
def base(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The options that all histories share."""
    return parse_config(command(data, tmp_path_factory.mktemp("run"), "--global-batch-size", str(BATCH)))


def played(data: TinyData, base: Config, number: int) -> History:
    """History ``number`` of this session."""
    history = History(data, random.Random(f"{counts.seed()} {number}"), base)
    history.play(Path(str(base.checkpoint.save)))
    return history


def test_every_update_of_every_history_is_the_plans(data: TinyData, base: Config):
    histories = [played(data, base, number) for number in range(HISTORIES)]
    wrong = {number: history.wrong[:3] for number, history in enumerate(histories) if history.wrong}
    assert wrong == {}
    ends = Counter(end for history in histories for end in history.ends)
    assert set(ends) == {"done", "killed", "stopped", "waits"}
    counts.record(
        "histories",
        histories=len(histories),
        launches=ends.total(),
        killed=ends["killed"],
        resumed=sum(history.resumed for history in histories),
        updates=sum(history.updates for history in histories),
        wrong=0,
    )


def one_step_late(self: Loop, segment: Segment) -> None:
    """Defect: after a resume, the schedule stands where it stood before the last update."""
    resumed = self.run.lineage.latest(segment.path, self.plan.segment_fingerprint(segment), segment.start, segment.end)
    if resumed is None:
        return STEP(self, segment)
    with mock.patch.object(Curve, "__call__", lambda curve, step: RATE(curve, max(step - 1, 1))):
        return STEP(self, segment)


def by_modulo(self: Loop, window: Window, step: int) -> Batch:
    """Defect: rank r of n draws every n-th sample of the batch."""
    data, size = self.run.mesh.data, self.options.global_batch_size
    first = (step - 1 - window.start) * size
    places = np.arange(first + data.rank, first + size, data.size, dtype=np.int64)
    return Batch(self._stream(window).batch(places).tokens_BS, size)


@pytest.mark.parametrize(
    ("method", "defect", "told"), [("step", one_step_late, "rate"), ("batch", by_modulo, "samples")]
)
def test_the_classical_defects_are_caught(data: TinyData, base: Config, method: str, defect: Any, told: str):
    with mock.patch.object(Loop, method, defect):
        histories = [played(data, base, number) for number in range(6)]
    caught = [history for history in histories if any(told in line for line in history.wrong)]
    assert len(caught) >= 3, "half of the histories, at least"
