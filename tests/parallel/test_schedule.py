"""Pipeline schedules as data: the orders that torch's classes execute, and what they cost in time and memory."""

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from itertools import permutations
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megalrps.errors import InputError
from megalrps.parallel.draw_schedule import draw_svg, draw_text
from megalrps.parallel.schedule import (
    SCHEDULES,
    Action,
    PipelineSchedule,
    Schedule,
    check_micro_batches,
    make_schedule,
)

CASES: list[tuple[PipelineSchedule, int, int, int]] = [
    ("gpipe", 4, 4, 3),
    ("1f1b", 4, 4, 4),
    ("1f1b", 4, 4, 7),
    ("interleaved", 4, 8, 8),
    ("interleaved", 4, 12, 10),
    ("interleaved", 4, 8, 2),
    ("zbv", 4, 8, 8),
    ("zbv", 4, 8, 3),
    ("dualpipev", 4, 8, 8),
    ("dualpipev", 4, 8, 11),
    ("gpipe", 1, 1, 2),
    ("1f1b", 1, 1, 2),
    ("interleaved", 1, 3, 2),
    ("zbv", 1, 2, 3),
    ("dualpipev", 1, 2, 3),
]
"""Schedule, pipeline ranks, stages, micro-batches."""
WIDTH = 3


def executed(rank: int, name: PipelineSchedule, ranks: int, stages: int, micro_batches: int) -> list[Action]:
    """What torch's class of this schedule calls on this rank's stages in one step, in order."""
    from torch.distributed import pipelining

    schedule = make_schedule(name, ranks, stages, micro_batches)
    calls: list[Action] = []
    torch.manual_seed(0)
    held = [
        _recorded(_stage(index, stages), index, calls) for index, on in enumerate(schedule.stage_ranks) if on == rank
    ]
    build: Any = {
        "gpipe": pipelining.ScheduleGPipe,
        "1f1b": pipelining.Schedule1F1B,
        "interleaved": pipelining.ScheduleInterleaved1F1B,
        "zbv": pipelining.ScheduleZBVZeroBubble,
        "dualpipev": pipelining.ScheduleDualPipeV,
    }[name]
    one_stage = SCHEDULES[name].stages_per_rank == 1
    engine = build(held[0] if one_stage else held, micro_batches, loss_fn=_squares, scale_grads=False)
    samples = torch.ones(2 * micro_batches, WIDTH)
    inputs = (samples,) if any(stage.is_first for stage in held) else ()
    engine.step(*inputs, target=samples if any(stage.is_last for stage in held) else None)
    return calls


def _squares(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().sum()


def _stage(index: int, stages: int) -> Any:
    from torch.distributed.pipelining import PipelineStage

    inputs = torch.empty(2, WIDTH, device="meta", requires_grad=index > 0)
    outputs = torch.empty(2, WIDTH, device="meta", requires_grad=True)
    module, device = nn.Linear(WIDTH, WIDTH), torch.device("cpu")
    return PipelineStage(module, index, stages, device, input_args=inputs, output_args=outputs, group=dist.group.WORLD)


def _recorded(stage: Any, index: int, calls: list[Action]) -> Any:
    """``stage``, with every pass that is asked of it noted in ``calls``."""

    def noting(method: Callable[..., Any], kind: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(micro_batch: int, *args: Any, **named: Any) -> Any:
            calls.append(Action(kind(named), index, micro_batch))
            return method(micro_batch, *args, **named)

        return call

    stage.forward_one_chunk = noting(stage.forward_one_chunk, lambda _: "F")
    stage.backward_one_chunk = noting(
        stage.backward_one_chunk, lambda named: "B" if named.get("full_backward", True) else "I"
    )
    stage.backward_weight_one_chunk = noting(stage.backward_weight_one_chunk, lambda _: "W")
    return stage


@pytest.mark.parametrize(("name", "ranks", "stages", "micro_batches"), CASES)
def test_the_orders_are_what_torch_executes(
    run_ranks: Callable[..., list[Any]], name: PipelineSchedule, ranks: int, stages: int, micro_batches: int
) -> None:
    schedule = make_schedule(name, ranks, stages, micro_batches)
    assert run_ranks(ranks, executed, name, ranks, stages, micro_batches) == list(map(list, schedule.orders))


@pytest.mark.parametrize(("name", "ranks", "stages", "micro_batches"), CASES)
def test_every_micro_batch_passes_every_stage_once_each_way_on_the_stage_s_rank(
    name: PipelineSchedule, ranks: int, stages: int, micro_batches: int
) -> None:
    schedule = make_schedule(name, ranks, stages, micro_batches)
    pairs = sorted((stage, i) for stage in range(stages) for i in range(micro_batches))
    actions = [action for order in schedule.orders for action in order]
    for kinds in ("F", "BI", "BW"):
        assert sorted((a.stage, a.micro_batch) for a in actions if a.kind in kinds) == pairs
    for rank, order in enumerate(schedule.orders):
        assert {schedule.stage_ranks[action.stage] for action in order} == {rank}
    assert any(action.kind == "W" for action in actions) == SCHEDULES[name].splits_backward


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 5])
@pytest.mark.parametrize(("forward", "backward"), [(1.0, 2.0), (2.0, 3.0), (1.0, 1.0)])
def test_bubbles_of_schedules_with_whole_backward_passes(
    ranks: int, rounds: int, forward: float, backward: float
) -> None:
    """(P - 1) / (v m + P - 1): Narayanan et al. 2021, arXiv 2104.04473, section 2.2, there as a ratio to busy time."""
    m = ranks * rounds
    cases: list[tuple[PipelineSchedule, int]] = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3)]
    for name, v in cases:
        timeline = make_schedule(name, ranks, v * ranks, m).timeline(forward, backward / 2, backward / 2)
        assert timeline.bubble_fraction == pytest.approx((ranks - 1) / (v * m + ranks - 1), abs=1e-12)
        assert timeline.length == pytest.approx((v * m + ranks - 1) * (forward + backward))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("extra", [0, 1, 9])
