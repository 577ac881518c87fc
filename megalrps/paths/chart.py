"""The learning rates of a plan as a chart in text, and the samples that any chart of them is drawn from."""

from megalrps.paths.canvas import Canvas, DotGrid, rate_text, step_columns
from megalrps.paths.plan import Path, Plan

_MARGIN = 9
"""Columns left of the chart, for the learning rates on its axis."""


def sampled_rates(path: Path, points: int) -> list[tuple[int, float]]:
    """(step, learning rate) of the path's own steps: about ``points`` of them evenly, and both sides of every jump."""
    length = path.end - path.start
    steps = {path.start + round(length * i / points) for i in range(points + 1)}
    for piece in path.curve.until(path.end).pieces:
        steps.update(step for step in (piece.start, piece.start + 1) if path.start <= step <= path.end)
    return [(step, path.curve(step)) for step in sorted(steps)]


def maximal_rate(path: Path) -> float:
    """The highest learning rate of the path's own steps and of the state it starts from."""
    own = (piece for piece in path.curve.pieces if piece.last is None or piece.last > path.start)
    return max(path.curve(path.start), *(max(piece.start_lr, piece.end_lr) for piece in own))


def draw_curves(plan: Plan, width: int = 100, height: int = 12) -> str:
    """The learning rate of every path over its own steps, in one chart; forks and releases are marked on its axis.

    A path's curve ends above the mark of its release, which names it.
    """
    trained = [path for path in plan.paths if path.end > path.start]
    labels = max(len(path.release or "") for path in trained)
    canvas = Canvas(max(width, 40), height + 4)
    columns = canvas.width - _MARGIN - 1 - labels
    top, horizon = max(map(maximal_rate, trained)), max(path.end for path in trained)
    grid = DotGrid(columns, height)
    for path in trained:
        grid.line([(step / horizon, lr / top) for step, lr in sampled_rates(path, 2 * columns)])
    for row, dots in enumerate(grid.rows()):
        canvas.put(row, _MARGIN, "│" + dots)
    for row, share in ((0, 1.0), (height // 2, 0.5)):
        canvas.put(row, 0, f"{rate_text(top * share):>{_MARGIN - 1}} ┤")
    _draw_axis(canvas, height, plan, columns)
    return str(canvas)


def _draw_axis(canvas: Canvas, row: int, plan: Plan, columns: int) -> None:
    """The axis of steps with its marks, the names of the releases under theirs, and the legend."""
    column = step_columns(plan, _MARGIN + 1, columns)
    canvas.put(row, 0, f"{'0':>{_MARGIN - 1}} └" + "─" * columns)
    for path in plan.branches:
        canvas.put(row, column(path.start), "○")
    canvas.put(row + 1, _MARGIN + 1, "0")
    for path in plan.releases:
        canvas.put(row, column(path.end), "◆")
        for label in (f"{path.release} {path.end:,}", path.release or ""):  # the name alone where there is no room
            canvas.put_if_free(row + 1, min(column(path.end), canvas.width - len(label)), label)
    held = [path for path in plan.paths if path.release is None and path.end > 0]
    legend = [f"{path.name}: the line at {rate_text(path.curve(path.end))}" for path in held]
    legend += ["○ fork"] * bool(plan.branches) + ["◆ release, below the end of its curve"]
    canvas.put(row + 3, _MARGIN + 1, "   ".join(legend))
