"""From dated text to increments: what ``tools/split_increments.py`` does.

Text is cut into increments by date, and each increment into a training and a held-out part by the hash of the text: a
text is held out wherever and whenever it turns up. Text that is already split (``NAME.train.jsonl`` beside
``NAME.val.jsonl`` or ``NAME.valid.jsonl``) keeps its parts.
"""

import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalrps.data.dates import parse_day
from megalrps.data.first_places import FirstPlaces
from megalrps.data.input_files import FileState, check_unchanged, input_states
from megalrps.data.progress import ProgressDisplay
from megalrps.data.recipe import input_digests, read_results, recorded_inputs, write_record
from megalrps.data.split_layout import (
    SplitLayout,
    are_split_files,
    equal_boundaries,
    layout_by_date,
    layout_of_files,
)
from megalrps.data.text import BadLines, OnBadLine, OnRead, expand_inputs
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
    """Cut dated text into increments, each with a training and a held-out part.

    A folder that holds NAME.train.jsonl and NAME.val.jsonl (or .valid; also .gz, .zst) needs neither --boundaries nor
    --parts: its increments are taken as they are, in the order of their names.
    """

    input: tuple[str, ...]
    """JSON lines (plain, .gz, .zst), parquet, saved Hugging Face datasets: files, folders, or quoted globs."""

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
    """Drop a text that an earlier increment, or the same one, holds already. Memory: 21 bytes a text."""

    on_bad_line: OnBadLine = "error"
    """What a line without usable text or date does: stop with its place, or be counted and skipped."""

    overwrite: bool = False
    """Replace increments that were made from other inputs or with other options."""

    log_interval: int = 1_000_000
    """Documents between two lines of progress, where there is no terminal for a live display."""

    def check(self) -> None:
        """Raise InputError for values that no split can use."""
        if self.boundaries and self.parts is not None:
            raise InputError("--boundaries and --parts exclude each other: pass one of them")
        if self.parts is not None and self.parts < 1:
            raise InputError(f"--parts {self.parts}: must be at least 1")
        if self.held_out_modulo < 2:
            raise InputError(f"--held-out-modulo {self.held_out_modulo}: must be at least 2, or nothing is trained on")
        if self.log_interval < 1:
            raise InputError(f"--log-interval {self.log_interval}: must be at least 1")
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
    states = input_states(paths)
    record = options.output / RECORD_NAME
    inputs = recorded_inputs(record, paths, states) if record.exists() else input_digests(paths)
    up_to_date = is_finished(options.output, _recipe(options, paths, inputs), options.overwrite)
    if not up_to_date:
        known = all("sha256" in each for each in inputs)
        _make(options, paths, states, inputs if known else input_digests(paths))
    results = read_results(record)
    increments = read_increments(options.output)
    return SplitResult(up_to_date, increments, results["duplicates"], results["bad_lines_summary"])


def _recipe(options: SplitOptions, paths: Sequence[Path], inputs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "tool": "split_increments",
        "inputs": inputs,
        "input_names": [path.name for path in paths],  # they may say what is held out
        "boundaries": list(options.boundary_days()),
        "parts": options.parts,
        "date_key": options.date_key,
        "text_key": options.text_key,
        "held_out_modulo": options.held_out_modulo,
        "deduplicate": options.deduplicate,
        "on_bad_line": options.on_bad_line,
    }


def _make(
    options: SplitOptions, paths: Sequence[Path], states: Sequence[FileState], inputs: list[dict[str, Any]]
) -> None:
    passes = _Passes(states, options.log_interval)
    layout = _choose_layout(options, paths, passes)
    _check_inputs_stay(options.output, layout, paths)
    first_places = _look_for_duplicates(options, layout, passes) if options.deduplicate else None
    bad_lines = BadLines(options.on_bad_line)
    duplicates = 0
    source = {"inputs": [str(path) for path in paths]}
    with TextIncrementsWriter(options.output, layout.names, source) as writer:
        with passes.start() as on_read:
            for placed in layout.read(bad_lines, on_read):
                if first_places is not None and not first_places.take():
                    duplicates += 1
                    continue
                writer.add(layout.names[placed.increment], placed.text, placed.held_out, placed.date)
        check_unchanged(paths, states)
        _check_filled(writer, layout.names)
        results = {"duplicates": duplicates, "bad_lines_summary": bad_lines.describe(), "input_states": states}
        recipe = _recipe(options, paths, inputs)
        write_record(options.output / RECORD_NAME, recipe, results, seal=options.output / INDEX_NAME)


@dataclass(frozen=True)
class _Passes:
    """Each pass over the input shows how far it is."""

    states: Sequence[FileState]
    log_interval: int

    @contextmanager
    def start(self) -> Iterator[OnRead]:
        with ProgressDisplay(sys.stderr, sum(state[0] for state in self.states), self.log_interval) as display:
            yield lambda documents, read: display.advance(documents, read, read)


def _look_for_duplicates(options: SplitOptions, layout: SplitLayout, passes: _Passes) -> FirstPlaces:
    first_places = FirstPlaces()
    with passes.start() as on_read:
        for placed in layout.read(BadLines(options.on_bad_line), on_read):
            first_places.look(placed.text, placed.increment)
    return first_places


def _choose_layout(options: SplitOptions, paths: Sequence[Path], passes: _Passes) -> SplitLayout:
    boundaries = options.boundary_days()
    if options.parts is not None:
        with passes.start() as on_read:
            boundaries = equal_boundaries(
                paths,
                options.parts,
                text_key=options.text_key,
                date_key=options.date_key,
                on_bad_line=options.on_bad_line,
                on_read=on_read,
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
