"""Runs of several paradigms on the same increments, side by side: one page, two drawings and one ``summary.json``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megalrps import __version__
from megalrps.errors import InputError
from megalrps.evaluation.canvas import Theme, count_axis, figure_of, label_axes, legend, mark, new_axes, write_beside
from megalrps.evaluation.figures import fit_losses
from megalrps.evaluation.page import Picture, facts_html, page_html, picture_html, side_by_side, table_html
from megalrps.evaluation.report import Report, draw, warnings_of, write_page
from megalrps.evaluation.run_files import Run
from megalrps.evaluation.run_tables import cost_by_paradigm
from megalrps.evaluation.summary import SUMMARY_FILE, Release, write_comparison_summary
from megalrps.evaluation.tables import Cell, Table, number_column, table_of_columns
from megalrps.evaluation.words import count, joined, short_count
from megalrps.paths.cost import REFERENCE
from megalrps.training.run_directory import RunDirectory


@dataclass(frozen=True)
class Comparison:
    """Finished runs by paradigm, in the order given: the same increments and tokens a step."""

    runs: dict[str, Run]

    @property
    def first(self) -> Run:
        return next(iter(self.runs.values()))

    @cached_property
    def versions(self) -> tuple[str, ...]:
        """The versions that every run has released, in order."""
        return tuple(
            release.name
            for release in self.first.releases
            if all(release.name in {other.name for other in run.releases} for run in self.runs.values())
        )

    def release(self, paradigm: str, version: str) -> Release:
        return next(release for release in self.runs[paradigm].releases if release.name == version)

    def mean_perplexity(self, paradigm: str, version: str) -> float | None:
        """Over the increments that the version was trained on."""
        return self.release(paradigm, version).mean_perplexity(self.runs[paradigm].trained_on[version])


def compared(runs: Sequence[Run]) -> Comparison:
    """The comparison of ``runs``; InputError where they have not finished or cannot be compared."""
    if len(runs) < 2:
        raise InputError("--compare needs at least two runs")
    first = runs[0]
    for run in runs:
        if run.summary is None:
            raise InputError(f"--compare: run {run.name} has no summary.json yet; let it finish first")
        if run.plan.increments != first.plan.increments:
            raise InputError(
                f"--compare: runs {first.name} and {run.name} have different increments; compare runs on the same"
            )
        if run.tokens_per_step != first.tokens_per_step:
            raise InputError(
                f"--compare: a step of {first.name} is {first.tokens_per_step} tokens, one of {run.name} "
                f"{run.tokens_per_step}; compare runs of one batch size and sequence length"
            )
    paradigms = [run.plan.paradigm for run in runs]
    if len(set(paradigms)) < len(paradigms):
        raise InputError(f"--compare: two runs of one paradigm ({', '.join(paradigms)}); compare one of each")
    return Comparison(dict(zip(paradigms, runs, strict=True)))


def write_comparison(comparison: Comparison, page: Path | str) -> Report:
    """Write the page to ``page``, and beside it its drawings and ``summary.json`` (one entry a paradigm).

    Raises InputError where the place cannot be written, or holds a run whose own files would be overwritten.
    """
    page = Path(page)
    if RunDirectory(page.parent).plan.exists():
        raise InputError(f"--output {page}: {page.parent} is a run's directory; name one for the comparison itself")
    pictures = _pictures(comparison)
    tables = (paradigm_table(comparison), *(increment_table(comparison, version) for version in comparison.versions))
    warnings = tuple(f"{run.name}: {said}" for run in comparison.runs.values() for said in warnings_of(run))
    names = joined([run.name for run in comparison.runs.values()])
    html = page_html(
        title=f"{joined(list(comparison.runs))} compared",
        lead=_lead(comparison),
        warnings=warnings,
        sections=[
            ("", [facts_html(_facts(comparison))]),
            ("Result and cost", [table_html(tables[0]), picture_html(pictures[0])]),
            ("Each version on each increment", [side_by_side(map(table_html, tables[1:]))]),
            ("Loss by cost", [picture_html(pictures[1])]),
        ],
        footer=f"Made by megalrps {__version__} from the files of the runs {names}.",
    )
    drawings = write_page(page, html, pictures)
    summaries = {paradigm: run.summary for paradigm, run in comparison.runs.items() if run.summary}
    write_comparison_summary(page.parent / SUMMARY_FILE, summaries)
    return Report(page, drawings, tables, (), warnings)


def _pictures(comparison: Comparison) -> tuple[Picture, Picture]:
    names = joined(list(comparison.runs))
    perplexity = draw(
        "perplexity_by_cost.png",
        lambda theme: perplexity_by_cost_figure(comparison, theme),
        "Perplexity by cost",
        f"Held-out perplexity of each release against all tokens paid until then, for {names}.",
        "Mean perplexity of each release over the increments it was trained on, against all that was paid until then.",
    )
    loss = draw(
        "loss_by_cost.png",
        lambda theme: loss_by_cost_figure(comparison, theme),
        "Loss by cost",
        f"Training loss against all tokens paid for, a line for each of {names}.",
        "Moving average of the loss over every update in the order it was made; a line breaks where the run switches "
        "paths. Circles: releases. The steep start of a training from scratch runs above the axis.",
    )
    return perplexity, loss


def paradigm_table(comparison: Comparison) -> Table:
    """A row a paradigm: the mean perplexity of every version, and what all of them cost."""
    runs = comparison.runs
    means = [
        number_column([comparison.mean_perplexity(paradigm, version) for paradigm in runs])
        for version in comparison.versions
    ]
    steps = [run.trained_steps for run in runs.values()]
    tokens = [Cell(short_count(run.trained_steps * run.tokens_per_step)) for run in runs.values()]
    parts = [Cell(f"{100 * run.trained_steps / cost_by_paradigm(run)[REFERENCE]:.1f} %") for run in runs.values()]
    header = (
        "paradigm",
        *comparison.versions,
        "steps",
        "tokens",
        f"of {REFERENCE}",
    )
    names = [Cell(paradigm) for paradigm in runs]
    columns = [names, *means, number_column(steps, "{:,.0f}"), tokens, parts]
    note = (
        "Perplexity: arithmetic mean over the held-out parts of the increments that the version was trained on. "
        "Lower is better."
    )
    return table_of_columns("Mean held-out perplexity of each version, and the cost of all", header, columns, note)


def increment_table(comparison: Comparison, version: str) -> Table:
    """A row a paradigm: the perplexity of one version on each increment."""
    measured = dict.fromkeys(name for run in comparison.runs.values() for name in run.held_out)
    releases = [comparison.release(paradigm, version) for paradigm in comparison.runs]
    columns = [number_column([release.perplexity.get(name) for release in releases]) for name in measured]
    names = [Cell(paradigm) for paradigm in comparison.runs]
    return table_of_columns(f"Perplexity of {version}", ("paradigm", *measured), [names, *columns])


def loss_by_cost_figure(comparison: Comparison, theme: Theme) -> Figure:
    """Smoothed training loss against the tokens trained by the run in all."""
    axes = new_axes(theme, 4.6)
    for index, (paradigm, run) in enumerate(comparison.runs.items()):
        _draw_losses(axes, run, paradigm, theme, index)
    fit_losses(axes, comparison.runs.values())
    axes.set_xlim(left=0)
    label_axes(axes, theme, "tokens paid for, over all paths and versions", "training loss (nats per token)")
    count_axis(axes)
    legend(axes, theme)
    return figure_of(axes)


def _draw_losses(axes: Axes, run: Run, label: str, theme: Theme, index: int) -> None:
    ink = theme.version_ink(index)
    losses = {
        (name, step): loss
        for name, trace in run.smoothed_traces.items()
        for step, loss in zip(trace.steps.tolist(), trace.loss.tolist(), strict=True)
    }
    ends = {(path.name, path.end) for path in run.plan.releases}
    for _, stretch in groupby(enumerate(run.metrics.records, start=1), key=lambda paid: paid[1].path):
        points = [(paid * run.tokens_per_step, losses[record.path, record.step], record) for paid, record in stretch]
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], color=ink, linewidth=1.8, label=label)
        label = ""  # one entry in the legend
        x, y, last = points[-1]
        if (last.path, last.step) in ends:
            mark(axes, theme, (x, y), ink)


def perplexity_by_cost_figure(comparison: Comparison, theme: Theme) -> Figure:
    """Mean held-out perplexity of each release against the tokens paid for until it."""
    axes = new_axes(theme, 4.0)
    for index, (paradigm, run) in enumerate(comparison.runs.items()):
        ink = theme.version_ink(index)
        points = [
            (paid * run.tokens_per_step, mean, version)
            for version, paid in paid_until(run).items()
            if version in comparison.versions and (mean := comparison.mean_perplexity(paradigm, version)) is not None
        ]
        axes.plot(
            [x for x, _, _ in points],
            [y for _, y, _ in points],
            "o-",
            color=ink,
            linewidth=1.8,
            markersize=8,
            label=paradigm,
        )
        for x, y, version in points:
            write_beside(axes, theme, version, (x, y), ink, (0, 9))
    axes.margins(x=0.06, y=0.18)
    axes.set_xlim(left=0)
    label_axes(axes, theme, "tokens paid for until the release", "mean held-out perplexity")
    count_axis(axes)
    legend(axes, theme)
    return figure_of(axes)


def paid_until(run: Run) -> dict[str, int]:
    """By version, the updates the run had made when it released it, in order of release."""
    ends: dict[tuple[str, int], str] = {
        (path.name, path.end): path.release for path in run.plan.releases if path.release
    }
    places = ((ends.get((record.path, record.step)), paid) for paid, record in enumerate(run.metrics.records, start=1))
    return {version: paid for version, paid in places if version is not None}


def _lead(comparison: Comparison) -> str:
    if not comparison.versions:
        return "The runs have released no version in common."
    version = comparison.versions[-1]
    results = [
        f"{paradigm} {mean:,.2f}"
        for paradigm in comparison.runs
        if (mean := comparison.mean_perplexity(paradigm, version)) is not None
    ]
    costs = [f"{paradigm} {count(run.trained_steps)}" for paradigm, run in comparison.runs.items()]
    said = f"Mean held-out perplexity of {version}: {', '.join(results)}. " if results else ""
    return f"{said}Steps paid for: {', '.join(costs)}."


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    first = comparison.first
    listed = [(increment.name, f"{count(increment.steps)} steps") for increment in first.plan.increments]
    listed.append(("tokens a step", count(first.tokens_per_step)))
    shared: tuple[tuple[str, Callable[[Run], str | None]], ...] = (
        ("device", lambda run: run.summary.device if run.summary else None),
        (
            "parameters",
            lambda run: short_count(run.summary.parameters) if run.summary and run.summary.parameters else None,
        ),
    )
    for name, of_run in shared:
        values = {of_run(run) for run in comparison.runs.values()}
        if len(values) == 1 and (value := values.pop()):
            listed.append((name, value))
    return listed
