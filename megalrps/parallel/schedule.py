"""Pipeline schedules as data: the order of work of every pipeline rank, and how long it takes on paper.

A schedule is built, compared, drawn and timed before anything runs; the orders are those that the schedule classes of
torch.distributed.pipelining execute.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType, SimpleNamespace
from typing import Any, Literal

from megalrps.errors import InputError
from megalrps.parallel.stages import StagePlacement, stage_ranks

PipelineSchedule = Literal["gpipe", "1f1b", "interleaved", "zbv", "dualpipev"]

ActionKind = Literal["F", "B", "I", "W"]
"""Forward; the whole backward; its part for the stage's input; its part for the weights, which nobody waits for."""

_Product = tuple[ActionKind, int, int]
"""What an action leaves behind, of which stage and which micro-batch: F an activation, B a gradient, W nothing."""


@dataclass(frozen=True)
class ScheduleKind:
    """What tells one schedule from another before any number is known."""

    title: str
    placement: StagePlacement
    stages_per_rank: int
    """Stages on each pipeline rank: exactly, or at least where ``takes_more`` holds."""
    takes_more: bool
    splits_backward: bool
    """Some backward passes run as I and, later, W. That asks autograd for each part alone."""


SCHEDULES: Mapping[PipelineSchedule, ScheduleKind] = MappingProxyType(
    {
        "gpipe": ScheduleKind("GPipe", "loop", 1, False, False),
        "1f1b": ScheduleKind("1F1B", "loop", 1, False, False),
        "interleaved": ScheduleKind("Interleaved 1F1B", "loop", 2, True, False),
        "zbv": ScheduleKind("ZB-V", "v", 2, False, True),
        "dualpipev": ScheduleKind("DualPipeV", "v", 2, False, True),
    }
)
"""GPipe: Huang et al. 2019, arXiv 1811.06965. 1F1B, interleaved: Narayanan et al. 2021, arXiv 2104.04473, section 2.2.
ZB-V: Qi et al. 2023, arXiv 2401.10241, section 6. DualPipeV: half of DeepSeek-V3's DualPipe, arXiv 2412.19437, section
3.2.1, folded into a V."""


@dataclass(frozen=True)
class Action:
    """One piece of work: a pass of one micro-batch through one stage."""

    kind: ActionKind
    stage: int
    micro_batch: int


@dataclass(frozen=True)
class Event:
    """An action on its pipeline rank, from ``start`` to ``end``."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A schedule played through: when every action runs if communication takes no time."""

    events: tuple[Event, ...]
    """Rank by rank, each rank's in its order."""
    pipeline_ranks: int

    @cached_property
    def length(self) -> float:
        """From the first action's start to the last one's end."""
        return max(event.end for event in self.events)

    @cached_property
    def bubble_fraction(self) -> float:
        """The idle share of all ranks' time, from 0 to 1."""
        busy = sum(event.end - event.start for event in self.events)
        return 1.0 - busy / (self.pipeline_ranks * self.length)

    @cached_property
    def peak_in_flight(self) -> tuple[int, ...]:
        """By rank: the most activations alive at once, counted in pairs of a stage and a micro-batch.

        A pair lives from the start of its F to the end of its B or I; what its W still needs is not counted here.
        """
        return tuple(self._peak(rank, births="F", deaths="BI") for rank in range(self.pipeline_ranks))

    @cached_property
    def peak_deferred(self) -> tuple[int, ...]:
        """By rank: the most pairs at once whose W has yet to end though their I has."""
        return tuple(self._peak(rank, births="I", deaths="W") for rank in range(self.pipeline_ranks))

    def _peak(self, rank: int, births: str, deaths: str) -> int:
        """A rank does one thing at a time, so its order alone says what is alive together."""
        alive = peak = 0
        for event in self.events:
            if event.rank == rank:
                alive += (event.action.kind in births) - (event.action.kind in deaths)
                peak = max(peak, alive)
        return peak


