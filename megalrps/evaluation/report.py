"""The report of one run: an HTML page that needs nothing but itself, and its drawings as PNG files beside it.

The page is a pure function of the run's files: the same files give the same bytes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from megalrps import __version__
from megalrps.errors import InputError
from megalrps.evaluation.canvas import DARK, LIGHT, Theme, png
from megalrps.evaluation.figures import highest_rate, learning_rate_figure, loss_figure, tree_figure
from megalrps.evaluation.page import Picture, facts_html, page_html, paths_html, picture_html, side_by_side, table_html
from megalrps.evaluation.run_files import Run
from megalrps.evaluation.run_tables import (
    bits_table,
    cost_table,
    facts,
    paradigm_title,
    perplexity_table,
    version_table,
)
from megalrps.evaluation.tables import Table
from megalrps.evaluation.words import count, curve_sentences, joined, rate, short_count
from megalrps.files import replacing, write_text

PAGE_FILE = "report.html"


@dataclass(frozen=True)
class Report:
    """What was written, and the tables and facts a terminal may show too."""

    page: Path
    drawings: tuple[Path, ...]
    tables: tuple[Table, ...]
    facts: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]


def write_report(run: Run, page: Path | str) -> Report:
    """Write the run's page to ``page`` and its drawings beside it, each file atomically.

    Raises InputError where the place cannot be written.
    """
    page = Path(page)
    pictures = {"tree": tree_picture(run), "rates": rate_picture(run), "loss": loss_picture(run)}
    tables = _tables(run)
    warnings = tuple(warnings_of(run))
    html = page_html(
        title=f"{run.name}: {_versions_of(run)} by {paradigm_title(run.plan.paradigm)}",
        lead=_lead(run),
        warnings=warnings,
        sections=_sections(run, pictures, tables),
        footer=f"Made by megalrps {__version__} from {_sources(run)}; plan {run.plan.fingerprint}.",
    )
    drawings = write_page(page, html, tuple(pictures.values()))
    return Report(page, drawings, tables, tuple(facts(run)), warnings)


def write_page(page: Path, html: str, pictures: Sequence[Picture]) -> tuple[Path, ...]:
    """Write a page and, beside it, the light form of its pictures; returns the pictures' paths."""
    drawings = tuple(page.parent / picture.file_name for picture in pictures)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        for drawing, picture in zip(drawings, pictures, strict=True):
            with replacing(drawing) as file:
                file.write(picture.light)
        write_text(page, html)
    except OSError as error:
        raise InputError(f"--output {page}: cannot be written ({error.strerror}); name a place that can") from error
    return drawings


def draw(file_name: str, figure: Callable[[Theme], Figure], title: str, description: str, caption: str) -> Picture:
    """``figure`` in both colour schemes, with its words (see :class:`Picture`)."""
    return Picture(file_name, png(figure(LIGHT)), png(figure(DARK)), title, description, caption)


def tree_picture(run: Run) -> Picture:
    ends = joined([f"{path.release} at step {count(path.end)}" for path in run.plan.releases])
    forks = [
        f"{path.name} leaves {path.parent.path} at step {count(path.start)}"
        for path in run.plan.branches
        if path.parent
    ]
    described = f"Releases: {ends}." + (f" Forks: {joined(forks)}." if forks else "")
    caption = "A line is a path; full circles are releases"
    caption += ", open circles the forks the main path later resumes from." if forks else "."
    if run.trained_steps < run.planned_steps:
        caption += " Thin lines are planned and not trained yet."
    return draw("tree.png", lambda theme: tree_figure(run, theme), "Version tree", described, caption)


def rate_picture(run: Run) -> Picture:
    highest = rate(highest_rate(run.plan))
    described = f"Learning rate against the step, a line for each of {len(run.plan.paths)} paths, at most {highest}."
    caption = "The learning rate of each path; the formulas are below."
    return draw(
        "learning_rate.png", lambda theme: learning_rate_figure(run, theme), "Learning rate", described, caption
    )


