"""What the detector of spikes makes of curves of losses, and that nothing spoils the file that it tells them to."""

import json
import math
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from counts import count, record, seed

from megalrps.training.options import StabilityOptions
from megalrps.training.stability import append_event, judge, spread_of
from megalrps.training.state import TrainState
from megalrps.training.step import StepResult

NAN, INF = math.nan, math.inf


def curve(steps: int, draw: random.Random) -> list[float]:
    """A loss as of a small model: a power law from 8.9 down to about 5, noise of 2 %, a rise where new data begins."""
    return [
        (2.0 + 6.9 * (1 + step / 20) ** -0.25 + 0.05 * (step % 1000 > 700)) * (1 + 0.02 * draw.gauss(0, 1))
        for step in range(steps)
    ]


def fresh_state() -> TrainState:
    """A state of which a judgement uses the counters alone."""
    return TrainState(*(mock.Mock() for _ in range(3)))


def test_an_ordinary_curve_raises_no_alarm_and_each_leap_in_it_does():
    steps, draw, options = (
        count("steps of an ordinary curve", 6_000, 300_000),
        random.Random(seed()),
        StabilityOptions(),
    )
    state, leaps, alarms = fresh_state(), set(draw.sample(range(200, steps), steps // 200)), set()
    for step, loss in enumerate(curve(steps, draw)):
        if judge(StepResult(10 * loss if step in leaps else loss, 1.0), state, options) is not None:
            alarms.add(step)
    assert alarms == leaps and state.skipped == 0
    assert len(state.recent_losses) == options.loss_spike_window and max(state.recent_losses) < 10
    record("F9", curve={"steps": steps, "false alarms": len(alarms - leaps), "missed": len(leaps - alarms)})


def test_fewer_losses_than_the_window_and_updates_that_fp16_leaves_out():
    options = StabilityOptions(loss_spike_window=3, on_non_finite="skip", max_skipped_steps=2)
    state = fresh_state()
    assert spread_of([1.0, 2.0], 3) is None and spread_of([9.0, 1.0, 2.0, 3.0], 3) == (2.0, 1.0)
    assert [judge(StepResult(loss, 1.0), state, options) for loss in (1.0, 50.0, 2.0)] == [None] * 3
    overflow = StepResult(3.0, INF, skipped=True, loss_scale=2.0)
    rows: list[Mapping[str, Any]] = []
    for result in (StepResult(NAN, 1.0), overflow, StepResult(3.0, NAN), StepResult(3.0, 1.0), StepResult(NAN, NAN)):
        found = judge(result, state, options)
        rows.append({"in a row": None if found is None else found.in_a_row, "counted": state.skipped})
    assert [row["in a row"] for row in rows] == [1, None, 2, None, 1]
    assert [row["counted"] for row in rows] == [1, 2, 3, 3, 4]
    assert judge(StepResult(50.0, 1.0), state, replace(options, on_loss_spike="ignore")) is None
    assert state.recent_losses == [3.0, 3.0, 50.0], "the window goes on, for when the policy is another again"


def test_a_line_of_events_that_a_kill_has_cut_short_spoils_no_other(tmp_path: Path):
    file = tmp_path / "events.jsonl"
    append_event(file, {"step": 1})
    with open(file, "a") as torn:
        torn.write('{"step": 2, "los')
    append_event(file, {"step": 3})
    whole, half, last = file.read_text().splitlines()
    assert (json.loads(whole), json.loads(last)) == ({"step": 1}, {"step": 3}) and half.endswith('"los')
