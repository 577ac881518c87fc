"""Numbers that are none, put into one element on one rank, and losses that leap: noticed by all ranks in their step."""

import hashlib
import json
import math
import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from counts import count, record, seed
from distributed_harness import run_ranks
from tiny_job import ALONE, BATCH, SEQUENCE_LENGTH, TinyData, command, make_data, metrics, opened, world_of_harness

from megalrps.checkpoint.store import Store
from megalrps.errors import EXIT_DIVERGED, DivergedError, PreemptedError, RepeatedError, exit_status_of
from megalrps.parallel.buffers import FlatBuffers
from megalrps.parallel.world import World
from megalrps.training import loop
from megalrps.training.engine import Engine
from megalrps.training.loop import Loop
from megalrps.training.run import Run
from megalrps.training.state import TrainState
from megalrps.training.step import StepResult

NAN, INF = math.nan, math.inf
STEPS = 12
"""Of the one increment: main to its fork at step 5, v1 from there to 12."""
SKIP = ("--on-non-finite", "skip")
WINDOW = ("--loss-spike-window", "5", "--loss-spike-sigma", "6")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "alone": (1, ()),
    "dp2": (2, ("--no-overlap-grad-reduce",)),  # what the hook below changes has not left yet
    "tp2": (2, ("--tensor-model-parallel-size", "2")),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """One increment, and no held-out part: nothing is evaluated."""
    return replace(make_data(tmp_path_factory.mktemp("data"), (STEPS,)), held_out=())


@dataclass(frozen=True)
class Fault:
    """What one element of a gradient becomes on one rank, before the ranks add theirs up, or what its loss does.

    ``at``: which call, counted from 1, of the backward pass; in a run without restarts the step. ``parameter`` and
    ``element``: which one, modulo how many there are.
    """

    at: int
    where: str
    value: float
    parameter: int = 0
    element: int = 0


MIXED = (
    Fault(2, "gradient", NAN, parameter=0, element=5),
    Fault(3, "gradient", -INF, parameter=-1, element=-1),
    Fault(5, "loss", NAN),
    Fault(6, "loss", INF),
    Fault(8, "gradient", INF, parameter=7, element=11),
)


@contextmanager
def injected(faults: Iterable[Fault], active: bool) -> Iterator[None]:
    """``faults`` happen in this process if it is the ``active`` one."""
    by_call = {(fault.where, fault.at): fault for fault in faults} if active else {}
    calls = {"gradient": 0, "loss": 0}
    finish, passes = FlatBuffers.finish_gradients, Engine.forward_backward

    def finishing(buffers: FlatBuffers) -> None:
        calls["gradient"] += 1
        fault = by_call.get(("gradient", calls["gradient"]))
        if fault is not None:
            views = [view for bucket in buffers.buckets for view in bucket.gradient_views]
            view = views[fault.parameter % len(views)].view(-1)
            view[fault.element % len(view)] = fault.value
        finish(buffers)

    def passing(engine: Engine, *args: Any) -> torch.Tensor:
        calls["loss"] += 1
        total = passes(engine, *args)
        fault = by_call.get(("loss", calls["loss"]))
        return total if fault is None else total * fault.value

    with (
        mock.patch.object(FlatBuffers, "finish_gradients", finishing),
        mock.patch.object(Engine, "forward_backward", passing),
    ):
        yield