@dataclass(frozen=True)
class Schedule:
    """Who does what in which order during one optimizer step."""

    name: PipelineSchedule
    pipeline_ranks: int
    stages: int
    micro_batches: int
    orders: tuple[tuple[Action, ...], ...]
    """By pipeline rank: its actions in the order in which it executes them. Waiting is not an action."""
    stage_ranks: tuple[int, ...]
    """By stage: the pipeline rank that holds it."""

    @property
    def stages_per_rank(self) -> int:
        """Stages on each pipeline rank."""
        return self.stages // self.pipeline_ranks

    def chunk(self, stage: int) -> int:
        """Which of its rank's stages ``stage`` is: 0 for the first of them."""
        return self.stage_ranks[:stage].count(self.stage_ranks[stage])

    def timeline(
        self,
        forward: float = 1.0,
        backward_input: float = 1.0,
        backward_weight: float = 1.0,
        stage_factors: Sequence[float] | None = None,
    ) -> Timeline:
        """Play the schedule: every rank starts its next action as soon as it is free and the action's input is there.

        The three costs are those of one micro-batch in one stage, above 0, in any unit of time; B costs both parts.
        ``stage_factors`` multiplies them for each stage. Communication is free.
        Raises ValueError where the orders wait for each other for ever.
        """
        factors = stage_factors or [1.0] * self.stages
        assert len(factors) == self.stages and min(forward, backward_input, backward_weight, *factors) > 0
        costs = {"F": forward, "B": backward_input + backward_weight, "I": backward_input, "W": backward_weight}
        ends: dict[_Product, float] = {}
        played: list[list[Event]] = [[] for _ in self.orders]
        waiting = list(range(self.pipeline_ranks))
        while waiting:
            before = len(ends)
            for rank in waiting:
                for action in self.orders[rank][len(played[rank]) :]:
                    inputs = self._inputs(action)
                    if not all(product in ends for product in inputs):
                        break
                    free = played[rank][-1].end if played[rank] else 0.0
                    start = max([free, *(ends[product] for product in inputs)])
                    end = start + costs[action.kind] * factors[action.stage]
                    ends[_product(action)] = end
                    played[rank].append(Event(rank, action, start, end))
            waiting = [rank for rank in waiting if len(played[rank]) < len(self.orders[rank])]
            if waiting and len(ends) == before:
                stuck = (self.orders[rank][len(played[rank])] for rank in waiting)
                raise ValueError(f"deadlock: ranks {waiting} wait for ever to run {', '.join(map(str, stuck))}")
        return Timeline(tuple(event for events in played for event in events), self.pipeline_ranks)

    def _inputs(self, action: Action) -> list[_Product]:
        """What has to be there before ``action`` can run."""
        stage, micro_batch = action.stage, action.micro_batch
        if action.kind == "F":
            return [("F", stage - 1, micro_batch)] if stage > 0 else []
        if action.kind == "W":
            return [("B", stage, micro_batch)]
        own: _Product = ("F", stage, micro_batch)
        return [own, ("B", stage + 1, micro_batch)] if stage < self.stages - 1 else [own]


def _product(action: Action) -> _Product:
    """What ``action`` leaves behind: the stage before it waits for the same gradient after a B and after an I."""
    return ("B" if action.kind == "I" else action.kind, action.stage, action.micro_batch)


def check_micro_batches(name: PipelineSchedule, pipeline_ranks: int, micro_batches: int) -> None:
    """Raise InputError where the schedule cannot run ``micro_batches`` micro-batches over the pipeline ranks.

    The bounds are those of the schedule classes of torch.distributed.pipelining.
    """
    if _runs(name, pipeline_ranks, micro_batches):
        return
    below = next((n for n in range(micro_batches - 1, 0, -1) if _runs(name, pipeline_ranks, n)), None)
    above = micro_batches + 1
    while not _runs(name, pipeline_ranks, above):
        above += 1
    enough = f"{below} or {above}" if below else f"at least {above}"
    raise InputError(
        f"--pipeline-schedule {name} cannot run {micro_batches} micro-batches a step over {pipeline_ranks} pipeline "
        f"ranks: make them {enough} by --global-batch-size or --micro-batch-size, or lower "
        "--pipeline-model-parallel-size"
    )


