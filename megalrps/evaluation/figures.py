"""The three drawings of a run: its version tree, its learning rates and its loss."""

from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from megalrps.evaluation.canvas import Theme, count_axis, figure_of, label_axes, mark, new_axes, write_beside
from megalrps.evaluation.metrics_file import Trace
from megalrps.evaluation.run_files import Run
from megalrps.evaluation.words import rate, short_count
from megalrps.paths.curves import Piece
from megalrps.paths.plan import Path, Plan

_SAMPLES = 400  # points at which a bent piece of a curve is drawn
_RAW_POINTS = 400  # beyond so many steps, the pale line of single batches is drawn paler still, or it hides the rest
_UNTRAINED = 0.35  # opacity of what is planned only


def path_inks(plan: Plan, theme: Theme) -> dict[str, str]:
    """A colour for each path: one of its own if it releases a version, else the main path's."""
    places = {path.name: index for index, path in enumerate(plan.releases)}
    return {
        path.name: theme.version_ink(places[path.name]) if path.name in places else theme.main for path in plan.paths
    }


def tree_figure(run: Run, theme: Theme) -> Figure:
    """The version tree over steps: a line a path, an open circle at each fork, a full one at each release."""
    plan, rows, inks = run.plan, tree_rows(run.plan), path_inks(run.plan, theme)
    height = max(rows.values()) + 1
    axes = new_axes(theme, 1.15 + 0.62 * height)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_yticks([])
    longest = max(path.end for path in plan.paths)
    axes.set_xlim(-0.03 * longest, 1.1 * longest)
    axes.set_ylim(height - 0.35, -0.75)
    _draw_increments(axes, plan, theme)
    for path in plan.paths:
        _draw_line(axes, run, path, rows, inks[path.name])
    for path in plan.paths:
        _draw_ends(axes, run, path, rows[path.name], inks[path.name], theme)
    label_axes(axes, theme, "step (updates since step 0 of the trajectory)", "")
    count_axis(axes)
    return figure_of(axes)


def tree_rows(plan: Plan) -> dict[str, int]:
    """The row of each path: its parent's where it goes on from the parent's release, else one of its own."""
    rows: dict[str, int] = {}
    for path in plan.paths:
        fork = path.parent
        parent = plan.path(fork.path) if fork else None
        goes_on = fork and parent and parent.release and fork.step == parent.end
        rows[path.name] = rows[parent.name] if goes_on and parent else len(set(rows.values()))
    return rows


def forks_of(plan: Plan, path: Path) -> list[int]:
    """The steps at which other paths leave a path that goes on after them."""
    steps = {other.start for other in plan.paths if other.parent and other.parent.path == path.name}
    return sorted(step for step in steps if step > path.start and (step < path.end or not path.release))


def _draw_increments(axes: Axes, plan: Plan, theme: Theme) -> None:
    """A light line at the end of each increment, with the increment's name over its steps."""
    start = 0
    for increment in plan.increments:
        end = start + increment.steps
        axes.axvline(end, color=theme.line, linewidth=1.2, zorder=0)
        axes.text((start + end) / 2, -0.7, increment.name, color=theme.soft, fontsize=10, ha="center", va="top")
        start = end


def _draw_line(axes: Axes, run: Run, path: Path, rows: dict[str, int], ink: str) -> None:
    """The line of one path: thick where it has been trained, thin where it is only planned."""
    row, start, reached = rows[path.name], path.start, run.reached[path.name]
    if path.parent and rows[path.parent.path] != row:
        pale = 1.0 if reached > start else _UNTRAINED
        axes.plot([start, start], [rows[path.parent.path], row], color=ink, linewidth=1.6, alpha=pale, zorder=1)
    axes.plot([start, path.end], [row, row], color=ink, linewidth=1.6, alpha=_UNTRAINED, zorder=1)
    if reached > start:
        axes.plot([start, reached], [row, row], color=ink, linewidth=5.0, solid_capstyle="round", zorder=2)


def _draw_ends(axes: Axes, run: Run, path: Path, row: int, ink: str, theme: Theme) -> None:
    for step in forks_of(run.plan, path):
        mark(axes, theme, (step, row), ink, hollow=True)
        write_beside(axes, theme, short_count(step), (step, row), theme.soft, (0, 8))
    if not path.release:
        write_beside(axes, theme, path.name, (path.start, row), ink, (0, 8))
        return
    mark(axes, theme, (path.end, row), ink, pale=run.reached[path.name] < path.end)
    goes_on = any(
        other.parent and other.parent.path == path.name and other.start == path.end for other in run.plan.paths
    )
    write_beside(
        axes, theme, f"{path.release} · {short_count(path.end)}", (path.end, row), ink, (0, 9) if goes_on else (9, 0)
    )