def held(state: TrainState) -> str:
    """sha256 of all that an update changes: parameters, masters, moments, the count of updates."""
    state.buffers.wait_parameters()
    flats = [each for bucket in state.buffers.buckets for each in (bucket.master, bucket.parameters)]
    told = hashlib.sha256()
    for each in (*flats, *state.optimizer.exp_avg, *state.optimizer.exp_avg_sq, state.optimizer.updates):
        told.update(each.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return told.hexdigest()


@dataclass
class Watched:
    """What one rank saw of a launch: the steps that it began, those that changed nothing, and how it ended."""

    steps: list[int]
    unchanged: list[int]
    updates: int = -1
    skipped: int = -1
    losses: tuple[str, ...] = ()
    said: tuple[str, ...] = ()
    error: str = ""
    status: int = 0


def watched(arguments: list[str], world: World, faults: Iterable[Fault] = (), victim: int = 0) -> Watched:
    """Train to the end of the plan or of the patience with the faults."""
    seen, step, judged = Watched([], []), Loop.step, loop.judge
    bits: list[str] = []

    def stepping(self: Loop, segment: Any) -> None:
        before, now = held(self.state), self.state.step + 1
        seen.steps.append(now)
        try:
            step(self, segment)
        finally:
            if held(self.state) == before:
                seen.unchanged.append(now)

    def judging(result: StepResult, *rest: Any) -> Any:
        bits.append(result.loss.hex())
        return judged(result, *rest)

    said: list[str] = []
    with (
        injected(faults, active=world.rank == victim),
        mock.patch.object(Loop, "step", stepping),
        mock.patch.object(loop, "judge", judging),
        opened(arguments, world) as run,
    ):
        with mock.patch.object(run.log, "say", said.append):
            try:
                loop.train(run)
            except (DivergedError, PreemptedError, RepeatedError) as error:
                seen.error, seen.status = str(error), exit_status_of(error)
        seen.updates, seen.skipped = int(run.state.optimizer.updates), run.state.skipped
    seen.losses, seen.said = tuple(bits), tuple(said)
    return seen


@dataclass(frozen=True)
class Launch:
    """A launch at some layout, with faults on one rank, the ``victim``; ``run`` is its directory."""

    run: Path
    arguments: tuple[str, ...]
    faults: tuple[Fault, ...]
    victim: int


def _rank_watches(rank: int, launches: list[Launch]) -> list[Watched]:
    return [watched([*each.arguments], world_of_harness(), each.faults, each.victim) for each in launches]


def launches(data: TinyData, place: Path, layout: str) -> dict[str, Launch]:
    """By policy: what is put in, and the flags."""
    ranks, flags = LAYOUTS[layout]
    every = ("--save-interval", "1")
    leap = 10.0 * (ranks if layout == "dp2" else 1)  # of tensor-parallel ranks the first one's loss is all ranks'
    of_policy: dict[str, tuple[tuple[str, ...], tuple[Fault, ...]]] = {
        "skip": (SKIP, MIXED),
        "stop": (every, (MIXED[1],)),
        "patience": ((*SKIP, "--max-skipped-steps", "2"), tuple(Fault(at, "loss", NAN) for at in (2, 3, 5, 6, 7))),
        "spike": ((*every, *WINDOW, "--on-loss-spike", "stop"), (Fault(9, "loss", leap),)),
    }
    made = {}
    for policy, (more, faults) in of_policy.items():
        run = place / f"{layout}, {policy}"
        victim = 0 if policy == "spike" else ranks - 1
        made[policy] = Launch(run, (*command(data, run, *flags, *more),), faults, victim)
    return made


Told = dict[str, tuple[Path, list[Watched]]]
"""By policy: the directory, and what each rank saw."""


@pytest.fixture(scope="module")
def launched(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Told]:
    """By layout; launches of as many ranks share their processes, whose start costs more than what they train."""
    place, told = tmp_path_factory.mktemp("launched"), {}
    for ranks in (1, 2):
        layouts = [name for name, (size, _) in LAYOUTS.items() if size == ranks]
        asked = {(name, policy): each for name in layouts for policy, each in launches(data, place, name).items()}
        if ranks == 1:
            by_rank = [[watched([*each.arguments], ALONE, each.faults) for each in asked.values()]]
        else:
            by_rank = run_ranks(place / "rendezvous", ranks, _rank_watches, list(asked.values()), timeout=120)
        for ((layout, policy), launch), seen in zip(asked.items(), zip(*by_rank, strict=True), strict=True):
            told.setdefault(layout, {})[policy] = (launch.run, list(seen))
    return told


def events(run: Path) -> list[dict[str, Any]]:
    """The lines of events.jsonl."""
    file = run / "events.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(scope="module")
def drawn(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, list[int]]]:
    """The samples of every step, as the stream itself has them."""
    with opened(command(data, tmp_path_factory.mktemp("asked") / "run")) as run:
        _, places = run.job.union("a").locate(np.arange(STEPS * BATCH))
    return {step: {"a": places[(step - 1) * BATCH :][:BATCH].tolist()} for step in range(1, STEPS + 1)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_no_number_on_one_rank_leaves_the_update_out_on_all_of_them(
    launched: dict[str, Told], drawn: dict[int, dict[str, list[int]]], layout: str
):
    told = launched[layout]
    (skipped, skip), (stopped, stop), (_, patience) = told["skip"], told["stop"], told["patience"]
    left_out = [fault.at for fault in MIXED]
    for each in skip:
        assert (each.steps, each.unchanged, each.status) == (list(range(1, STEPS + 1)), left_out, 0)
        assert (each.updates, each.skipped) == (STEPS - len(MIXED), len(MIXED))
    assert len({each.losses for each in skip}) == 1, "the loss is not the same bits on every rank"
    for launch, steps, unchanged in ((stop, 3, [3]), (patience, 7, [2, 3, 5, 6, 7])):
        for each in launch:
            assert (each.steps, each.unchanged) == (list(range(1, steps + 1)), unchanged)
            assert (each.error, each.status) == (launch[0].error, EXIT_DIVERGED)
    check_skipped(skipped, left_out, skip[0].said, drawn)
    assert Store(stopped / "checkpoints").names() == ("main-00000001", "main-00000002")
    first = ", ".join(map(str, drawn[3]["a"][:4]))
    for words in ("path main, step 3: loss ", "gradient norm inf", f"its samples a: {first} and 4 more"):
        assert words in stop[0].error
    assert "step 7: " in patience[0].error and "more than --max-skipped-steps 2 in a row" in patience[0].error
    assert [(event["event"], event["action"]) for event in events(stopped)] == [("non_finite", "stop")]
    record("F9", **{f"one element, {layout}": {"faults": len(MIXED) + 6, "ranks": len(skip)}})


def check_skipped(
    run: Path, left_out: list[int], said: tuple[str, ...], drawn: dict[int, dict[str, list[int]]]
) -> None:
    """Metrics, counters, events and the log of a run whose updates at steps ``left_out`` were left out."""
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if line["skipped"]] == left_out
    assert [line["step"] for line in lines if line["grad_norm"] is None] == left_out
    assert {line["step"] for line in lines if line["loss"] is None} <= set(left_out)
    assert [line["samples"] for line in lines] == [BATCH * step for step in range(1, STEPS + 1)]
    assert len({line["lr"] for line in lines[4:]}) > 1 and all(line["lr"] > 0 for line in lines)
    found = events(run)
    assert [event["step"] for event in found] == left_out
    assert [event["samples"] for event in found] == [drawn[step] for step in left_out]
    assert all((event["event"], event["action"]) == ("non_finite", "skip") for event in found)
    told = [line for line in said if "the update was left out, 1 in a row" in line]
    assert [f"step {step}: " in line for step, line in zip((2, 5, 8), told, strict=True)] == [True] * 3
    assert committed(run) == [("main-00000005", 3), ("v1-00000012", len(left_out))]


