"""The learning rates of a plan as a figure, painted on matplotlib axes that the caller brings (none is imported)."""

from typing import TYPE_CHECKING

from megalrps.paths.canvas import counted, rate_text
from megalrps.paths.chart import maximal_rate, sampled_rates
from megalrps.paths.paradigms import PARADIGMS
from megalrps.paths.plan import Path, Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POINTS = 600
_CROWDED = 12
"""With more versions than this, only the curves and their marks are drawn, without text in the figure."""
_MAIN_COLOUR = "#222222"
_VERSION_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's colours, told apart by most colour-blind readers; reused in turn from the seventh version on."""


def paint_curves(axes: "Axes", plan: Plan) -> None:
    """One curve for each path over its own steps, the increments behind them, forks and releases marked."""
    named = len(plan.releases) <= _CROWDED
    _paint_increments(axes, plan, named)
    for path in plan.paths:
        if path.release is None and path.end > path.start:
            _paint_curve(axes, path, _MAIN_COLOUR, zorder=3)
    for i, path in enumerate(plan.releases):
        colour = _VERSION_COLOURS[i % len(_VERSION_COLOURS)]
        _paint_curve(axes, path, colour, zorder=2)
        _paint_release(axes, path, colour, named)
    _paint_forks(axes, plan, named)
    _label(axes, plan)


def _paint_increments(axes: "Axes", plan: Plan, named: bool) -> None:
    """A band for the steps that each increment's arrival adds, named at the top."""
    start = 0
    for i, increment in enumerate(plan.increments):
        end = start + increment.steps
        axes.axvspan(start, end, color="#000000", alpha=0.045 if i % 2 == 0 else 0.0, linewidth=0, zorder=0)
        if named:
            middle, top = (start + end) / 2, axes.get_xaxis_transform()
            axes.text(middle, 0.985, increment.name, transform=top, ha="center", va="top", size=9, color="#666666")
        start = end


def _paint_curve(axes: "Axes", path: Path, colour: str, zorder: int) -> None:
    steps, rates = zip(*sampled_rates(path, _POINTS), strict=True)
    axes.plot(steps, rates, color=colour, linewidth=1.8, label=path.name, zorder=zorder)


def _paint_release(axes: "Axes", path: Path, colour: str, named: bool) -> None:
    end = (path.end, path.curve(path.end))
    axes.plot(*end, marker="D", markersize=6, color=colour, zorder=5)
    if named and path.release:
        name = axes.annotate(
            path.release, end, (7, 5), textcoords="offset points", color=colour, weight="bold", zorder=6
        )
        name.set_bbox({"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6})


def _paint_forks(axes: "Axes", plan: Plan, named: bool) -> None:
    forks = [(path.start, path.curve(path.start)) for path in plan.branches]
    if forks:
        steps, rates = zip(*forks, strict=True)
        (rings,) = axes.plot(steps, rates, "o", color=_MAIN_COLOUR, markersize=6.5, label="fork", zorder=4)
        rings.set_markerfacecolor("white")
    for step, rate in forks if named else ():
        axes.annotate(f"{step:,}", (step, rate), (0, 7), textcoords="offset points", ha="center", size=8)


def _label(axes: "Axes", plan: Plan) -> None:
    top = max(maximal_rate(path) for path in plan.paths if path.end > path.start)
    horizon = max(path.end for path in plan.paths)
    axes.set(xlim=(0, horizon * 1.05), ylim=(0, top * 1.18), xlabel="step", ylabel="learning rate")
    axes.set_title(f"{PARADIGMS[plan.paradigm].title}, {counted(len(plan.releases), 'version')}", loc="left", size=11)
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.yaxis.set_major_formatter(lambda lr, _: rate_text(lr))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    columns = 1 + len(plan.paths) // _CROWDED
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), ncols=columns)
