"""From dated text to increments: what ``tools/split_increments.py`` does.

Text is cut into increments by date, and each increment into a training and a held-out part by the hash of the text: a
text is held out wherever and whenever it turns up. Text that is already split (``NAME.train.jsonl`` beside
``NAME.val.jsonl`` or ``NAME.valid.jsonl``) keeps its parts.
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalrps.data.recipe import input_digests, read_results, write_record
from megalrps.data.split_layout import (
    PlacedText,
    SplitLayout,
    are_split_files,
    equal_boundaries,
    layout_by_date,
    layout_of_files,
    parse_day,
)
from megalrps.data.text import BadLines, OnBadLine, expand_inputs
from megalrps.data.text_increments import (
    INDEX_NAME,
    RECORD_NAME,
    TextIncrement,
    TextIncrementsWriter,
    increment_files,
    is_finished,
    read_increments,
)
from megalrps.errors import InputError


@dataclass(frozen=True)
class SplitOptions:
    """Cut dated JSON lines into increments, each with a training and a held-out part.

    A folder that holds NAME.train.jsonl and NAME.val.jsonl (or .valid; also .gz, .zst) needs neither --boundaries nor
    --parts: its increments are taken as they are, in the order of their names.
    """

    input: tuple[str, ...]
    """Files, folders of JSON lines, or quoted globs: plain, .gz or .zst."""

    output: Path
    """Folder for NAME.train.jsonl, NAME.valid.jsonl and increments.json."""

    boundaries: tuple[str, ...] = ()
    """Dates at which a new increment starts, e.g. 2010-01-01 2014-01-01 for three increments."""

    parts: int | None = None
    """Number of increments of about equal bytes, in the order of their dates; instead of --boundaries."""

    date_key: str = "date"
    """Key of the date in each line: YYYY, YYYY-MM, YYYY-MM-DD or a longer ISO time."""

    text_key: str = "text"
    """Key of the text in each line."""

    held_out_modulo: int = 16
    """One text in so many, chosen by its hash, is held out."""

    deduplicate: bool = False
    """Drop a text that an earlier increment, or the same one, holds already."""

    on_bad_line: OnBadLine = "error"
    """What a line without usable text or date does: stop with its place, or be counted and skipped."""

    overwrite: bool = False
    """Replace increments that were made from other inputs or with other options."""

    def check(self) -> None:
        """Raise InputError for values that no split can use."""
        if self.boundaries and self.parts is not None:
            raise InputError("--boundaries and --parts exclude each other: pass one of them")
        if self.parts is not None and self.parts < 1:
            raise InputError(f"--parts {self.parts}: must be at least 1")
        if self.held_out_modulo < 2:
            raise InputError(f"--held-out-modulo {self.held_out_modulo}: must be at least 2, or nothing is trained on")
        days = self.boundary_days()
        if any(earlier >= later for earlier, later in itertools.pairwise(days)):
            raise InputError(f"--boundaries {' '.join(days)}: each date must lie after the one before it")

    def boundary_days(self) -> tuple[str, ...]:
        """``boundaries`` as ``YYYY-MM-DD``; InputError for one that is no date."""
        days = {value: parse_day(value) for value in self.boundaries}
        for value, day in days.items():
            if day is None:
                raise InputError(f"--boundaries {value}: not a date; write YYYY-MM-DD")
        return tuple(str(days[value]) for value in self.boundaries)


@dataclass(frozen=True)
class SplitResult:
    """What a split made, or found made."""

    up_to_date: bool
    increments: tuple[TextIncrement, ...]
    duplicates: int
    """Texts dropped because they were there already."""
    bad_lines_summary: str


def split_increments(options: SplitOptions) -> SplitResult:
    """Make the increments that ``options`` describe, unless they are there already; InputError as for every tool."""
    options.check()
    paths = expand_inputs(options.input)
    recipe = _recipe(options, paths)
    up_to_date = is_finished(options.output, recipe, options.overwrite)
    if not up_to_date:
        _make(options, paths, recipe)
    return SplitResult(up_to_date, read_increments(options.output), **read_results(options.output / RECORD_NAME))


def _recipe(options: SplitOptions, paths: Sequence[Path]) -> dict[str, Any]:
    return {
        "tool": "split_increments",
        "inputs": input_digests(paths),
        "input_names": [path.name for path in paths],  # they may say what is held out
        "boundaries": list(options.boundary_days()),
        "parts": options.parts,
        "date_key": options.date_key,
        "text_key": options.text_key,
        "held_out_modulo": options.held_out_modulo,
        "deduplicate": options.deduplicate,
        "on_bad_line": options.on_bad_line,
    }


def _make(options: SplitOptions, paths: Sequence[Path], recipe: dict[str, Any]) -> None:
    layout = _choose_layout(options, paths)
    _check_inputs_stay(options.output, layout, paths)
    first_places = _FirstPlaces(layout, options.on_bad_line) if options.deduplicate else None
    bad_lines = BadLines(options.on_bad_line)
    duplicates = 0
    source = {"inputs": [str(path) for path in paths]}
    with TextIncrementsWriter(options.output, layout.names, source) as writer:
        for placed in layout.read(bad_lines):
            if first_places is not None and not first_places.take(placed):
                duplicates += 1
                continue
            writer.add(layout.names[placed.increment], placed.text, placed.held_out, placed.date)
        _check_filled(writer, layout.names)
        results = {"duplicates": duplicates, "bad_lines_summary": bad_lines.describe()}
        write_record(options.output / RECORD_NAME, recipe, results, seal=options.output / INDEX_NAME)


def _choose_layout(options: SplitOptions, paths: Sequence[Path]) -> SplitLayout:
    boundaries = options.boundary_days()
    if options.parts is not None:
        boundaries = equal_boundaries(
            paths,
            options.parts,
            text_key=options.text_key,
            date_key=options.date_key,
            on_bad_line=options.on_bad_line,
        )
    elif not boundaries and are_split_files(paths):
        return layout_of_files(paths, options.text_key)
    elif not boundaries:
        raise InputError(
            "--input: its files are not called NAME.train.jsonl and NAME.val.jsonl; pass --boundaries DATE ... or "
            "--parts N to cut them by date"
        )
    return layout_by_date(
        paths,
        boundaries,
        text_key=options.text_key,
        date_key=options.date_key,
        held_out_modulo=options.held_out_modulo,
    )


def _check_inputs_stay(folder: Path, layout: SplitLayout, paths: Sequence[Path]) -> None:
    outputs = {path.resolve() for path in increment_files(folder, layout.names)}
    for path in paths:
        if path.resolve() in outputs:
            raise InputError(f"--output {folder}: would replace the input {path}; choose another folder")


def _check_filled(writer: TextIncrementsWriter, names: Sequence[str]) -> None:
    for name in names:
        if not writer.text_bytes(name, held_out=False):
            raise InputError(f"increment {name} gets no text to train on; move --boundaries, or pass fewer --parts")
        if not writer.text_bytes(name, held_out=True):
            raise InputError(f"increment {name} gets no held-out text; pass a smaller --held-out-modulo, or more text")


class _FirstPlaces:
    """Where each text turns up first, in the order of the increments, whatever the order in which they are read.

    Memory: a digest of 16 bytes for each different text, and what a dictionary adds.
    """

    def __init__(self, layout: SplitLayout, on_bad_line: OnBadLine) -> None:
        self._earliest: dict[bytes, int] = {}
        for placed in layout.read(BadLines(on_bad_line)):
            digest = _text_digest(placed.text)
            self._earliest[digest] = min(placed.increment, self._earliest.get(digest, placed.increment))

    def take(self, placed: PlacedText) -> bool:
        """Whether ``placed`` is the first one of its text; True once for each text."""
        digest = _text_digest(placed.text)
        if self._earliest.get(digest) != placed.increment:
            return False
        del self._earliest[digest]
        return True


def _text_digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