def committed(run: Path) -> list[tuple[str, int]]:
    """(name, updates left out on the way there) of the checkpoints, by step."""
    store = Store(run / "checkpoints")
    records = {name: store.manifest(name).record for name in store.names()}
    return [(name, records[name]["skipped"]) for name in sorted(records, key=lambda name: records[name]["step"])]


def test_a_bad_step_never_reaches_a_committed_checkpoint(data: TinyData, tmp_path: Path):
    """What is bad is drawn: step, parameter, element, value. What reaches the state reaches all later checkpoints."""
    bad = count("steps with a number that is none", 60, 1000)
    draw = random.Random(seed())
    steps = bad + bad // 3
    faults = {
        at: Fault(at, draw.choice(("gradient", "loss")), draw.choice((NAN, INF, -INF)), *(draw.randrange(10_000),) * 2)
        for at in sorted(draw.sample(range(1, steps + 1), bad))
    }
    seen: dict[str, list[int]] = {"reached": [], "changed": []}
    step, commit = Loop.step, Run.commit

    def stepping(self: Loop, segment: Any) -> None:
        before = held(self.state)
        step(self, segment)
        if (held(self.state) != before) == (self.state.step in faults):
            seen["changed"].append(self.state.step)

    def committing(self: Run, *args: Any, **kwargs: Any) -> None:
        commit(self, *args, **kwargs)
        kept = {name: torch.empty_like(tensor) for name, tensor in self.state.tensors().items()}
        self.store.load(str(self.state.checkpoint), kept)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in kept.values()):
            seen["reached"].append(self.state.step)

    arguments = [*command(data, tmp_path / "run", *SKIP), "--max-skipped-steps", str(bad)]
    arguments += ["--increment-steps", str(steps), "--save-interval", "5", "--log-interval", "100000"]
    with ExitStack() as stack:
        stack.enter_context(injected(faults.values(), active=True))
        stack.enter_context(mock.patch.object(Loop, "step", stepping))
        stack.enter_context(mock.patch.object(Run, "commit", committing))
        stack.enter_context(mock.patch("megalrps.training.stability.os.fsync"))  # nothing is killed here
        run = stack.enter_context(opened(arguments))
        loop.train(run)
        assert (run.state.skipped, int(run.state.optimizer.updates)) == (bad, steps - bad)
    assert seen == {"reached": [], "changed": []}
    assert {event["step"] for event in events(tmp_path / "run")} == set(faults)
    record("F9", **{"bad steps": bad, "bad steps in a committed checkpoint": len(seen["reached"])})


