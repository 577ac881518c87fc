"""What one layout saves every other loads, to the bit, and goes on from as if nothing had happened."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from layout_job import ADAMW_RATE, Case, batch_of, state_of
from rank_pieces import Found, Pieces, pieces, together

from megalrps.checkpoint.store import Store
from megalrps.parallel.mesh import Mesh
from megalrps.training.state import TrainState
from megalrps.training.step import train_step

BEFORE, AFTER = 3, 5
HOME = Case(tp=2, pp=2, dp=2, sequence_parallel=True, layers=4, bucket=1000, micro_batch=1)
TIED = replace(HOME, schedule="zbv", tied=True, sharding="optim_grads", groups=1)
AWAY = {
    "1x1x1": Case(layers=4),
    "4x1x2": Case(tp=4, dp=2, layers=4, sequence_parallel=True),
    "1x4x1": Case(pp=4, layers=4, micro_batch=2),
    "1x1x8": Case(dp=8, layers=4, bucket=333),
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


def _rank_goes_on(rank: int, case: Case, directory: Path) -> tuple[Pieces, Pieces]:
    """What was loaded, and what became of it; saved as ``away``."""
    state, mesh = state_of(case)
    Store(directory).load("home", state.tensors())
    state.filled()
    loaded = held(state)
    found = updated(state, mesh, range(BEFORE, BEFORE + AFTER))
    Store(directory).save("away", state.tensors(), {})
    return loaded, found


def _rank_comes_back(rank: int, case: Case, directory: Path) -> Pieces:
    state, _ = state_of(case)
    Store(directory).load("away", state.tensors())
    return held(state)


@cache
def uninterrupted(tied: bool, groups: int) -> Found:
    state, mesh = state_of(Case(layers=4, tied=tied, groups=groups))
    updated(state, mesh, range(BEFORE))
    return together([updated(state, mesh, range(BEFORE, BEFORE + AFTER))])


HOMES = {"untied, 1f1b": HOME, "tied, zbv": TIED}


@pytest.mark.parametrize(
    ("away", "kind"), [*((away, "untied, 1f1b") for away in AWAY), ("1x1x1", "tied, zbv"), ("1x4x1", "tied, zbv")]
)
def test_a_checkpoint_of_tp2_pp2_dp2_goes_anywhere_and_comes_back(run_ranks, tmp_path: Path, away: str, kind: str):
    home = HOMES[kind]
    other = replace(AWAY[away], tied=home.tied, groups=home.groups)
    saved = together(run_ranks(home.ranks, _rank_saves, home, tmp_path / "store"))
    by_rank = run_ranks(other.ranks, _rank_goes_on, other, tmp_path / "store")
    loaded, found = together(held for held, _ in by_rank), together(held for _, held in by_rank)
    assert_same_bits(loaded, saved)
    wanted = uninterrupted(home.tied, home.groups)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        tolerance = 1e-6 if name.startswith("loss") else 1e-12  # the loss that is told is fp32
        assert np.abs(found[name] - value).max() <= tolerance * np.abs(value).max(), name
    back = together(run_ranks(home.ranks, _rank_comes_back, home, tmp_path / "store"))
    assert_same_bits(back, {name: value for name, value in found.items() if not name.startswith("loss")})


def assert_same_bits(found: Found, expected: Found) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not np.array_equal(found[name], value)] == []