def _runs(name: PipelineSchedule, pipeline_ranks: int, micro_batches: int) -> bool:
    if name == "1f1b":
        return micro_batches >= pipeline_ranks
    if name == "interleaved":  # rounds of about as many micro-batches as there are ranks, all of one length
        return micro_batches >= 1 and micro_batches % max(1, micro_batches // pipeline_ranks) == 0
    if name == "dualpipev":
        return micro_batches >= 2 * pipeline_ranks
    return micro_batches >= 1


def check_stages(name: PipelineSchedule, stages_per_rank: int) -> None:
    """Raise InputError where the schedule does not take that many stages on a pipeline rank."""
    kind = SCHEDULES[name]
    if stages_per_rank == kind.stages_per_rank or (kind.takes_more and stages_per_rank > kind.stages_per_rank):
        return
    bound = "at least" if kind.takes_more else "exactly"
    raise InputError(
        f"--num-virtual-stages-per-pipeline-rank {stages_per_rank}: --pipeline-schedule {name} takes {bound} "
        f"{kind.stages_per_rank}: change one of them"
    )


def make_schedule(name: PipelineSchedule, pipeline_ranks: int, stages: int, micro_batches: int) -> Schedule:
    """The schedule of ``micro_batches`` micro-batches over ``stages`` stages on ``pipeline_ranks`` ranks.

    Raises InputError where the schedule takes no such numbers of stages or micro-batches.
    """
    assert pipeline_ranks >= 1 and stages % pipeline_ranks == 0
    check_stages(name, stages // pipeline_ranks)
    check_micro_batches(name, pipeline_ranks, micro_batches)
    if name == "gpipe":
        orders = tuple(_gpipe_order(rank, micro_batches) for rank in range(pipeline_ranks))
    elif name == "1f1b":
        orders = tuple(_1f1b_order(rank, pipeline_ranks, micro_batches) for rank in range(pipeline_ranks))
    else:
        orders = _torch_orders(name, pipeline_ranks, stages, micro_batches)
    ranks = stage_ranks(SCHEDULES[name].placement, pipeline_ranks, stages)
    return Schedule(name, pipeline_ranks, stages, micro_batches, orders, ranks)


def _gpipe_order(stage: int, micro_batches: int) -> tuple[Action, ...]:
    """All forward passes, then all backward passes."""
    forward = (Action("F", stage, i) for i in range(micro_batches))
    return (*forward, *(Action("B", stage, i) for i in range(micro_batches)))


def _1f1b_order(stage: int, stages: int, micro_batches: int) -> tuple[Action, ...]:
    """Forward passes until the first gradient can be there, then backward and forward in turn.

    Written out here, since what torch's own class reports of itself is not what it executes (2.13: the last rank's
    first forward pass is missing).
    """
    ahead = min(micro_batches, stages - stage)
    order = [Action("F", stage, i) for i in range(ahead)]
    for i in range(micro_batches):
        order.append(Action("B", stage, i))
        if ahead + i < micro_batches:
            order.append(Action("F", stage, ahead + i))
    return tuple(order)


def _torch_orders(
    name: PipelineSchedule, pipeline_ranks: int, stages: int, micro_batches: int
) -> tuple[tuple[Action, ...], ...]:
    """The orders that torch's class of this schedule lays down when it is built, with stand-ins for its stages."""
    from torch.distributed.pipelining import schedules  # here: drawing the other schedules needs no torch

    classes: dict[PipelineSchedule, Any] = {
        "interleaved": schedules.ScheduleInterleaved1F1B,
        "zbv": schedules.ScheduleZBVZeroBubble,
        "dualpipev": schedules.ScheduleDualPipeV,
    }
    held_by_rank_0 = [
        SimpleNamespace(num_stages=stages, group_size=pipeline_ranks, group_rank=0, stage_index=stage, submod=None)
        for stage, rank in enumerate(stage_ranks(SCHEDULES[name].placement, pipeline_ranks, stages))
        if rank == 0
    ]
    orders = classes[name](held_by_rank_0, micro_batches).pipeline_order
    return tuple(tuple(_actions(orders[rank])) for rank in range(pipeline_ranks))


def _actions(order: Iterable[Any]) -> Iterator[Action]:
    """torch's actions as ours: idle slots left out, a pair that it calls overlapped as the two that it runs in turn."""
    for action in order:
        if action is not None and action.sub_actions is not None:
            yield from _actions(action.sub_actions)
        elif action is not None:
            yield Action(action.computation_type.value, action.stage_index, action.microbatch_index)
