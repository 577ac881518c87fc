"""Draw a pipeline schedule before anything runs: who computes what when, how long the ranks idle, what they hold."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from megalrps.commandline import run_tool
from megalrps.errors import InputError
from megalrps.files import write_text
from megalrps.parallel.draw_schedule import draw_svg, draw_text
from megalrps.parallel.schedule import SCHEDULES, PipelineSchedule, Schedule, Timeline, check_stages, make_schedule

PROGRAM = "draw_schedule.py"


@dataclass(frozen=True)
class Arguments:
    """Draw a pipeline schedule. A forward pass through a stage takes one unit of time, a backward pass two (one for
    the stage's input, one for its weights), and communication none."""

    pipeline_model_parallel_size: int
    """Pipeline ranks."""

    micro_batches: int
    """Micro-batches of a step on each data-parallel rank."""

    pipeline_schedule: PipelineSchedule = "1f1b"
    """Order of the work."""

    num_virtual_stages_per_pipeline_rank: int | None = None
    """Stages on each pipeline rank [unset: the fewest that the schedule takes]."""

    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object instead of the chart."""

    svg: Path | None = None
    """Also draw the chart into this SVG file."""

    width: int = 100
    """Columns of the chart, at least 40; a longer one goes on below."""


def summary(schedule: Schedule, timeline: Timeline) -> dict[str, Any]:
    """The object of ``--json``: an action is its kind, stage and micro-batch; lists of ranks are in their order."""
    return {
        "name": schedule.name,
        "stage_ranks": schedule.stage_ranks,
        "orders": [[[a.kind, a.stage, a.micro_batch] for a in order] for order in schedule.orders],
        "length": timeline.length,
        "bubble_fraction": timeline.bubble_fraction,
        "peak_in_flight": timeline.peak_in_flight,
        "peak_deferred": timeline.peak_deferred,
    }


def planned_schedule(arguments: Arguments) -> Schedule:
    """The schedule that the arguments ask for; raises InputError where there is none."""
    ranks = arguments.pipeline_model_parallel_size
    for flag, number in (("--pipeline-model-parallel-size", ranks), ("--micro-batches", arguments.micro_batches)):
        if number < 1:
            raise InputError(f"{flag} {number}: give at least 1")
    held = arguments.num_virtual_stages_per_pipeline_rank
    if held is None:
        held = SCHEDULES[arguments.pipeline_schedule].stages_per_rank
    check_stages(arguments.pipeline_schedule, held)
    return make_schedule(arguments.pipeline_schedule, ranks, ranks * held, arguments.micro_batches)


def save_svg(file: Path, drawing: str) -> None:
    """Write the drawing; InputError where it cannot be written."""
    try:
        write_text(file, drawing)
    except OSError as error:
        raise InputError(f"--svg {file} cannot be written: {error.strerror}") from error


def run(arguments: Arguments) -> None:
    """Plan, draw, print; InputError for arguments that make no schedule."""
    if arguments.width < 40:
        raise InputError(f"--width {arguments.width} is too narrow for the chart: give at least 40")
    schedule = planned_schedule(arguments)
    timeline = schedule.timeline()
    if arguments.svg:
        save_svg(arguments.svg, draw_svg(schedule, timeline))
    if arguments.json:
        print(json.dumps(summary(schedule, timeline)))
    else:
        print(draw_text(schedule, timeline, arguments.width))


if __name__ == "__main__":
    run_tool(lambda: run(tyro.cli(Arguments, prog=PROGRAM)), PROGRAM)
