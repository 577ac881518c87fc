"""A pipeline schedule as a drawing, a row a pipeline rank and time from left to right: in text, and as an SVG."""

import math

from megalrps.parallel.schedule import SCHEDULES, ActionKind, Event, Schedule, Timeline

_MEANINGS: dict[ActionKind, str] = {
    "F": "forward",
    "B": "backward",
    "I": "backward, input",
    "W": "backward, weights",
}
_COLOURS: dict[ActionKind, str] = {"F": "#56b4e9", "B": "#e69f00", "I": "#e69f00", "W": "#009e73"}
"""Okabe and Ito's colours, told apart by most colour-blind readers; I is the first half of what B does."""
_TEXT, _IDLE = "#808080", "#80808030"
"""Greys that show on a white page and on a black one."""
_CHARACTER, _ROW, _LEFT, _TOP = 7.0, 26.0, 58.0, 58.0
"""Points: width of a character in a box, height of a rank's row, margins beside and above the rows."""


def title(schedule: Schedule) -> str:
    """The schedule in a few words."""
    held = _counted(schedule.stages_per_rank, "stage")
    ranks, micro_batches = _counted(schedule.pipeline_ranks, "rank"), _counted(schedule.micro_batches, "micro-batch")
    return f"{SCHEDULES[schedule.name].title}: {ranks}, {held} a rank, {micro_batches}"


def _counted(number: int, thing: str) -> str:
    plural = "es" if thing.endswith("ch") else "s"
    return f"{number:,} {thing}{'' if number == 1 else plural}"


def outcome_lines(timeline: Timeline) -> list[str]:
    """What the timeline comes to: length, idle share, and what every rank holds at its fullest."""
    lines = [
        f"length {timeline.length:g}, idle {100 * timeline.bubble_fraction:.1f} % of the ranks' time",
        f"activations alive at most, by rank: {' '.join(map(str, timeline.peak_in_flight))}",
    ]
    if any(timeline.peak_deferred):
        lines.append(f"weight gradients put off at most, by rank: {' '.join(map(str, timeline.peak_deferred))}")
    return lines


def _letter(chunk: int) -> str:
    """a for a rank's first stage, b for its second, ..., z, ba, bb."""
    letters = ""
    while True:
        chunk, place = divmod(chunk, 26)
        letters = "abcdefghijklmnopqrstuvwxyz"[place] + letters
        if chunk == 0:
            return letters


def _label(schedule: Schedule, event: Event, *, kind: bool) -> str:
    """``F3``, ``F3b`` where a rank holds several stages; without the F where colour shows it."""
    action = event.action
    chunk = _letter(schedule.chunk(action.stage)) if schedule.stages_per_rank > 1 else ""
    return f"{action.kind * kind}{action.micro_batch}{chunk}"


