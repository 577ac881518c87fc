"""What a plan costs, in optimizer steps, and what the other paradigms would."""

from collections.abc import Mapping
from dataclasses import replace

from megalrps.paths.options import PlanOptions
from megalrps.paths.paradigms import PARADIGMS, build_plan
from megalrps.paths.plan import Increment, Plan

REFERENCE = "ptfs"
"""The paradigm all others are compared with: training every version from scratch."""


def cost_steps(plan: Plan) -> int:
    """Updates of the whole plan: what is trained twice, on two paths, counts twice."""
    return sum(segment.steps for segment in plan.segments)


def cost_steps_by_version(plan: Plan) -> dict[str, int]:
    """Updates done on the way to each version, after the version before it was released."""
    costs = {path.release: 0 for path in plan.releases if path.release}
    for segment in plan.segments:
        costs[segment.version] += segment.steps
    return costs


def cost_steps_by_paradigm(increments: tuple[Increment, ...], options: PlanOptions) -> dict[str, int]:
    """Updates that each registered paradigm needs for these increments.

    Learning rates cost nothing, so the trees are planned without a warm-up and with a decay that any rates allow: a
    warm-up that fits the main path but not some increment does not keep the others from being compared. Nor does what
    is replayed, which from scratch does not have.
    """
    rateless = replace(options, lr_decay_style="linear", lr_warmup_iters=0, replay=())
    return {name: cost_steps(build_plan(increments, replace(rateless, paradigm=name))) for name in PARADIGMS}


def relative_cost(costs: Mapping[str, int]) -> dict[str, float]:
    """The costs of :func:`cost_steps_by_paradigm` as fractions of training every version from scratch."""
    return {name: steps / costs[REFERENCE] for name, steps in costs.items()}
