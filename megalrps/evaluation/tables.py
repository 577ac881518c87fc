"""Tables as data: written once, shown as HTML on the page and as text on the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Group
from rich.table import Table as TerminalTable
from rich.text import Text

MISSING = "\N{EN DASH}"
"""Shown where there is no value."""


@dataclass(frozen=True)
class Cell:
    """One cell; ``best`` marks the best of its column (by a sign too: colour alone would not be read by all)."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table whose first column heads its rows; the others hold numbers but for ``text_columns`` (of the header).

    ``note`` is a sentence below it, or empty.
    """

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    text_columns: tuple[str, ...] = ()

    def is_text(self, column: int) -> bool:
        """Whether a column is read from its left side, as words are."""
        return column == 0 or self.header[column] in self.text_columns


def number_column(values: Sequence[float | None], pattern: str = "{:,.2f}") -> list[Cell]:
    """Cells of ``values`` with the lowest marked as best, unless all print alike; None shows as a dash.

    Values that print alike are equally good: the mark must not claim a difference the reader cannot see.
    """
    texts = [MISSING if value is None else pattern.format(value) for value in values]
    known = [value for value in values if value is not None]
    best = pattern.format(min(known)) if len(set(texts) - {MISSING}) > 1 else None
    return [Cell(text, best=text == best) for text in texts]


def table_of_columns(caption: str, header: Sequence[str], columns: Sequence[Sequence[Cell]], note: str = "") -> Table:
    """A table from its columns, all of one length."""
    return Table(caption, tuple(header), tuple(zip(*columns, strict=True)), note)


def terminal_table(table: Table) -> Group:
    """``table`` for a rich console, its caption above and its note below; the best of a column is bold and starred."""
    shown = TerminalTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(table.header):
        justify: Literal["left", "right"] = "left" if table.is_text(index) else "right"
        shown.add_column(Text(name), justify=justify, overflow="fold", no_wrap=not table.is_text(index) or index == 0)
    for row in table.rows:
        shown.add_row(
            *(Text(f"{cell.text} *" if cell.best else cell.text, "bold" if cell.best else "") for cell in row)
        )
    note = [Text(table.note, "dim")] if table.note else []
    return Group(Text(table.caption, "bold"), shown, *note)
