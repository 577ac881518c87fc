"""kill -9 of a rank in any phase of any update: the next launch ends in the bits of a run that nothing disturbed.

What is compared are the SHA-256 of the shards of every fork and release, in which weights and moments lie as so many
ranks write them.
"""

import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import counts
import pytest
import torch
from distributed_harness import RankFailedError
from tiny_job import TinyData, command, make_data, metrics, opened, world_of_harness

from megalrps.checkpoint.lineage import read_lineage
from megalrps.checkpoint.manifest import read_manifest
from megalrps.checkpoint.storage import CheckpointWriter
from megalrps.data.stream import SampleStream
from megalrps.model.transformer import Transformer
from megalrps.parallel.buffers import FlatBuffers
from megalrps.training import loop
from megalrps.training.control import Control
from megalrps.training.optimizer import Optimizer
from megalrps.training.watch import Watch

INTERVAL = 3
UPDATES = 15
"""Of two increments of 6 and 5 steps: main to 2, v1 to 6, main to 8, v2 to 11."""
SAVED = (2, 3, 6, 7, 10, 12, 13, 14, 15)
"""The updates among them, counted from 1, after which a checkpoint is made: main 2, v1 3 and 6, main 3, 6 and 8, ..."""
EXECUTED = [
    (path, step)
    for path, first, last in (("main", 1, 2), ("v1", 3, 6), ("main", 3, 8), ("v2", 9, 11))
    for step in range(first, last + 1)
]
"""Path and step of every line of metrics, in order."""
SMALL = ("--num-layers", "1", "--hidden-size", "16", "--ffn-hidden-size", "32", "--save-interval", str(INTERVAL))

PHASES: dict[str, tuple[Any, str]] = {
    "data": (SampleStream, "batch"),
    "forward": (Transformer, "forward"),
    "backward": (torch.Tensor, "backward"),
    "gradient reduction": (FlatBuffers, "finish_gradients"),
    "optimizer": (Optimizer, "update"),
    "agreement": (Control, "agree"),
    "checkpoint": (CheckpointWriter, "finish"),
}
"""What a rank is about to do when it dies; a backward pass, an update and a save are in the middle by then."""


@dataclass(frozen=True)
class Death:
    """``rank`` of ``ranks`` dies in a phase of the ``update``-th update of its launch."""

    ranks: int
    rank: int
    phase: str
    update: int

    def waits(self, stack: ExitStack) -> None:
        """Let this process die so while ``stack`` is open."""
        owner, name = PHASES[self.phase]
        original, entered, update = getattr(owner, name), Watch.enter, 0

        def counting(watch: Watch, phase: str, where: str = "") -> None:
            nonlocal update
            update += phase == "data"
            entered(watch, phase, where)

        def reach(*args: Any, **kwargs: Any) -> Any:
            if update < self.update:
                return original(*args, **kwargs)
            if self.phase == "backward":
                args[0].grad_fn.register_hook(die)
                return original(*args, **kwargs)
            if self.phase == "optimizer":
                original(*args, **kwargs)
            return die()

        stack.enter_context(mock.patch.object(Watch, "enter", counting))
        stack.enter_context(mock.patch.object(owner, name, reach))


def die(*args: Any) -> None:
    """End this process as ``kill -9`` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def deaths() -> list[Death]:
    """Every phase in turn, on one rank and on one of two, at updates drawn from the session's seed."""
    draw, phases = random.Random(counts.seed()), list(PHASES)
    found = []
    for number in range(counts.count("killed training", 7, 26)):
        phase, ranks = phases[number % len(phases)], 1 + (number + number // len(phases)) % 2
        update = draw.choice(SAVED) if phase == "checkpoint" else draw.randint(1, UPDATES)
        found.append(Death(ranks, draw.randrange(ranks), phase, update))
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """Two increments, without held-out parts."""
    made = make_data(tmp_path_factory.mktemp("data"), (6, 5))
    return TinyData(made.increments, ())


def _rank_trains(rank: int, arguments: list[str], death: Death | None) -> int:
    """Train; the updates made."""
    with ExitStack() as stack:
        if death is not None and death.rank == rank:
            death.waits(stack)
        run = stack.enter_context(opened(arguments, world_of_harness()))
        made = 0

        def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal made
            made += 1
            return step(*args, **kwargs)

        step = loop.train_step
        stack.enter_context(mock.patch.object(loop, "train_step", counting))
        loop.train(run)
        return made


def hashes(run: Path) -> dict[str, list[str]]:
    """By fork and release: the digests of its shards."""
    directory = run / "checkpoints"
    lineage = read_lineage(directory)
    assert not lineage.refused
    return {
        name: [shard.sha256 for shard in read_manifest(directory / name).shards]
        for name in lineage.all()
        if lineage.records[name].permanent
    }


def arguments_for(data: TinyData, run: Path) -> list[str]:
    """The command line that trains in ``run``."""
    return command(data, run, *SMALL)


@pytest.fixture(scope="module")
def undisturbed(
    data: TinyData, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int, Callable[..., list[int]]], dict[str, list[str]]]:
    """The digests of a run on so many ranks that nobody killed; trained once each."""
    known: dict[int, dict[str, list[str]]] = {}

    def of(ranks: int, run_ranks: Callable[..., list[int]]) -> dict[str, list[str]]:
        if ranks not in known:
            run = tmp_path_factory.mktemp(f"whole{ranks}") / "run"
            assert run_ranks(ranks, _rank_trains, arguments_for(data, run), None) == [UPDATES] * ranks
            known[ranks] = hashes(run)
            assert len(known[ranks]) == 4
        return known[ranks]

    return of


@pytest.fixture(scope="module")
def lost() -> Iterator[list[int]]:
    """Of each case that came through: the completed updates that its death cost; recorded once all have."""
    updates: list[int] = []
    yield updates
    if len(updates) == len(deaths()):
        counts.record(
            "killed training", cases=len(updates), equal=len(updates), interval=INTERVAL, most_lost=max(updates)
        )


@pytest.mark.parametrize("number", range(len(deaths())))
def test_a_killed_launch_costs_less_than_an_interval_and_no_bit(
    run_ranks: Callable[..., list[int]],
    undisturbed: Callable[..., Any],
    data: TinyData,
    tmp_path: Path,
    lost: list[int],
    number: int,
):
    death, run = deaths()[number], tmp_path / "run"
    whole = undisturbed(death.ranks, run_ranks)
    arguments = arguments_for(data, run)
    with pytest.raises((RankFailedError, RuntimeError, OSError)):
        run_ranks(death.ranks, _rank_trains, arguments, death)
    completed = len(metrics(run)) if (run / "metrics.jsonl").exists() else 0
    made = run_ranks(death.ranks, _rank_trains, arguments, None)
    assert hashes(run) == whole, death
    assert [(line["path"], line["step"]) for line in metrics(run)] == EXECUTED
    again = completed + made[0] - UPDATES
    assert 0 <= again <= INTERVAL - (death.phase != "checkpoint"), f"{again} updates were lost to {death}"
    lost.append(again)
