"""Path switching leaves no trace: every path is, bit for bit, what it would be if it had been trained alone."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from tiny_job import ALONE, TinyData, checkpoints, command, differing, make_data, opened, tensors, world_of_harness

from megalrps.parallel.world import World
from megalrps.paths import paradigms
from megalrps.paths.options import PlanOptions
from megalrps.paths.paradigms import MAIN, PARADIGMS, Paradigm
from megalrps.paths.plan import Increment, Leg, Plan
from megalrps.paths.plan import Path as TrainedPath
from megalrps.training import loop
from megalrps.training.run import Run

Planner = Callable[[tuple[Increment, ...], PlanOptions], Plan]


def main_alone(increments: tuple[Increment, ...], options: PlanOptions) -> Plan:
    """The main path of lrps and no branch: trained in one go, and saved where the branches would have left it."""
    plan = PARADIGMS["lrps"].plan(increments, options)
    legs = [Leg(MAIN, branch.start, str(branch.release)) for branch in plan.branches]
    return Plan.of_legs("in-test", increments, [plan.path(MAIN)], legs)


def release_alone(paradigm: str, release: str, increments: tuple[Increment, ...], options: PlanOptions) -> Plan:
    """One version in one segment, from random weights, under its whole concatenated curve over the same windows."""
    plan = PARADIGMS[paradigm].plan(increments, options)
    path = plan.path(release)
    windows = tuple(dict.fromkeys(plan.window_at(release, step) for step in range(1, path.end + 1)))
    alone = TrainedPath(release, None, path.end, path.curve, windows, release)
    return Plan.of_legs("in-test", increments, [alone], [Leg(release, path.end, release)])


def train_by(planner: Planner, arguments: list[str], world: World = ALONE) -> None:
    """Train the plan that ``planner`` makes of the command line's increments and options, without a single load."""
    with (
        mock.patch.object(paradigms, "PARADIGMS", {"in-test": Paradigm("a plan of this test", planner)}),
        mock.patch.object(Run, "load_first", side_effect=AssertionError("the straight run restored a state")),
        opened([*arguments, "--paradigm", "in-test"], world) as run,
    ):
        loop.train(run)


def train(arguments: list[str], world: World = ALONE) -> None:
    with opened(arguments, world) as run:
        loop.train(run)


def _rank_trains(rank: int, jobs: list[tuple[list[str], Planner | None]]) -> None:
    for arguments, planner in jobs:
        train_by(planner, arguments, world_of_harness()) if planner else train(arguments, world_of_harness())


def check_forks(switching: Path, straight: Path, steps: tuple[int, ...] = (4, 13, 22)) -> None:
    for fork in (f"main-{step:08d}" for step in steps):
        found = tensors(switching, fork)
        assert differing(found, tensors(straight, fork)) == [], f"{fork} remembers a branch"
        assert any(name.startswith("optimizer.exp_avg_sq.") for name in found)


def test_branches_leave_no_trace_on_the_main_path(data: TinyData, undisturbed: Path, tmp_path: Path):
    train_by(main_alone, command(data, tmp_path / "straight"))
    check_forks(undisturbed, tmp_path / "straight")


TENSOR = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
PIPELINE = ("--pipeline-model-parallel-size", "2", "--micro-batch-size", "2")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "dp2": (2, ("--bf16",)),
    "tp2": (2, TENSOR),
    "tp2-pp2": (4, (*TENSOR, *PIPELINE)),
    "tp2-pp2-zbv": (4, (*TENSOR, *PIPELINE, "--pipeline-schedule", "zbv", "--num-layers", "4", "--bf16")),
    "pp2-cp2": (4, (*PIPELINE, "--context-parallel-size", "2", "--data-parallel-sharding-strategy", "optim_grads")),
}


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """Two increments of few steps: forks at 2 and 7, releases at 5 and 10. The main path to 7 has left one branch."""
    return make_data(tmp_path_factory.mktemp("short"), (5, 5))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_at_no_layout_do_branches_or_the_way_to_a_release_leave_a_trace(
    run_ranks, short: TinyData, tmp_path: Path, layout: str
):
    ranks, flags = LAYOUTS[layout]
    plans = {"switching": None, "straight": main_alone, "v2": partial(release_alone, "lrps", "v2")}
    jobs = [(command(short, tmp_path / name, *flags), planner) for name, planner in plans.items()]
    run_ranks(ranks, _rank_trains, jobs, timeout=120)
    check_forks(tmp_path / "switching", tmp_path / "straight", (2, 7))
    assert differing(tensors(tmp_path / "switching", "v2-00000010"), tensors(tmp_path / "v2", "v2-00000010")) == []