def learning_rate_figure(run: Run, theme: Theme) -> Figure:
    """The learning rate of every path against the step, as planned: pale where it has not been trained yet."""
    axes = new_axes(theme, 4.0)
    inks = path_inks(run.plan, theme)
    for path in run.plan.paths:
        for piece in path.curve.pieces:
            _draw_piece(axes, piece, path, run.reached[path.name], inks[path.name])
        _mark_rates(axes, run, path, inks[path.name], theme)
    axes.margins(x=0.04)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.13 * highest_rate(run.plan))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: rate(float(f"{value:.6g}"))))
    label_axes(axes, theme, "step", "learning rate")
    count_axis(axes)
    return figure_of(axes)


def highest_rate(plan: Plan) -> float:
    """The highest learning rate of any path."""
    return max(max(piece.start_lr, piece.end_lr) for path in plan.paths for piece in path.curve.pieces)


def _draw_piece(axes: Axes, piece: Piece, path: Path, reached: int, ink: str) -> None:
    """The part of one piece that is the path's own; a jump into it is dotted."""
    first, last = max(piece.start, path.start), path.end if piece.last is None else min(piece.last, path.end)
    if last <= first:
        return
    if first > 0 and path.curve(first) != piece(first):
        axes.plot([first, first], [path.curve(first), piece(first)], ":", color=ink, linewidth=1.2, alpha=0.8)
    for start, end, opacity in ((first, min(last, reached), 1.0), (max(first, reached), last, _UNTRAINED)):
        if end > start:
            steps = sorted({start + round(index * (end - start) / _SAMPLES) for index in range(_SAMPLES + 1)})
            axes.plot(steps, [piece(step) for step in steps], color=ink, linewidth=2.2, alpha=opacity)


def _mark_rates(axes: Axes, run: Run, path: Path, ink: str, theme: Theme) -> None:
    """An open circle where another path forks off, a full one with the version's name at a release."""
    for step in forks_of(run.plan, path):
        mark(axes, theme, (step, path.curve(step)), ink, hollow=True)
    if path.release:
        end = (path.end, path.curve(path.end))
        mark(axes, theme, end, ink, pale=run.reached[path.name] < path.end)
        write_beside(axes, theme, path.release, end, ink, (0, 8))
    else:
        middle = (path.start + path.end) // 2
        write_beside(axes, theme, path.name, (middle, path.curve(middle)), ink, (0, 6))


def loss_figure(run: Run, theme: Theme) -> Figure:
    """The training loss of every path against the tokens of its trajectory: batches pale, the moving average strong."""
    axes = new_axes(theme, 4.6)
    inks = path_inks(run.plan, theme)
    opacity = max(0.05, 0.25 * min(1.0, (_RAW_POINTS / max(run.reached.values())) ** 0.5))
    for path in run.plan.paths:
        if own := run.smoothed_traces.get(path.name):
            raw, ink = run.traces[path.name], inks[path.name]
            axes.plot(raw.tokens, raw.loss, color=ink, linewidth=0.8, alpha=opacity, zorder=1)
            axes.plot(own.tokens, own.loss, color=ink, linewidth=2.0, zorder=3)
            _mark_loss(axes, path, own, ink, theme)
    fit_losses(axes, [run])
    first = run.metrics.records[0]
    if first.loss > axes.get_ylim()[1]:
        said = f"↑ {first.loss:.2f} at step {first.step}"
        axes.annotate(
            said, (0.99, 0.985), xycoords="axes fraction", color=theme.soft, fontsize=11, ha="right", va="top"
        )
    axes.set_xlim(left=0)
    label_axes(axes, theme, "tokens of the trajectory", "training loss (nats per token)")
    count_axis(axes)
    return figure_of(axes)


def _mark_loss(axes: Axes, path: Path, line: Trace, ink: str, theme: Theme) -> None:
    end = (float(line.tokens[-1]), float(line.loss[-1]))
    if path.release and int(line.steps[-1]) == path.end:
        mark(axes, theme, end, ink)
    write_beside(axes, theme, path.release or path.name, end, ink, (0, -9) if path.release else (0, 9))


def fit_losses(axes: Axes, runs: Iterable[Run]) -> None:
    """Fit the axis to the averages after the first tenth of each run's longest trajectory.

    The fall from the random initialisation would leave a hair's breadth to what the drawing is for: the branches.
    """
    later = [
        trace.after(max(run.reached.values()) // 10).loss for run in runs for trace in run.smoothed_traces.values()
    ]
    values = np.concatenate(later)
    values = values[np.isfinite(values)]
    if not len(values):
        return
    low, high = float(values.min()), float(values.max())
    room = 0.12 * (high - low) or 0.1 * abs(low) or 1.0
    axes.set_ylim(low - room, high + room)