def test_a_spike_is_told_at_its_step_with_the_samples_that_were_drawn(data: TinyData, tmp_path: Path):
    arguments = command(data, tmp_path / "run", *WINDOW)
    batches: dict[int, Any] = {}
    batch = Loop.batch

    def keeping(self: Loop, window: Any, step: int) -> Any:
        batches[step] = batch(self, window, step).tokens
        return batch(self, window, step)

    with mock.patch.object(Loop, "batch", keeping):
        seen = watched(arguments, ALONE, [Fault(9, "loss", 10.0)])
    (event,) = events(tmp_path / "run")
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert (event["event"], event["action"], event["path"], event["step"]) == ("loss_spike", "log", "v1", 9)
    assert event["loss"] == losses[8] > 5 * losses[7] and seen.status == 0 and seen.updates == STEPS
    mean = sum(losses[3:8]) / 5
    assert event["mean"] == pytest.approx(mean, rel=1e-12)
    assert event["std"] == pytest.approx(math.sqrt(sum((loss - mean) ** 2 for loss in losses[3:8]) / 4), rel=1e-9)
    (line,) = [line for line in seen.said if "a spike" in line]
    assert line.startswith("path v1, step 9: loss ")
    with opened([*arguments, "--save", str(tmp_path / "asked")]) as run:
        tokens = run.job.increments[0].dataset.tokens
        drew = [tokens[at * SEQUENCE_LENGTH :][: SEQUENCE_LENGTH + 1].tolist() for at in event["samples"]["a"]]
    assert drew == batches[9].tolist()
    record("F9", **{"spike of x10": {"told at step": event["step"], "put in at step": 9}})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_spike_stops_every_rank_before_the_update_is_saved(launched: dict[str, Told], layout: str):
    run, told = launched[layout]["spike"]
    assert {(each.status, tuple(each.steps)) for each in told} == {(EXIT_DIVERGED, tuple(range(1, 10)))}
    assert {each.error for each in told} == {told[0].error}
    assert "path v1, step 9: loss " in told[0].error and "a spike: the 5 losses before it" in told[0].error
    assert committed(run)[-1][0] == "v1-00000008"
    assert len(metrics(run)) == 8


def test_a_run_that_goes_on_tells_the_spikes_of_the_undisturbed_one(data: TinyData, tmp_path: Path):
    """Stopped at every fifth step, with one leap right after a start; v1 starts from main's window."""
    leaps = {7: 10.0, 11: 10.0, 12: 0.5}
    straight, cut = (command(data, tmp_path / name, *WINDOW) for name in ("straight", "cut"))
    watched(straight, ALONE, [Fault(at, "loss", value) for at, value in leaps.items()])
    for begun in range(0, STEPS, 5):
        faults = [Fault(at - begun, "loss", value) for at, value in leaps.items() if begun < at <= begun + 5]
        seen = watched([*cut, "--exit-interval", "5"], ALONE, faults)
        assert seen.steps == list(range(begun + 1, min(begun + 5, STEPS) + 1))
    wanted = events(tmp_path / "straight")
    assert [event["step"] for event in wanted] == [7, 11]
    assert events(tmp_path / "cut") == wanted
    store = Store(tmp_path / "cut" / "checkpoints")
    losses = [line["loss"] for line in metrics(tmp_path / "cut")]
    assert store.manifest("main-00000005").record["recent_losses"] == losses[:5]
    assert store.manifest("v1-00000010").record["recent_losses"] == [*losses[4:6], *losses[7:10]]
