"""Costs: the paper's 58 %, and the closed forms for any increments."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalrps.paths.cost import cost_steps, cost_steps_by_paradigm, cost_steps_by_version, relative_cost
from megalrps.paths.options import PlanOptions, planned_increments
from megalrps.paths.paradigms import build_plan


def costs_of(options: PlanOptions) -> dict[str, int]:
    return cost_steps_by_paradigm(planned_increments(options), options)


def test_golden_costs_of_four_versions() -> None:
    costs = costs_of(PlanOptions(increment_steps=(10000,) * 4))
    assert costs == {"ptfs": 100000, "cpt": 40000, "lrps": 58000}
    assert relative_cost(costs) == {"ptfs": 1.0, "cpt": 0.4, "lrps": 0.58}


@pytest.mark.parametrize(("alpha", "percent"), [(0.2, 46), (0.4, 52), (0.6, 58), (0.8, 64), (1.0, 70)])
def test_cost_by_alpha(alpha: float, percent: int) -> None:
    costs = costs_of(PlanOptions(increment_steps=(10000,) * 4, alpha=(alpha,)))
    assert relative_cost(costs)["lrps"] == pytest.approx(percent / 100, abs=1e-12)


@pytest.mark.parametrize(
    ("versions", "percent"), list(enumerate([100, 86.7, 70.0, 58.0, 49.3, 42.9, 37.9, 33.9], start=1))
)
def test_cost_by_number_of_versions(versions: int, percent: float) -> None:
    costs = costs_of(PlanOptions(increment_steps=(10000,) * versions))
    assert 100 * relative_cost(costs)["lrps"] == pytest.approx(percent, abs=0.05)


@given(st.lists(st.tuples(st.integers(4, 10**6), st.floats(0.2, 1.0)), min_size=1, max_size=7))
@settings(deadline=None, max_examples=80)
def test_closed_forms_for_unequal_increments(versions: list[tuple[int, float]]) -> None:
    steps = tuple(count for count, _ in versions)
    options = PlanOptions(increment_steps=steps, alpha=tuple(alpha for _, alpha in versions))
    branches = [round(alpha * count) for count, alpha in versions]
    assert costs_of(options) == {
        "ptfs": sum(sum(steps[: i + 1]) for i in range(len(steps))),
        "cpt": sum(steps),
        "lrps": sum(steps) + sum(branches[:-1]),  # the last branch ends the main path: its overlap is not run yet
    }


def test_cost_by_version_says_what_each_update_takes() -> None:
    options = PlanOptions(increment_steps=(1000, 2000, 500))
    increments = planned_increments(options)
    by_version = {
        paradigm: cost_steps_by_version(build_plan(increments, replace(options, paradigm=paradigm)))
        for paradigm in ("ptfs", "cpt", "lrps")
    }
    assert by_version == {
        "ptfs": {"v1": 1000, "v2": 3000, "v3": 3500},
        "cpt": {"v1": 1000, "v2": 2000, "v3": 500},
        "lrps": {"v1": 1000, "v2": 2600, "v3": 1700},
    }
    assert sum(by_version["lrps"].values()) == cost_steps(build_plan(increments, options))


def test_a_warm_up_that_fits_one_paradigm_alone_does_not_hide_the_costs_of_the_others() -> None:
    options = PlanOptions(increment_steps=(10000, 500), lr_warmup_iters=3000, lr_decay_style="knee")
    assert costs_of(options) == {"ptfs": 20500, "cpt": 10500, "lrps": 16500}