def test_zero_bubble_schedules_idle_only_while_the_pipeline_fills(ranks: int, extra: int) -> None:
    """With F = I = W every rank idles P - 1 forward passes, however many micro-batches there are.

    ZB-V: Qi et al. 2023, arXiv 2401.10241, section 6.
    """
    for name in ("zbv", "dualpipev"):
        m = 2 * ranks + extra
        timeline = make_schedule(name, ranks, 2 * ranks, m).timeline()
        assert timeline.length == 6 * m + ranks - 1
        assert timeline.bubble_fraction == pytest.approx((ranks - 1) / (6 * m + ranks - 1), abs=1e-12)


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 1), (2, 2), (4, 4), (4, 9)])
def test_1f1b_holds_as_many_micro_batches_as_stages_follow_and_gpipe_all(ranks: int, micro_batches: int) -> None:
    timeline = make_schedule("1f1b", ranks, ranks, micro_batches).timeline()
    assert timeline.peak_in_flight == tuple(ranks - rank for rank in range(ranks))
    assert timeline.peak_deferred == (0,) * ranks
    assert make_schedule("gpipe", ranks, ranks, micro_batches).timeline().peak_in_flight == (micro_batches,) * ranks


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_zero_bubble_peaks_are_even_over_the_ranks_and_do_not_grow_with_the_micro_batches(ranks: int) -> None:
    """2P pairs of half a rank's layers each are what 1F1B's first rank holds: Qi et al. 2023, section 6."""
    for m in (2 * ranks, 5 * ranks):
        assert make_schedule("zbv", ranks, 2 * ranks, m).timeline().peak_in_flight == (2 * ranks,) * ranks
        assert make_schedule("dualpipev", ranks, 2 * ranks, m).timeline().peak_in_flight == (2 * ranks + 1,) * ranks


def test_a_slow_stage_sets_the_pace() -> None:
    """Stage 1 of 3 is three times as dear: 6 x 9 there without a pause, one F before and one B after."""
    timeline = make_schedule("1f1b", 3, 3, 6).timeline(stage_factors=[1.0, 3.0, 1.0])
    assert timeline.length == 6 * 9 + 1 + 2
    assert [event.start for event in timeline.events if event.action == Action("F", 1, 0)] == [1.0]


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_actions_wait_for_what_they_need_and_ranks_do_one_thing_at_a_time(name: PipelineSchedule) -> None:
    kind = SCHEDULES[name]
    schedule = make_schedule(name, 4, 4 * kind.stages_per_rank, 8)
    timeline = schedule.timeline(1.0, 1.3, 0.6, stage_factors=[1 + 0.1 * i for i in range(schedule.stages)])
    by_action = {event.action: event for event in timeline.events}
    gradients = {(a.stage, a.micro_batch): e.end for a, e in by_action.items() if a.kind in "BI"}
    for action, event in by_action.items():
        stage, i = action.stage, action.micro_batch
        if action.kind == "F" and stage:
            assert event.start >= by_action[Action("F", stage - 1, i)].end
        elif action.kind in "BI":
            assert event.start >= by_action[Action("F", stage, i)].end
            assert event.start >= gradients.get((stage + 1, i), 0.0)
        elif action.kind == "W":
            assert event.start >= by_action[Action("I", stage, i)].end
    for before, after in zip(timeline.events, timeline.events[1:], strict=False):
        assert before.rank != after.rank or before.end <= after.start


