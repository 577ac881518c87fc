#!/usr/bin/env python3
"""The entry: parse, build, run.

torchrun --nproc-per-node 2 pretrain_gpt.py --config examples/quickstart.yaml --increments A B --save RUN
"""

import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout

from megalrps.commandline import run_tool
from megalrps.config import Config, parse_config
from megalrps.errors import InputError, RepeatedError
from megalrps.training.signals import StopRequest, die_with_launcher


def main() -> None:
    """Train what the plan still lacks, evaluate its releases, and write summary and report."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_launcher()
    config = parsed(sys.argv[1:])
    if config.dry_run:
        describe(config)
    else:
        # from before the long imports on: a signal is noted whenever it comes, and heeded by all ranks together
        with StopRequest(config.runtime.exit_duration_in_mins).listening() as stop:
            pretrain(config, stop)


def parsed(arguments: Sequence[str]) -> Config:
    """The options; every rank reads the same command line, so the first one alone says what is wrong with it."""
    if os.environ.get("RANK", "0") == "0":
        return parse_config(arguments)
    with open(os.devnull, "w") as silence, redirect_stdout(silence), redirect_stderr(silence):
        try:
            return parse_config(arguments)
        except (InputError, SystemExit) as error:
            if isinstance(error, SystemExit) and error.code == 0:  # --help
                raise
            raise RepeatedError(str(error)) from error


def describe(config: Config) -> None:
    """What ``--dry-run`` prints."""
    from megalrps.training.describe import describe_job, job_as_json
    from megalrps.training.opening import check_place
    from megalrps.training.prepare import prepare

    world_size = config.world_size
    if world_size is None:
        world_size = int(os.environ.get("WORLD_SIZE", config.parallel.fewest_ranks))
    job = prepare(config, world_size)
    if config.checkpoint.save:
        check_place(job)
    if os.environ.get("RANK", "0") == "0":  # under torchrun too, one answer
        print(json.dumps(job_as_json(job)) if config.json else describe_job(job))


def pretrain(config: Config, stop: StopRequest) -> None:
    """What a launch does; every rank runs it. ``stop``: whether it was asked to end early."""
    from megalrps.evaluation.releases import evaluate_releases, finish_run
    from megalrps.parallel.world import open_world
    from megalrps.training.loop import train
    from megalrps.training.opening import open_run

    runtime = config.runtime
    with (
        open_world(
            os.environ,
            device=runtime.device,
            backend=runtime.distributed_backend,
            timeout_minutes=runtime.distributed_timeout_minutes,
        ) as world,
        open_run(config, world, stop) as run,
    ):
        train(run)
        evaluate_releases(run)
        if world.is_first:
            finish_run(run)


if __name__ == "__main__":
    run_tool(main, "pretrain_gpt.py")
