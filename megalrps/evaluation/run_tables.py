"""The tables and facts of one run: every number from its files, or counted from its plan."""

from pathlib import PurePath

from megalrps.evaluation.run_files import Run
from megalrps.evaluation.tables import MISSING, Cell, Table, number_column, table_of_columns
from megalrps.evaluation.words import count, duration, short_count
from megalrps.paths.cost import REFERENCE, cost_steps, cost_steps_by_paradigm, cost_steps_by_version, relative_cost
from megalrps.paths.options import PlanOptions
from megalrps.paths.paradigms import PARADIGMS


def paradigm_title(paradigm: str) -> str:
    """What a reader calls the paradigm; its own name for one this version of the package does not know."""
    return PARADIGMS[paradigm].title if paradigm in PARADIGMS else paradigm


def facts(run: Run) -> list[tuple[str, str]]:
    """Name and value of what the run was and did; only what is known."""
    total, per_step = run.planned_steps, run.tokens_per_step
    steps = count(run.trained_steps) if run.trained_steps == total else f"{count(run.trained_steps)} of {count(total)}"
    listed = [
        ("paradigm", run.plan.paradigm),
        ("steps trained", steps),
        ("tokens trained", short_count(run.trained_steps * per_step)),
        ("tokens a step", count(per_step)),
        ("training loss", f"{run.metrics.records[0].loss:.2f} → {run.metrics.records[-1].loss:.2f}"),
    ]
    summary = run.summary
    if summary:
        listed.insert(1, ("versions released", f"{len(run.releases)} of {len(run.plan.releases)}"))
        listed.append(("wall time", duration(summary.wall_seconds)))
    if summary and summary.device:
        listed.append(("device", summary.device))
    if summary and summary.parameters is not None:
        listed.append(("parameters", short_count(summary.parameters)))
    if run.median_speed is not None:
        listed.append(("tokens/s (median)", short_count(run.median_speed)))
    if run.median_mfu is not None:
        listed.append(("MFU (median)", f"{100 * run.median_mfu:.1f} %"))
    return listed


def version_table(run: Run) -> Table:
    """Each version of the plan: where it comes from, where it ends, what it took and where its weights are."""
    costs, released = cost_steps_by_version(run.plan), {release.name: release for release in run.releases}
    rows = []
    for path in run.plan.releases:
        assert path.release is not None
        origin = f"{path.parent.path} at {count(path.start)}" if path.parent and path.start else "random init"
        release = released.get(path.release)
        rows.append(
            (
                Cell(path.release),
                Cell(origin),
                Cell(count(path.end)),
                Cell(short_count(path.end * run.tokens_per_step)),
                Cell(count(costs[path.release])),
                Cell(PurePath(release.checkpoint).name if release else "not released yet"),
            )
        )
    header = ("version", "starts from", "ends at step", "tokens in its past", "steps paid for it", "checkpoint")
    note = "Steps paid for a version: all updates made between the release before it and its own, on every path."
    return Table("Versions", header, tuple(rows), note, text_columns=("starts from", "checkpoint"))


def perplexity_table(run: Run) -> Table:
    """Version x increment: perplexity on the held-out parts, and the mean over a version's own increments."""
    columns = [[release.perplexity.get(name) for release in run.releases] for name in run.held_out]
    means = [release.mean_perplexity(run.trained_on[release.name]) for release in run.releases]
    header = ("version", *run.held_out, "mean of its own")
    cells = [[Cell(release.name) for release in run.releases], *map(number_column, columns), list(map(_plain, means))]
    note = (
        "On the held-out part of each increment; lower is better. The last column is the arithmetic mean over the "
        "increments that the version was trained on; "
        "versions with different increments are not comparable in it."
    )
    return table_of_columns("Held-out perplexity", header, cells, note)


def bits_table(run: Run) -> Table:
    """Version x increment: bits per byte on the held-out parts."""
    columns = [[release.bits_per_byte.get(name) for release in run.releases] for name in run.held_out]
    cells = [[Cell(release.name) for release in run.releases], *(number_column(column, "{:.4f}") for column in columns)]
    note = "Lower is better; unlike perplexity, comparable between tokenizers."
    return table_of_columns("Held-out bits per byte", ("version", *run.held_out), cells, note)


def _plain(value: float | None) -> Cell:
    return Cell(MISSING if value is None else f"{value:,.2f}")


def cost_table(run: Run) -> Table:
    """What the run's plan costs beside the other paradigms on the same increments: steps, tokens, part of PTFS."""
    costs, alphas = cost_by_paradigm(run), branch_fractions(run)
    parts = relative_cost(costs)
    rows = tuple(
        (
            Cell(f"{name} (this run)" if name == run.plan.paradigm else name),
            Cell(paradigm_title(name)),
            Cell(count(steps)),
            Cell(short_count(steps * run.tokens_per_step)),
            Cell(f"{100 * parts[name]:.1f} %"),
        )
        for name, steps in sorted(costs.items(), key=lambda item: -item[1])
    )
    header = ("paradigm", "what it does", "steps", "tokens", f"of {REFERENCE}")
    return Table(
        f"Cost of all {len(run.plan.releases)} versions",
        header,
        rows,
        _alpha_note(run.alpha or alphas),
        ("what it does",),
    )


def _alpha_note(alphas: tuple[float, ...] | None) -> str:
    if alphas is None:
        return "Path switching is left out: its cost depends on --alpha, which this run's files do not hold."
    values = sorted(set(alphas))
    said = f"{values[0]:.3g}" if len(values) == 1 else ", ".join(f"{alpha:.3g}" for alpha in alphas)
    return f"Counted from the plan's increments; branches of alpha = {said} of their increments."


def cost_by_paradigm(run: Run) -> dict[str, int]:
    """Steps of each paradigm on the run's increments; of the run's own and PTFS alone where alpha is not known."""
    alphas, own = branch_fractions(run), {run.plan.paradigm: cost_steps(run.plan)}
    options = PlanOptions() if alphas is None else PlanOptions(alpha=alphas)
    costs = cost_steps_by_paradigm(run.plan.increments, options)
    return own | ({REFERENCE: costs[REFERENCE]} if alphas is None else costs) | own


def branch_fractions(run: Run) -> tuple[float, ...] | None:
    """alpha of each version, from the plan's branches or the run's own options; None where neither tells."""
    branches = run.plan.branches
    if len(branches) == len(run.plan.increments):
        pairs = zip(branches, run.plan.increments, strict=True)
        return tuple((branch.end - branch.start) / increment.steps for branch, increment in pairs)
    return run.alpha