def draw_text(schedule: Schedule, timeline: Timeline, width: int = 100) -> str:
    """The timeline as a chart of characters: a line a pipeline rank, as many blocks of lines as ``width`` asks for.

    A box is the letter of its kind, the number of its micro-batch and, where a rank holds several stages, the letter
    of the stage: ``F3b`` is the forward pass of micro-batch 3 through the rank's second stage. The shortest box is one
    cell wide, a longer one goes on as ``-``; an idle cell is a ``.``.
    """
    cell = 1 + max(len(_label(schedule, event, kind=True)) for event in timeline.events)
    unit = min(event.end - event.start for event in timeline.events)
    head = len(f"rank {schedule.pipeline_ranks - 1} ")
    cells = math.ceil(timeline.length / unit - 1e-9)
    rows = [_text_row(schedule, timeline, rank, cell, cell / unit) for rank in range(schedule.pipeline_ranks)]
    cells_a_line = max(1, (width - head) // cell)
    lines = [title(schedule)]
    for first in range(0, cells, cells_a_line):
        marks = range(first, min(cells, first + cells_a_line), 5)
        lines += ["", f"{'time':<{head}}" + "".join(f"{mark * unit:<{5 * cell}g}" for mark in marks).rstrip()]
        for rank, row in enumerate(rows):
            part = row[first * cell : (first + cells_a_line) * cell]
            lines.append(f"{f'rank {rank}':<{head}}{part.rstrip()}")
    return "\n".join([*lines, "", _text_legend(schedule), *outcome_lines(timeline)])


def _kinds(schedule: Schedule) -> list[ActionKind]:
    present = {action.kind for order in schedule.orders for action in order}
    return [kind for kind in _MEANINGS if kind in present]


def _text_row(schedule: Schedule, timeline: Timeline, rank: int, cell: int, scale: float) -> str:
    """All that a rank does, at ``scale`` columns a unit of time."""

    def idle(columns: int) -> str:
        return ((".".ljust(cell) * columns)[: columns - 1] + " ") if columns > 0 else ""

    row = ""
    for event in timeline.events:
        if event.rank == rank:
            row += idle(round(event.start * scale) - len(row))
            columns = round(event.end * scale) - len(row)
            row += (_label(schedule, event, kind=True).ljust(columns - 1, "-") + " ")[:columns]
    return row + idle(round(timeline.length * scale) - len(row))


def _text_legend(schedule: Schedule) -> str:
    words = [f"{kind} {_MEANINGS[kind]}" for kind in _kinds(schedule)]
    words += [". idle", "number: micro-batch"]
    if schedule.stages_per_rank > 1:
        words.append("a, b, ...: the rank's first stage, second, ...")
    return "   ".join(words)


def draw_svg(schedule: Schedule, timeline: Timeline) -> str:
    """The timeline as one SVG file that needs nothing else and shows on light and dark pages alike.

    A box holds the number of its micro-batch; its colour is its kind, paler for a rank's second stage and the ones
    after it, which a letter tells apart too. What is left of a row's grey ground is idle time.
    """
    labels = [_label(schedule, event, kind=False) for event in timeline.events]
    scale = (max(map(len, labels)) * _CHARACTER + 6) / min(event.end - event.start for event in timeline.events)
    width, height = timeline.length * scale, schedule.pipeline_ranks * _ROW
    lines = outcome_lines(timeline)
    page = (_LEFT + max(width, 480.0) + 16, _TOP + height + 44 + 16 * len(lines))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{page[0]:.0f}" height="{page[1]:.0f}" '
        f'viewBox="0 0 {page[0]:.0f} {page[1]:.0f}" role="img" font-family="sans-serif" font-size="11">',
        f"<title>{title(schedule)}</title>",
        _text(_LEFT, 20, title(schedule), size=14),
        *_svg_legend(schedule),
    ]
    for rank in range(schedule.pipeline_ranks):
        top = _TOP + rank * _ROW
        parts.append(_text(_LEFT - 8, top + 16, f"rank {rank}", anchor="end"))
        parts.append(_box(_LEFT, top, width, _IDLE))
    for event, label in zip(timeline.events, labels, strict=True):
        left, top = _LEFT + event.start * scale, _TOP + event.rank * _ROW
        box_width = (event.end - event.start) * scale
        parts.append(_box(left, top, box_width, _colour(schedule, event.action.kind, event.action.stage), line=True))
        parts.append(_text(left + box_width / 2, top + 16, label, anchor="middle", colour="#000000"))
    parts += _svg_axis(timeline.length, scale, _TOP + height)
    parts += [_text(_LEFT, _TOP + height + 48 + 16 * i, line) for i, line in enumerate(lines)]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _svg_legend(schedule: Schedule) -> list[str]:
    """A box and a word for every kind, and for idle time."""
    entries = [(_COLOURS[kind], _MEANINGS[kind]) for kind in _kinds(schedule)] + [(_IDLE, "idle")]
    if schedule.stages_per_rank > 1:
        shades = (
            _letter(1) if schedule.stages_per_rank == 2 else f"{_letter(1)} to {_letter(schedule.stages_per_rank - 1)}"
        )
        entries.append((_colour(schedule, "F", schedule.pipeline_ranks), f"paler: the rank's stage {shades}"))
    parts, left = [], _LEFT
    for colour, words in entries:
        parts += [_box(left, 30, 14, colour, height=14), _text(left + 19, 41, words)]
        left += 34 + 6.2 * len(words)
    return parts


def _colour(schedule: Schedule, kind: ActionKind, stage: int) -> str:
    """The colour of the kind, mixed with white for the later stages of a rank."""
    chunk = schedule.chunk(stage)
    white = 0.6 * chunk / max(1, schedule.stages_per_rank - 1)
    channels = (int(_COLOURS[kind][i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(channel + (255 - channel) * white):02x}" for channel in channels)


def _svg_axis(length: float, scale: float, top: float) -> list[str]:
    """Time below the rows, with a mark at round numbers at least 40 points apart."""
    step = _round_up(40.0 / scale)
    marks = [i * step for i in range(int(length / step + 1e-9) + 1)]
    parts = [
        f'<path d="M{_LEFT + mark * scale:.1f} {top:.1f}v4" stroke="{_TEXT}"/>'
        + _text(_LEFT + mark * scale, top + 16, f"{mark:g}", anchor="middle")
        for mark in marks
    ]
    return [*parts, _text(_LEFT - 8, top + 16, "time", anchor="end")]


def _round_up(number: float) -> float:
    """The next of ..., 0.1, 0.2, 0.5, 1, 2, 5, 10, ... that is no less."""
    power = 10.0 ** math.floor(math.log10(number))
    return power * next(digit for digit in (1, 2, 5, 10) if digit * power >= number)


def _box(left: float, top: float, width: float, colour: str, *, height: float = _ROW - 3, line: bool = False) -> str:
    outline = ' stroke="#000000" stroke-width="0.5"' if line else ""
    return (
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" '
        f'fill="{colour[:7]}"{_opacity(colour)}{outline}/>'
    )


def _opacity(colour: str) -> str:
    """The alpha of #rrggbbaa on its own: not every program reads it in a colour."""
    return f' fill-opacity="{int(colour[7:], 16) / 255:.2f}"' if len(colour) > 7 else ""


def _text(left: float, base: float, words: str, *, size: int = 11, anchor: str = "start", colour: str = _TEXT) -> str:
    return (
        f'<text x="{left:.1f}" y="{base:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">{words}</text>'
    )