def test_orders_that_wait_for_each_other_are_told_from_those_that_do_not() -> None:
    """Of the 24 orders of two micro-batches on the first of two ranks, only those run whose inputs come in time."""
    schedule = make_schedule("1f1b", 2, 2, 2)
    for order in permutations(schedule.orders[0]):
        changed = replace(schedule, orders=(order, schedule.orders[1]))
        place = {(action.kind, action.micro_batch): index for index, action in enumerate(order)}
        # The last rank runs F0 B0 F1 B1: gradient 0 needs F0 alone; F1 of the last rank needs F1 of the first.
        possible = place["F", 0] < place["B", 0] and max(place["F", 0], place["F", 1]) < place["B", 1]
        if possible:
            assert changed.timeline().length > 0
        else:
            with pytest.raises(ValueError, match="deadlock: ranks"):
                changed.timeline()


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zbv", "dualpipev"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_micro_batches_are_refused_exactly_where_torch_refuses_them(name: PipelineSchedule, ranks: int) -> None:
    from types import SimpleNamespace

    from torch.distributed.pipelining import schedules

    build: Any = {
        "1f1b": schedules.Schedule1F1B,
        "interleaved": schedules.ScheduleInterleaved1F1B,
        "zbv": schedules.ScheduleZBVZeroBubble,
        "dualpipev": schedules.ScheduleDualPipeV,
    }[name]
    held = SCHEDULES[name].stages_per_rank
    stand_in = SimpleNamespace(
        num_stages=held * ranks, group_size=ranks, group_rank=0, stage_index=0, submod=None, has_backward=True
    )
    for micro_batches in range(1, 15):
        complaints = []
        for attempt in (
            lambda n: check_micro_batches(name, ranks, n),
            lambda n: build(stand_in if held == 1 else [stand_in] * held, n),
        ):
            try:
                attempt(micro_batches)
            except ValueError as error:
                complaints.append(error)
        assert len(complaints) in (0, 2), (micro_batches, complaints)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("1f1b", 4, 4, 3), "make them at least 4 by --global-batch-size or --micro-batch-size"),
        (("interleaved", 4, 8, 9), "make them 8 or 10 by --global-batch-size or --micro-batch-size"),
        (("dualpipev", 2, 4, 3), "make them at least 4 by --global-batch-size or --micro-batch-size"),
        (("gpipe", 2, 4, 3), "--num-virtual-stages-per-pipeline-rank 2: --pipeline-schedule gpipe takes exactly 1"),
        (("zbv", 2, 6, 8), "--num-virtual-stages-per-pipeline-rank 3: --pipeline-schedule zbv takes exactly 2"),
        (("interleaved", 2, 2, 8), "--pipeline-schedule interleaved takes at least 2"),
    ],
)
def test_schedules_that_cannot_be_are_refused_with_the_mend(arguments: Any, complaint: str) -> None:
    with pytest.raises(InputError) as refusal:
        make_schedule(*arguments)
    assert complaint in str(refusal.value)
    assert "--pipeline-schedule" in str(refusal.value)


def drawn_1f1b() -> Schedule:
    return make_schedule("1f1b", 2, 2, 2)


def test_the_chart_of_1f1b_on_two_ranks_by_hand() -> None:
    schedule = drawn_1f1b()
    assert draw_text(schedule, schedule.timeline()).split("\n") == [
        "1F1B: 2 ranks, 1 stage a rank, 2 micro-batches",
        "",
        "time   0              5",
        "rank 0 F0 F1 .  .  B0--- .  B1---",
        "rank 1 .  F0 B0--- F1 B1--- .  .",
        "",
        "F forward   B backward   . idle   number: micro-batch",
        "length 9, idle 33.3 % of the ranks' time",
        "activations alive at most, by rank: 2 1",
    ]


@pytest.mark.parametrize(("name", "stages"), [("gpipe", 4), ("interleaved", 12), ("zbv", 8), ("dualpipev", 8)])
@pytest.mark.parametrize("costs", [(1.0, 1.0, 1.0), (1.0, 1.37, 0.71)])
def test_drawings_show_every_action_and_keep_to_their_width(
    name: PipelineSchedule, stages: int, costs: tuple[float, float, float]
) -> None:
    from xml.etree import ElementTree

    schedule = make_schedule(name, 4, stages, 12)
    timeline = schedule.timeline(*costs)
    chart = draw_text(schedule, timeline, width=10_000)
    for rank, order in enumerate(schedule.orders):
        row = next(line for line in chart.split("\n") if line.startswith(f"rank {rank}"))
        shown = [word.rstrip("-") for word in row.split()[2:] if word != "."]
        letters = ["" if stages == 4 else "abc"[schedule.chunk(action.stage)] for action in order]
        assert shown == [f"{a.kind}{a.micro_batch}{letter}" for a, letter in zip(order, letters, strict=True)]
    narrow = draw_text(schedule, timeline, width=60).split("\n")
    assert max(len(line) for line in narrow if line.startswith(("rank", "time"))) <= 60
    image = ElementTree.fromstring(draw_svg(schedule, timeline))
    boxes = [box for box in image.iter("{http://www.w3.org/2000/svg}rect") if box.get("stroke")]
    assert len(boxes) == len(timeline.events)
    right = max(float(box.get("x", 0)) + float(box.get("width", 0)) for box in boxes)
    assert right <= float(image.get("width", 0))
