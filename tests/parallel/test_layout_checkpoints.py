"""What one layout saves every other loads, to the bit, and goes on from as if nothing had happened."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed_harness import run_ranks
from layout_job import ADAMW_RATE, Case, batch_of, state_of
from rank_pieces import Found, Pieces, pieces, together

from megalrps.checkpoint.store import Store
from megalrps.parallel.mesh import Mesh
from megalrps.parallel.shard_view import ShardView
from megalrps.training.state import TrainState
from megalrps.training.step import train_step

BEFORE, AFTER = 2, 3
HOME = Case(tp=2, pp=2, dp=2, sequence_parallel=True, layers=4, bucket=1000, micro_batch=1)
TIED = replace(HOME, schedule="zbv", tied=True, sharding="optim_grads", groups=1)
AWAY = {
    "1x1x1": Case(layers=4),
    "4x1x2": Case(tp=4, dp=2, layers=4, sequence_parallel=True),
    "1x4x1": Case(pp=4, layers=4, micro_batch=2),
    "1x1x8": Case(dp=8, layers=4, bucket=3333),
}


def updated(state: TrainState, mesh: Mesh, steps: range) -> Pieces:
    """Make the updates; what each of them told, and where they led."""
    losses = [train_step(state, batch_of(step, mesh), learning_rate=ADAMW_RATE, mesh=mesh).loss for step in steps]
    told = (f"loss {step}" for step in steps)
    return [(name, (), (), np.array(loss)) for name, loss in zip(told, losses, strict=True)] + held(state)


def held(state: TrainState) -> Pieces:
    return pieces(state.tensors().items())


def _rank_saves(rank: int, case: Case, directory: Path) -> Pieces:
    state, mesh = state_of(case)
    updated(state, mesh, range(BEFORE))
    store = Store(directory)
    store.prepare()
    store.save("home", state.tensors(), {})
    return held(state)


def _rank_goes_on(rank: int, case: Case, directory: Path, away: str) -> tuple[Pieces, Pieces]:
    """What was loaded, and what became of it; saved as ``away``."""
    state, mesh = state_of(case)
    Store(directory).load("home", state.tensors())
    state.filled()
    loaded = held(state)
    found = updated(state, mesh, range(BEFORE, BEFORE + AFTER))
    Store(directory).save(away, state.tensors(), {})
    return loaded, found


def forget(state: TrainState) -> None:
    for tensor in state.tensors().values():
        for _, part in tensor.chunks() if isinstance(tensor, ShardView) else [((), tensor)]:
            part.fill_(0)


def _rank_comes_back(rank: int, case: Case, directory: Path, aways: list[str]) -> dict[str, Pieces]:
    """What is loaded of the checkpoint of every place."""
    state, _ = state_of(case)
    back = {}
    for away in aways:
        forget(state)  # else what is there of the one before would count as loaded
        Store(directory).load(away, state.tensors())
        back[away] = held(state)
    return back


@cache
def uninterrupted(tied: bool, groups: int) -> Found:
    state, mesh = state_of(Case(layers=4, tied=tied, groups=groups))
    updated(state, mesh, range(BEFORE))
    return together([updated(state, mesh, range(BEFORE, BEFORE + AFTER))])


HOMES = {"untied, 1f1b": HOME, "tied, zbv": TIED}
JOURNEYS = [*((away, "untied, 1f1b") for away in AWAY), ("1x1x1", "tied, zbv"), ("1x4x1", "tied, zbv")]


@dataclass(frozen=True)
class Journey:
    """The state at home, as it was loaded at another layout, after that one's updates, and at home again."""

    saved: Found
    loaded: Found
    found: Found
    back: Found


@pytest.fixture(scope="module")
def journeys(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Journey]:
    """All journeys: one launch at each home to save, one at each place to go, one at each home to come back."""
    places, numbers = tmp_path_factory.mktemp("journeys"), itertools.count()

    def run(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        return run_ranks(places / f"rendezvous{next(numbers)}", ranks, function, *arguments)

    made = {}
    for kind, home in HOMES.items():
        store, aways = places / kind, [away for away, of in JOURNEYS if of == kind]
        saved = together(run(home.ranks, _rank_saves, home, store))
        gone = {}
        for away in aways:
            other = replace(AWAY[away], tied=home.tied, groups=home.groups)
            by_rank = run(other.ranks, _rank_goes_on, other, store, away)
            gone[away] = together(held for held, _ in by_rank), together(held for _, held in by_rank)
        back = run(home.ranks, _rank_comes_back, home, store, aways)
        for away in aways:
            made[away, kind] = Journey(saved, *gone[away], together(of_rank[away] for of_rank in back))
    return made


@pytest.mark.parametrize(("away", "kind"), JOURNEYS)
def test_a_checkpoint_of_tp2_pp2_dp2_goes_anywhere_and_comes_back(
    journeys: dict[tuple[str, str], Journey], away: str, kind: str
):
    home, journey = HOMES[kind], journeys[away, kind]
    assert_same_bits(journey.loaded, journey.saved)
    wanted, found = uninterrupted(home.tied, home.groups), journey.found
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        tolerance = 1e-6 if name.startswith("loss") else 1e-12  # the loss that is told is fp32
        assert np.abs(found[name] - value).max() <= tolerance * np.abs(value).max(), name
    assert_same_bits(journey.back, {name: value for name, value in found.items() if not name.startswith("loss")})


def assert_same_bits(found: Found, expected: Found) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not np.array_equal(found[name], value)] == []
