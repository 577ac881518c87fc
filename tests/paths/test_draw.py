"""The drawings: what is where, and that nothing falls off the page."""

import re

import pytest
from matplotlib.figure import Figure

from megalrps.paths.canvas import rate_text
from megalrps.paths.chart import draw_curves, sampled_rates
from megalrps.paths.cost import cost_steps_by_paradigm
from megalrps.paths.draw import cost_table, draw_tree, version_table
from megalrps.paths.figure import paint_curves
from megalrps.paths.options import PlanOptions, planned_increments
from megalrps.paths.paradigms import PARADIGMS, build_plan
from megalrps.paths.plan import Plan


def plan_of(paradigm: str = "lrps", steps: tuple[int, ...] = (10000,) * 4, style: str = "cosine") -> Plan:
    options = PlanOptions(paradigm, increment_steps=steps, lr_decay_style=style)
    return build_plan(planned_increments(options), options)


TREE = [
    "         ╭──────◆ v1  4,000 → 10,000",
    "         │           ╭─────◆ v2  14,000 → 20,000",
    "         │           │          ╭──────◆ v3  24,000 → 30,000",
    "         │           │          │          ╭──────◆ v4  34,000 → 40,000",
    "main ●━━━┷━━━━━━━━━━━┷━━━━━━━━━━┷━━━━━━━━━━┙",
    "     0   4,000       14,000     24,000     34,000",
]


def test_learning_rates_are_written_as_one_writes_them() -> None:
    assert [rate_text(lr) for lr in (0.0, 3e-4, 1.5e-4, 1.0, 9.487e-5)] == ["0", "3e-4", "1.5e-4", "1e0", "9.49e-5"]


def test_tree_of_path_switching() -> None:
    assert draw_tree(plan_of(), width=72).split("\n") == TREE


def test_tree_of_a_chain_is_one_row_and_of_separate_runs_one_row_each() -> None:
    chain = draw_tree(plan_of("cpt")).split("\n")
    assert len(chain) == 2
    assert [chain[0].count(mark) for mark in "●◆"] == [1, 4]
    separate = draw_tree(plan_of("ptfs")).split("\n")
    assert len(separate) == 5
    assert all(row.startswith("●─") and row.count("◆") == 1 for row in separate[:4])


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize("versions", [1, 2, 9, 40])
@pytest.mark.parametrize("width", [60, 100])
def test_drawings_keep_to_the_width_and_name_every_version(paradigm: str, versions: int, width: int) -> None:
    plan = plan_of(paradigm, (37,) * versions)
    for drawing in (draw_tree(plan, width), draw_curves(plan, width)):
        assert max(len(line) for line in drawing.split("\n")) <= width
    assert f"◆ v{versions} " in draw_tree(plan, width)
    assert len(version_table(plan).split("\n")) == versions + 1


def test_version_table_says_fork_end_branch_steps_and_cost() -> None:
    row = version_table(plan_of()).split("\n")[2]
    assert re.split(r"\s{2,}", row) == ["v2", "inc2", "main", "14,000", "20,000", "6,000", "3e-4 → 3e-5", "16,000"]


def test_cost_table_compares_with_training_from_scratch() -> None:
    options = PlanOptions(increment_steps=(10000,) * 4)
    table = cost_table(cost_steps_by_paradigm(planned_increments(options), options), "lrps", 100).split("\n")
    assert [re.findall(r"([\d,]+)\s+([\d.]+) %", row) for row in table[1:]] == [
        [("100,000", "100.0")],
        [("40,000", "40.0")],
        [("58,000", "58.0")],
    ]
    assert [("◀ this plan" in row) for row in table[1:]] == [False, False, True]
    bars = [row.count("█") for row in table[1:]]
    assert bars[1] / bars[0] == pytest.approx(0.4, abs=0.05)
    assert max(map(len, table)) <= 100


@pytest.mark.parametrize("style", ["multi-step", "knee"])
def test_samples_hold_both_sides_of_every_jump(style: str) -> None:
    path = plan_of("cpt", style=style).path("v2")
    samples = dict(sampled_rates(path, 10))
    for piece in path.curve.pieces:
        if piece.start >= path.start:
            assert samples[piece.start] == path.curve(piece.start)
            assert samples[piece.start + 1] == path.curve(piece.start + 1)
    assert (min(samples), max(samples)) == (10000, 20000)


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_figure_holds_one_curve_a_path_and_marks_forks_and_releases(paradigm: str) -> None:
    plan = plan_of(paradigm)
    axes = Figure().subplots()
    paint_curves(axes, plan)
    curves = {str(line.get_label()): line for line in axes.lines}
    assert {path.name for path in plan.paths} <= set(curves)
    diamonds = [line.get_xydata().tolist()[0] for line in axes.lines if line.get_marker() == "D"]
    assert diamonds == [[path.end, path.curve(path.end)] for path in plan.releases]
    if plan.branches:
        assert list(curves["fork"].get_xdata()) == [4000, 14000, 24000, 34000]
