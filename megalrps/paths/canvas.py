"""What the text drawings of a plan are made on: a grid of characters, a finer grid of dots, and the scale of steps."""

from collections.abc import Callable, Sequence

from megalrps.paths.plan import Plan

_BRAILLE = 0x2800
_BRAILLE_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bit of the dot at [row in the character][column in the character]."""


class Canvas:
    """A grid of characters to be written on; what falls outside is dropped."""

    def __init__(self, width: int, height: int) -> None:
        self.width = width
        self.rows = [[" "] * width for _ in range(height)]

    def put(self, row: int, column: int, text: str) -> None:
        for offset, character in enumerate(text):
            if 0 <= column + offset < self.width:
                self.rows[row][column + offset] = character

    def put_if_free(self, row: int, column: int, text: str, blank: str = " ") -> None:
        """Write ``text`` where it fits whole, with a blank on either side."""
        around = self.rows[row][max(0, column - 1) : column + len(text) + 1]
        if 0 <= column <= self.width - len(text) and all(character in (" ", blank) for character in around):
            self.put(row, column, text)

    def __str__(self) -> str:
        return "\n".join("".join(row).rstrip() for row in self.rows)


class DotGrid:
    """Curves drawn in Braille patterns: 2 x 4 dots a character."""

    def __init__(self, columns: int, rows: int) -> None:
        self.cells = [[0] * columns for _ in range(rows)]
        self.last_x = 2 * columns - 1
        self.last_y = 4 * rows - 1

    def line(self, points: Sequence[tuple[float, float]]) -> None:
        """Join the points (x, y), both in [0, 1], y upwards."""
        dots = [(round(x * self.last_x), round((1.0 - y) * self.last_y)) for x, y in points]
        for (x, y), (next_x, next_y) in zip(dots, dots[1:] or dots, strict=False):
            strokes = max(abs(next_x - x), abs(next_y - y), 1)
            for i in range(strokes + 1):
                self._set(x + round((next_x - x) * i / strokes), y + round((next_y - y) * i / strokes))

    def _set(self, x: int, y: int) -> None:
        self.cells[y // 4][x // 2] |= _BRAILLE_DOTS[y % 4][x % 2]

    def rows(self) -> list[str]:
        """The grid as lines of text; a character without a dot is a blank."""
        return ["".join(chr(_BRAILLE + bits) if bits else " " for bits in row) for row in self.cells]


def step_columns(plan: Plan, left: int, columns: int) -> Callable[[int], int]:
    """From a step of the plan to its column: ``left`` for step 0, ``columns`` - 1 further for the last."""
    last_step = max(path.end for path in plan.paths)
    return lambda step: left + round(step * (columns - 1) / last_step)


def counted(number: int, thing: str) -> str:
    """1 version, 2 versions, 1,000 versions."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def rate_text(lr: float) -> str:
    """A learning rate as one writes it: 3e-4 rather than 0.0003 or 3e-04."""
    mantissa, exponent = f"{lr:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if lr else "0"
