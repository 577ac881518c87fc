"""Print what a plan of version updates would train, release and cost, before anything runs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from megalrps.commandline import run_tool
from megalrps.errors import InputError
from megalrps.paths.canvas import counted, rate_text
from megalrps.paths.chart import draw_curves
from megalrps.paths.cost import cost_steps, cost_steps_by_paradigm, relative_cost
from megalrps.paths.draw import cost_table, draw_tree, version_table
from megalrps.paths.figure import paint_curves
from megalrps.paths.options import PlanOptions, planned_increments, warmup_steps
from megalrps.paths.paradigms import PARADIGMS, build_plan
from megalrps.paths.plan import Increment, Plan

PROGRAM = "plan_versions.py"


@dataclass(frozen=True)
class Arguments:
    """Plan version updates: the tree of paths with forks and releases, the learning rates, the cost beside the other
    paradigms. Trains nothing."""

    plan: tyro.conf.OmitArgPrefixes[PlanOptions]

    increment_names: tuple[str, ...] = ()
    """Names of the increments [unset: inc1, inc2, ...]."""

    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object instead of the text view."""

    plot: Path | None = None
    """Also draw the learning rates into this file (.png, .svg or .pdf)."""

    width: int = 100
    """Columns of the text view, at least 60."""


def summary(plan: Plan, increments: tuple[Increment, ...], options: PlanOptions) -> dict[str, Any]:
    """The object of ``--json``: steps throughout, except ``relative_cost`` (1 = every version from scratch) and, where
    something is replayed, ``replay`` (by version, the exact fraction of its batches)."""
    costs = cost_steps_by_paradigm(increments, options)
    replays = [path.windows[-1].replay for path in plan.releases]
    return {
        "paradigm": plan.paradigm,
        "forks": [path.start for path in plan.branches],
        "ends": [path.end for path in plan.releases],
        "branch_steps": [path.end - path.start for path in plan.branches],
        **({"replay": [replay.fraction if replay else "0" for replay in replays]} if any(replays) else {}),
        "warmup_steps": warmup_steps(increments, options),
        "cost_steps": cost_steps(plan),
        "cost_steps_by_paradigm": costs,
        "relative_cost": relative_cost(costs),
        "fingerprint": plan.fingerprint,
    }


def text_view(plan: Plan, increments: tuple[Increment, ...], options: PlanOptions, width: int) -> str:
    """The tree, the versions, the costs and the learning rates, one below the other."""
    warmup = counted(warmup_steps(increments, options), "step")
    rates = f"{options.lr_decay_style} {rate_text(options.lr)} → {rate_text(options.min_lr)}"
    outcome = f"{counted(len(plan.releases), 'version')} for {counted(cost_steps(plan), 'step')}"
    title = f"{PARADIGMS[plan.paradigm].title}: {outcome}\n{rates}, warm-up {warmup}, plan {plan.fingerprint[:12]}"
    costs = cost_table(cost_steps_by_paradigm(increments, options), plan.paradigm, width)
    return "\n\n".join([title, draw_tree(plan, width), version_table(plan), costs, draw_curves(plan, width)])


def save_plot(plan: Plan, file: Path) -> None:
    """Draw the learning rates into ``file``; InputError where it cannot be written or its format is unknown."""
    from matplotlib.figure import Figure  # here, since it takes longer to import than all the rest

    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    paint_curves(figure.subplots(), plan)
    try:
        figure.savefig(file, dpi=200)
    except (OSError, ValueError) as error:
        raise InputError(f"--plot {file} cannot be written: {error}") from error


def run(arguments: Arguments) -> None:
    """Plan, draw, print; InputError for arguments that cannot be planned."""
    if arguments.width < 60:
        raise InputError(f"--width {arguments.width} is too narrow for the drawings: give at least 60")
    increments = planned_increments(arguments.plan, arguments.increment_names)
    plan = build_plan(increments, arguments.plan)
    if arguments.plot:
        save_plot(plan, arguments.plot)
    if arguments.json:
        print(json.dumps(summary(plan, increments, arguments.plan), indent=2))
    else:
        print(text_view(plan, increments, arguments.plan, arguments.width))


if __name__ == "__main__":
    run_tool(lambda: run(tyro.cli(Arguments, prog=PROGRAM)), PROGRAM)
