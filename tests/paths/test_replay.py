"""Replay in a plan: windows that name what is replayed, a plan that grows, changes that reach later increments only."""

import json
from dataclasses import replace
from fractions import Fraction

import pytest

from megalrps.errors import InputError
from megalrps.fingerprint import fingerprint
from megalrps.paths.cost import cost_steps, cost_steps_by_paradigm
from megalrps.paths.draw import version_table
from megalrps.paths.options import PlanOptions, planned_increments, replay_shares
from megalrps.paths.paradigms import build_plan
from megalrps.paths.plan import Plan, Replay, Window

OPTIONS = PlanOptions(increment_steps=(100, 200, 50))


def planned(*replay: str, paradigm: str = "lrps", increments: int = 3) -> Plan:
    steps = OPTIONS.increment_steps[:increments]
    options = replace(OPTIONS, paradigm=paradigm, replay=replay, increment_steps=steps)
    return build_plan(planned_increments(options), options)


def replayed(plan: Plan, path: str) -> dict[int, Replay | None]:
    """By start of the window, what is replayed in it."""
    return {window.start: window.replay for window in plan.path(path).windows}


def test_one_fraction_is_for_all_increments_but_the_first():
    second, third = Replay(("inc1",), "1/20"), Replay(("inc1", "inc2"), "1/20")
    plan = planned("0.05")
    assert replayed(plan, "main") == {0: None, 100: second, 300: third}
    assert [replayed(plan, name) for name in ("v1", "v2", "v3")] == [{0: None}, {100: second}, {300: third}]
    continual = planned("0.05", paradigm="cpt")
    assert [replayed(continual, name) for name in ("v1", "v2", "v3")] == [{0: None}, {100: second}, {300: third}]


def test_a_fraction_for_each_increment_and_more_for_those_to_come():
    plan = planned("0", "0.1", "0", "0.5")
    assert replayed(plan, "main") == {0: None, 100: Replay(("inc1",), "1/10"), 300: None}
    assert replay_shares(2, replace(OPTIONS, replay=("0", "1/3", "0.2"))) == (0, Fraction(1, 3))


@pytest.mark.parametrize("paradigm", ["lrps", "cpt"])
def test_a_branch_and_the_main_path_hold_the_same_window(paradigm: str):
    plan = planned("0.25", paradigm=paradigm)
    for step in range(1, 351):
        windows = {plan.window_at(path.name, step) for path in plan.paths if path.end >= step}
        assert len(windows) == 1, step


def test_without_replay_a_plan_is_what_it_was():
    assert planned("0").to_json() == planned("0", "0", "0").to_json() == planned().to_json()
    assert "replay" not in json.dumps(planned().to_json())
    assert Window(0, 1, ("a",)).to_json() == {"start": 0, "end": 1, "increments": ["a"]}


@pytest.mark.parametrize("paradigm", ["lrps", "cpt"])
def test_the_json_holds_the_exact_fraction_and_gives_the_same_plan(paradigm: str):
    plan = planned("0", "0.050", "1/3", paradigm=paradigm)
    written = json.loads(json.dumps(plan.to_json()))
    assert Plan.from_json(written) == plan
    windows = [window for path in written["paths"] for window in path["windows"]]
    assert {"start": 100, "end": 300, "increments": ["inc2"]} not in windows
    own = {"start": 100, "end": 300, "increments": ["inc2"], "replay": {"increments": ["inc1"], "fraction": "1/20"}}
    assert own in windows
    assert planned("0", "5e-2", "2/6", paradigm=paradigm).fingerprint == plan.fingerprint


def test_fingerprints_are_for_ever():
    plan = planned("0", "0.05", "1/3")
    assert (
        plan.segment_fingerprint(plan.segments[-1])
        == "ce83d90ad19b987fba271d329f55ec3a851db7bd2ff0de2516ff2fa36df7f21a"
    )


@pytest.mark.parametrize("paradigm", ["lrps", "cpt"])
def test_what_later_increments_replay_leaves_the_segments_before_them_as_they_are(paradigm: str):
    shorter = planned("0.05", paradigm=paradigm, increments=2)
    known = {shorter.segment_fingerprint(segment): segment for segment in shorter.segments}
    for other in (planned("0.05", paradigm=paradigm), planned("0", "0.05", "0.5", paradigm=paradigm)):
        found = {other.segment_fingerprint(segment): segment for segment in other.segments}
        assert known.items() <= found.items()
    changed = planned("0", "0.06", "0.05", paradigm=paradigm)
    kept = [s for s in changed.segments if changed.segment_fingerprint(s) in known]
    assert kept and all(segment.end <= 100 for segment in kept), "a segment of increment 2 outlived its replay"
    assert [s.end for s in changed.segments if s.end <= 100] == [s.end for s in kept]


def test_replay_costs_nothing_and_is_shown():
    plan, options = planned("0", "0.05", "1/3"), replace(OPTIONS, replay=("0", "0.05", "1/3"))
    assert cost_steps(plan) == cost_steps(planned())
    assert cost_steps_by_paradigm(plan.increments, options) == cost_steps_by_paradigm(plan.increments, OPTIONS)
    lines = version_table(plan).split("\n")
    assert [
        shown in line
        for shown, line in zip(("inc1  ", "inc2 + 5 % replay", "inc3 + 33.3 % replay"), lines[1:], strict=True)
    ] == [True] * 3
    assert "replay" not in version_table(planned())


@pytest.mark.parametrize(
    ("replay", "complaint"),
    [
        (("1",), r"--replay 1 must lie in \[0, 1\)"),
        (("-0.1",), "--replay '-0.1' is not a number such as 0.05"),
        (("0", "5%"), "--replay '5%' is not a number"),
        (
            ("0", "0.1"),
            "--replay has 2 values for 3 increments: give one for all, or one for each, the first of them 0",
        ),
        (("0.05", "0.05", "0.05"), "--replay 0.05 of the first increment: it has no older ones"),
        (("0.12345678",), "--replay 0.12345678: a denominator beyond 1,000,000"),
    ],
)
def test_what_cannot_be_replayed_is_refused_by_the_flag(replay: tuple[str, ...], complaint: str):
    with pytest.raises(InputError, match=complaint):
        planned(*replay)


def test_from_scratch_has_nothing_to_replay():
    with pytest.raises(InputError, match="--replay is not for --paradigm ptfs: every version draws from all"):
        planned("0.05", paradigm="ptfs")
    assert planned("0", paradigm="ptfs").fingerprint == planned(paradigm="ptfs").fingerprint


@pytest.mark.parametrize(
    ("name", "fraction", "complaint"),
    [
        ("inc3", "1/20", "replays increments that are not other ones"),
        ("inc9", "1/20", "replays increments that are not other ones"),
        ("inc1", "2/40", "no fraction in lowest terms"),
        ("inc1", "1", "no fraction in lowest terms"),
        ("inc1", "0.05", "no fraction in lowest terms"),
        ("inc1", "x", "Invalid literal for Fraction"),
        ("inc1", 0.05, "no fraction in lowest terms"),
    ],
)
def test_a_plan_with_a_replay_that_makes_no_sense_is_refused(name: str, fraction: object, complaint: str):
    body = planned("0.05").to_json()
    del body["fingerprint"]
    for path in body["paths"]:
        for window in path["windows"]:
            if window["start"] == 300:
                window["replay"] = {"increments": [name], "fraction": fraction}
    with pytest.raises(InputError, match=f"holds no valid plan .*{complaint}"):
        Plan.from_json({**body, "fingerprint": fingerprint(body)})