def loss_picture(run: Run) -> Picture:
    described = "Training loss against the tokens of the trajectory, a line for each path."
    memory = run.smoothing_steps
    caption = (
        f"Strong: moving average with a memory of {count(memory)} step{'s' if memory > 1 else ''}, carried over each "
        "fork; pale: each batch. The axis is fitted to what follows the first tenth of the steps."
    )
    return draw("loss.png", lambda theme: loss_figure(run, theme), "Loss", described, caption)


def warnings_of(run: Run) -> list[str]:
    """What a reader must know before trusting the page: an unfinished run, a torn log."""
    said = []
    if run.summary is None:
        said.append("The run has no summary.json yet: it has not finished, and held-out figures are missing.")
    elif len(run.releases) < len(run.plan.releases):
        said.append(f"summary.json tells of {len(run.releases)} of the plan's {len(run.plan.releases)} versions.")
    if run.trained_steps < run.planned_steps:
        said.append(f"{count(run.trained_steps)} of the plan's {count(run.planned_steps)} steps are in metrics.jsonl.")
    if run.metrics.torn:
        said.append("The last line of metrics.jsonl was cut short, as a killed run leaves it; it is not shown.")
    if run.metrics.repeated:
        said.append(
            f"{count(run.metrics.repeated)} steps were trained again after a restart; the later record is shown."
        )
    if lost := sum(not record.is_finite for record in run.metrics.records):
        said.append(f"{count(lost)} steps have a loss that is not a finite number; the drawings leave them out.")
    return said


def _tables(run: Run) -> tuple[Table, ...]:
    measured = (perplexity_table(run), bits_table(run)) if run.held_out else ()
    return (*measured, cost_table(run), version_table(run))


def _sections(run: Run, pictures: dict[str, Picture], tables: Sequence[Table]) -> list[tuple[str, list[str]]]:
    *measured, cost, versions = map(table_html, tables)
    return [
        ("", [facts_html(facts(run))]),
        *([("How good the versions are", [side_by_side(measured)])] if measured else []),
        ("Where the versions come from", [picture_html(pictures["tree"]), versions]),
        ("What they cost", [cost]),
        ("Loss", [picture_html(pictures["loss"])]),
        ("Learning rate", [picture_html(pictures["rates"]), _formulas(run), _agreement(run)]),
    ]


def _formulas(run: Run) -> str:
    intro = (
        "lr(t) is the learning rate of update t, counted from step 0 of the trajectory; step t is the state after it."
    )
    return f"<p>{intro}</p>" + paths_html(
        [(_origin(run, path.name), curve_sentences(path.curve, path.start, path.end)) for path in run.plan.paths]
    )


def _origin(run: Run, name: str) -> str:
    path = run.plan.path(name)
    if not path.parent or not path.start:
        return f"{name}, from random initialisation"
    kept = "" if path.carry_optimizer else ", optimizer state reset"
    return f"{name}, from {path.parent.path} at step {count(path.start)}{kept}"


def _agreement(run: Run) -> str:
    difference = run.largest_lr_difference()
    if difference == 0:
        return '<p class="note">The learning rate logged at every step is the plan\'s, exactly.</p>'
    said = f"The logged learning rates differ from the plan's by at most {difference:.1e} of its highest rate."
    return f'<p class="note">{said}</p>'


def _sources(run: Run) -> str:
    return joined(["plan.json", "metrics.jsonl", *(["summary.json"] if run.summary else [])])


def _versions_of(run: Run) -> str:
    number = len(run.plan.releases)
    return "1 version" if number == 1 else f"{number} versions"


def _lead(run: Run) -> str:
    """The run in a sentence or two."""
    trained = short_count(run.trained_steps * run.tokens_per_step)
    first = f"{count(run.trained_steps)} steps on {trained} tokens."
    if not run.releases:
        return first
    last = run.releases[-1]
    newest = run.trained_on[last.name][-1]
    if newest not in last.perplexity:
        return f"{first} Released: {joined([release.name for release in run.releases])}."
    reached = f"{last.perplexity[newest]:,.2f}"
    return f"{first} The newest version, {last.name}, reaches perplexity {reached} on held-out {newest}."
