"""The share of ``python -m megalrps.kernels --check`` that every run of the tests pays for; ``make kernels`` is all."""

import math
import sys
from collections.abc import Sequence
from unittest import mock

from megalrps.kernels import __main__ as command
from megalrps.kernels.ahead_of_time import Job
from megalrps.kernels.compile_case import TARGETS, CompileCase
from megalrps.kernels.table import jobs


def share(whole: Sequence[Job]) -> list[Job]:
    """Every case of the newest target, and at the others the largest case of every kernel.

    What spills or takes too much shared memory does so first where the tiles are largest.
    """
    largest: dict[tuple[int, str], Job] = {}
    for job in whole:
        kernel = id(job.case.kernel), job.target
        if kernel not in largest or tile(job.case) > tile(largest[kernel].case):
            largest[kernel] = job
    chosen = {(job.operation, job.case.name, job.target) for job in largest.values()}
    return [job for job in whole if job.target == TARGETS[-1] or (job.operation, job.case.name, job.target) in chosen]


def tile(case: CompileCase) -> int:
    """The product of a launch's constants and stages, which grows with what a block holds."""
    return math.prod(value for value in case.constants.values() if type(value) is int and value > 0) * case.num_stages


if __name__ == "__main__":
    with mock.patch.object(command, "jobs", lambda targets, having="": share(jobs(targets, having))):
        sys.exit(command.run(command.Arguments(check=TARGETS, json=True)))
