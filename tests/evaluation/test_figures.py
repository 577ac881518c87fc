"""The drawings: what stands where, and that they touch nothing global."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import Invented, make_run

from megalrps.evaluation.canvas import DARK, LIGHT, png
from megalrps.evaluation.figures import forks_of, learning_rate_figure, loss_figure, path_inks, tree_figure, tree_rows
from megalrps.evaluation.run_files import Run, read_run
from megalrps.paths.options import PlanOptions


def run_of(directory: Path, paradigm: str = "lrps", invented: Invented | None = None) -> Run:
    make_run(directory / paradigm, paradigm, invented)
    return read_run(directory / paradigm)


@pytest.mark.parametrize(
    ("paradigm", "rows"),
    [
        ("lrps", {"main": 0, "v1": 1, "v2": 2, "v3": 3}),
        ("ptfs", {"v1": 0, "v2": 1, "v3": 2}),
        ("cpt", {"v1": 0, "v2": 0, "v3": 0}),
    ],
)
def test_a_path_has_a_row_unless_it_goes_on_from_a_release(tmp_path: Path, paradigm: str, rows: dict[str, int]) -> None:
    assert tree_rows(run_of(tmp_path, paradigm).plan) == rows


def test_forks_are_where_another_path_leaves_one_that_goes_on(tmp_path: Path) -> None:
    lrps, cpt = run_of(tmp_path, "lrps").plan, run_of(tmp_path, "cpt").plan
    assert forks_of(lrps, lrps.path("main")) == [40, 132, 228]
    assert forks_of(cpt, cpt.path("v1")) == []


@pytest.mark.parametrize("style", ["cosine", "multi-step", "knee"])
@pytest.mark.parametrize("paradigm", ["lrps", "cpt", "ptfs"])
def test_the_drawn_rate_is_the_plans_at_every_drawn_step(tmp_path: Path, paradigm: str, style: str) -> None:
    options = PlanOptions(lr=3e-3, min_lr=3e-4, lr_warmup_iters=10, lr_decay_style=style)
    run = run_of(tmp_path, paradigm, Invented(options=options))
    drawn = {name: np.zeros((0, 2)) for name in path_inks(run.plan, LIGHT).values()}
    for line in learning_rate_figure(run, LIGHT).axes[0].lines:
        if line.get_linestyle() == "-":
            drawn[line.get_color()] = np.vstack([drawn[line.get_color()], line.get_xydata()])
    for path in run.plan.paths:
        points = drawn[path_inks(run.plan, LIGHT)[path.name]]
        for step in range(path.start + 1, path.end + 1):
            assert path.curve(step) in points[points[:, 0] == step, 1]


def test_an_untrained_part_is_drawn_pale(tmp_path: Path) -> None:
    run = run_of(tmp_path, invented=Invented(stop_after=210))
    strong = [line for line in learning_rate_figure(run, LIGHT).axes[0].lines if line.get_linestyle() == "-"]
    ends = {line.get_color(): max(line.get_xdata()) for line in strong if line.get_alpha() == 1.0}
    inks = path_inks(run.plan, LIGHT)
    assert ends == {inks["main"]: 132, inks["v1"]: 100, inks["v2"]: run.reached["v2"]}


def test_the_axis_of_the_loss_is_fitted_to_the_branches_and_the_start_is_told(tmp_path: Path) -> None:
    axes = loss_figure(run_of(tmp_path), LIGHT).axes[0]
    low, high = axes.get_ylim()
    assert 2 < low < 3.2
    assert 4 < high < 6
    assert any("at step 1" in text.get_text() for text in axes.texts)


@pytest.mark.parametrize("invented", [Invented(stop_after=1), Invented(stop_after=45), Invented(noise=float("nan"))])
def test_a_run_just_begun_or_diverged_can_be_drawn(tmp_path: Path, invented: Invented) -> None:
    run = run_of(tmp_path, invented=invented)
    for figure in (tree_figure, learning_rate_figure, loss_figure):
        assert png(figure(run, DARK)).startswith(b"\x89PNG")


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    assert png(tree_figure(run, LIGHT)) == png(tree_figure(run, LIGHT)) != png(tree_figure(run, DARK))


def test_neither_pyplot_nor_torch_is_imported() -> None:
    code = (
        "import sys, megalrps.evaluation.report, megalrps.evaluation.compare\n"
        "sys.exit(bool({'torch', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