@pytest.mark.parametrize("paradigm", ["lrps", "cpt"])
@pytest.mark.parametrize("style", ["cosine", "multi-step"])
def test_every_release_is_an_uninterrupted_run_under_its_whole_curve(
    data: TinyData, tmp_path: Path, paradigm: str, style: str
):
    flags = ("--lr-decay-style", style, "--lr-warmup-iters", "2")
    train(command(data, tmp_path / "plan", "--paradigm", paradigm, *flags))
    for version, end in (("v1", 10), ("v2", 18), ("v3", 28)):
        train_by(partial(release_alone, paradigm, version), command(data, tmp_path / version, *flags))
        name = f"{version}-{end:08d}"
        assert checkpoints(tmp_path / version) == (name,)
        assert differing(tensors(tmp_path / "plan", name), tensors(tmp_path / version, name)) == []


def test_from_scratch_each_version_sees_nothing_of_the_last(data: TinyData, tmp_path: Path):
    train(command(data, tmp_path / "plan", "--paradigm", "ptfs"))
    train_by(partial(release_alone, "ptfs", "v2"), command(data, tmp_path / "v2"))
    assert differing(tensors(tmp_path / "plan", "v2-00000018"), tensors(tmp_path / "v2", "v2-00000018")) == []


def test_a_branch_over_the_whole_first_increment_starts_from_random_weights(data: TinyData, tmp_path: Path):
    flags = ("--alpha", "1", "0.5", "0.5", "--lr-warmup-iters", "0")
    train(command(data, tmp_path / "plan", *flags))
    train_by(main_alone, command(data, tmp_path / "straight", *flags))
    train_by(partial(release_alone, "lrps", "v1"), command(data, tmp_path / "v1", *flags))
    assert differing(tensors(tmp_path / "plan", "main-00000023"), tensors(tmp_path / "straight", "main-00000023")) == []
    assert differing(tensors(tmp_path / "plan", "v1-00000010"), tensors(tmp_path / "v1", "v1-00000010")) == []


class Moments:
    """Stands before ``train_step`` and notes, for each path, what its first update finds in the optimizer."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[int, float]] = {}
        self._train_step = loop.train_step

    def __call__(self, state, *args, **kwargs):
        moments = [*state.optimizer.exp_avg, *state.optimizer.exp_avg_sq]
        largest = max(float(moment.abs().max()) for moment in moments)
        self.found.setdefault(state.path, (int(state.optimizer.updates), largest))
        return self._train_step(state, *args, **kwargs)


def test_reset_empties_the_moments_of_branches_and_of_nothing_else(
    data: TinyData, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loop, "train_step", moments := Moments())
    train(command(data, tmp_path / "reset", "--branch-optimizer", "reset"))
    assert moments.found == {"main": (0, 0.0), "v1": (0, 0.0), "v2": (0, 0.0), "v3": (0, 0.0)}
    for fork in ("main-00000004", "main-00000013", "main-00000022"):
        assert differing(tensors(tmp_path / "reset", fork), tensors(undisturbed, fork)) == []
    released = tensors(tmp_path / "reset", "v2-00000018")
    assert released["optimizer.updates"].item() == 18 - 13
    assert not torch.equal(
        released["model.embedding.weight"], tensors(undisturbed, "v2-00000018")["model.embedding.weight"]
    )


def test_carry_keeps_the_moments_of_the_fork(data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loop, "train_step", moments := Moments())
    train(command(data, tmp_path / "carry"))
    assert {path: updates for path, (updates, _) in moments.found.items()} == {"main": 0, "v1": 4, "v2": 13, "v3": 22}
    assert all(largest > 0 for path, (_, largest) in moments.found.items() if path != "main")
