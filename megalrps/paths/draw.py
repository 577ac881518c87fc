"""A plan as text: the tree of paths, the table of versions and the costs. Every function returns a string."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megalrps.exact import percent
from megalrps.paths.canvas import Canvas, rate_text, step_columns
from megalrps.paths.chart import maximal_rate
from megalrps.paths.cost import cost_steps_by_version, relative_cost
from megalrps.paths.paradigms import PARADIGMS
from megalrps.paths.plan import Fork, Path, Plan

_EIGHTHS = " ▏▎▍▌▋▊▉"


@dataclass(frozen=True)
class _Lane:
    """Paths drawn on one row, each going on from the release of the one before it, and the lanes that leave it."""

    paths: tuple[Path, ...]
    branches: tuple["_Lane", ...]

    def upwards(self) -> Iterator["_Lane"]:
        """The rows from the top: what leaves this lane, the earliest first, then the lane itself."""
        for branch in self.branches:
            yield from branch.upwards()
        yield self

    @property
    def line(self) -> str:
        """A heavy line for a path that releases nothing."""
        return "─" if self.paths[0].release else "━"


def _lane_from(plan: Plan, first: Path) -> _Lane:
    paths = [first]
    while follower := _follower(plan, paths[-1]):
        paths.append(follower)
    names = {path.name for path in paths}
    leaving = [path for path in plan.paths if path.parent and path.parent.path in names and path.name not in names]
    return _Lane(tuple(paths), tuple(_lane_from(plan, path) for path in sorted(leaving, key=lambda path: path.start)))


def _follower(plan: Plan, path: Path) -> Path | None:
    """The path that goes on from the release of ``path``."""
    return next((p for p in plan.paths if path.release and p.parent == Fork(path.name, path.end)), None)


def draw_tree(plan: Plan, width: int = 100) -> str:
    """The paths from left to right, to scale: ● random initialisation, ┷ fork, ◆ release with its fork and end."""
    lanes = [lane for path in plan.paths if path.parent is None for lane in _lane_from(plan, path).upwards()]
    left = max((len(path.name) + 1 for path in plan.paths if path.release is None), default=0)
    right = max(len(_release_label(path)) for path in plan.releases) + 1
    canvas = Canvas(max(width, left + right + 20), len(lanes) + 1)
    column = step_columns(plan, left, canvas.width - left - right)
    rows = {lane.paths[0].name: row for row, lane in enumerate(lanes)}
    for lane in lanes:
        _draw_line(canvas, rows[lane.paths[0].name], lane, column)
        _draw_risers(canvas, rows, lane, column)
    canvas.put(len(lanes), column(0), "0")
    marked = {path.start for path in plan.branches} or {path.end for path in plan.releases}
    for step in sorted(marked - {0}):
        canvas.put_if_free(len(lanes), column(step), f"{step:,}")
    return str(canvas)


def _release_label(path: Path) -> str:
    return f" {path.release}  {path.start:,} → {path.end:,}"


def _draw_line(canvas: Canvas, row: int, lane: _Lane, column: Callable[[int], int]) -> None:
    """The lane from its start to its end, with its releases."""
    first, last = lane.paths[0], lane.paths[-1]
    canvas.put(row, column(first.start), lane.line * (column(last.end) - column(first.start) + 1))
    canvas.put(row, column(first.start), "╭" if first.parent else "●")
    if first.release is None:
        canvas.put(row, 0, first.name)
    for path in lane.paths:
        if path.release:
            mark = max(column(path.end), column(path.start) + 1)
            canvas.put(row, mark, "◆" + (_release_label(path) if path is last else f" {path.release} "))


def _draw_risers(canvas: Canvas, rows: Mapping[str, int], lane: _Lane, column: Callable[[int], int]) -> None:
    """The forks on the lane and the lines from them up to the branches."""
    row, end = rows[lane.paths[0].name], lane.paths[-1].end
    for branch in lane.branches:
        name, fork = branch.paths[0].name, branch.paths[0].start
        for between in range(rows[name] + 1, row):
            crossed = canvas.rows[between][column(fork)]
            canvas.put(between, column(fork), "├" if crossed in "╭├" else "│")
        if fork > 0:
            canvas.put(row, column(fork), _fork_mark(lane.line, fork == end))


def _fork_mark(line: str, at_end: bool) -> str:
    marks = {"━": "┷┙", "─": "┴┘"}[line]
    return marks[at_end]


def version_table(plan: Plan) -> str:
    """One line a version: its new data, where its path comes from, its steps and what it cost."""
    costs = cost_steps_by_version(plan)
    steps_header = ("fork", "end", "branch steps") if plan.branches else ("start", "end", "steps")
    rows: list[tuple[str, ...]] = [("version", "new data", "from", *steps_header, "learning rate", "cost in steps")]
    for path, increment in zip(plan.releases, plan.increments, strict=True):
        rates = f"{rate_text(maximal_rate(path))} → {rate_text(path.curve(path.end))}"
        parent = path.parent.path if path.parent else "random init"
        steps = (f"{step:,}" for step in (path.start, path.end, path.end - path.start))
        replay = path.windows[-1].replay
        data = f"{increment.name} + {percent(replay.share)} replay" if replay else increment.name
        rows.append((path.release or "", data, parent, *steps, rates, f"{costs[path.release or '']:,}"))
    return _table(rows, left_aligned=3)


def cost_table(costs: Mapping[str, int], paradigm: str, width: int = 100) -> str:
    """The costs of :func:`megalrps.paths.cost.cost_steps_by_paradigm` beside each other; ``paradigm`` is the plan's."""
    rows = [("paradigm", "", "steps", "of PTFS")]
    for name, share in relative_cost(costs).items():
        rows.append((name, PARADIGMS[name].title, f"{costs[name]:,}", f"{100 * share:.1f} %"))
    header, *lines = _table(rows, left_aligned=2).split("\n")
    room = max(8, width - len(header) - len("  ◀ this plan") - 2)
    largest = max(costs.values())
    drawn = [
        f"{line}  {_bar(costs[name] / largest, room)}{'  ◀ this plan' if name == paradigm else ''}"
        for name, line in zip(costs, lines, strict=True)
    ]
    return "\n".join([header, *drawn])


def _bar(share: float, width: int) -> str:
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _table(rows: Sequence[tuple[str, ...]], left_aligned: int) -> str:
    """Columns as wide as they need to be; the first ``left_aligned`` of them are words, the rest are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        words = [cell.ljust(width) for cell, width in zip(row[:left_aligned], widths, strict=False)]
        numbers = [cell.rjust(width) for cell, width in zip(row[left_aligned:], widths[left_aligned:], strict=True)]
        lines.append("  ".join(words + numbers).rstrip())
    return "\n".join(lines)
