"""The plan as data: purity, exact JSON, refusal of what was changed by hand, invariants that can fail."""

import copy
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalrps.errors import InputError
from megalrps.fingerprint import fingerprint
from megalrps.paths.curves import Curve, Piece
from megalrps.paths.options import PlanOptions, planned_increments
from megalrps.paths.paradigms import PARADIGMS, build_plan
from megalrps.paths.plan import Fork, Plan, Window

OPTIONS = PlanOptions(increment_steps=(100, 200, 50), alpha=(0.6, 0.3, 1.0))


def example(paradigm: str = "lrps") -> Plan:
    return build_plan(planned_increments(OPTIONS), replace(OPTIONS, paradigm=paradigm))


@pytest.mark.parametrize("paradigm", PARADIGMS)
@given(lr=st.floats(1e-6, 1.0), share=st.floats(0.001, 1.0))
@settings(deadline=None, max_examples=30)
def test_json_round_trip_is_exact(paradigm: str, lr: float, share: float) -> None:
    options = replace(OPTIONS, paradigm=paradigm, lr=lr, min_lr=lr * share)
    plan = build_plan(planned_increments(options), options)
    written = plan.to_json()
    read = json.loads(json.dumps(written))
    assert read == written
    assert Plan.from_json(read) == plan
    assert Plan.from_json(read).fingerprint == plan.fingerprint


def test_same_input_same_fingerprint_and_any_change_another() -> None:
    assert example().fingerprint == example().fingerprint
    whole_numbers = [replace(OPTIONS, lr=lr, min_lr=0.5, lr_decay_style="linear") for lr in (1, 1.0)]
    assert len({build_plan(planned_increments(o), o).fingerprint for o in whole_numbers}) == 1
    others = [
        replace(OPTIONS, alpha=(0.6, 0.31, 1.0)),
        replace(OPTIONS, lr=3.0000000000000003e-4),
        replace(OPTIONS, branch_optimizer="reset"),
        replace(OPTIONS, lr_warmup_iters=1),
        replace(OPTIONS, paradigm="cpt"),
    ]
    prints = {build_plan(planned_increments(o), o).fingerprint for o in others}
    assert len(prints | {example().fingerprint}) == len(others) + 1


def test_fingerprints_are_for_ever() -> None:
    """Run directories record them: a change here starts every existing run anew and needs a new FORMAT_VERSION."""
    plan = example()
    assert plan.fingerprint == "ede4d04688654f133732eb69d0bce7bcf9d52907e034e14ff573a781d2252da4"
    assert (
        plan.segment_fingerprint(plan.segments[-1])
        == "ccafbb6f9b0520fff4fa892171921db5f1f8c168a97bef0834a27524a29015f7"
    )


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("paths", 0, "end"), 289),
        (("paths", 1, "curve", -1, "end_lr"), 2e-5),
        (("segments", 0, "version"), "v2"),
        (("increments", 0, "name"), "other"),
        (("paradigm",), "cpt"),
        (("fingerprint",), "0" * 64),
    ],
)
def test_a_plan_changed_by_hand_is_refused(where: tuple, value: object) -> None:
    written = copy.deepcopy(example().to_json())
    inner = written
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    with pytest.raises(InputError, match=r"RUN/plan\.json was changed since it was written"):
        Plan.from_json(written, "RUN/plan.json")


@pytest.mark.parametrize("value", [None, [], "plan", {}, {"format_version": 2}])
def test_another_format_is_refused(value: object) -> None:
    with pytest.raises(InputError, match=r"plan\.json is not a plan of format version 1"):
        Plan.from_json(value)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.pop("segments"),
        lambda body: body.update(extra=1),
        lambda body: body["paths"][0].pop("curve"),
        lambda body: body["paths"].reverse(),
        lambda body: body["segments"].reverse(),
        lambda body: body["increments"][0].update(steps="many"),
        lambda body: body["paths"][1]["curve"][0].update(shape="wave"),
        lambda body: body["paths"].append(None),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_even_with_a_fitting_fingerprint(change) -> None:
    body = copy.deepcopy(example().to_json())
    del body["fingerprint"]
    change(body)
    with pytest.raises(InputError, match="holds no valid plan"):
        Plan.from_json({**body, "fingerprint": fingerprint(body)})


def with_path(plan: Plan, name: str, **changes: object) -> Plan:
    return replace(plan, paths=tuple(replace(p, **changes) if p.name == name else p for p in plan.paths))


def with_segment(plan: Plan, index: int, **changes: object) -> Plan:
    segments = list(plan.segments)
    segments[index] = replace(segments[index], **changes)
    return replace(plan, segments=tuple(segments))


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (lambda p: with_path(p, "v2", release="v1"), "release names"),
        (lambda p: replace(p, paths=(*p.paths, p.paths[-1])), "path names"),
        (lambda p: with_path(p, "v1", parent=Fork("trunk", 40)), "leaves trunk, which is not planned before it"),
        (lambda p: with_path(p, "v3", parent=Fork("main", 301), end=350), "leaves main after its end"),
        (lambda p: with_path(p, "v1", curve=p.path("v2").curve), "curve of path v1 does not end with it"),
        (
            lambda p: with_path(p, "v1", curve=Curve((Piece(0, 100, 1e-4, 1e-4, "constant"),))),
            "does not keep its parent's learning rates",
        ),
        (
            lambda p: with_path(p, "main", curve=Curve((Piece(1, None, 1.0, 1.0, "constant"),))),
            "does not begin at step 0",
        ),
        (lambda p: with_path(p, "v1", windows=()), "windows of path v1 do not cover"),
        (lambda p: with_path(p, "v1", windows=(Window(0, 99, ("inc1",)),)), "windows of path v1 do not cover"),
        (lambda p: with_path(p, "v1", windows=(Window(0, 100, ("new",)),)), "increments that the plan does not have"),
        (lambda p: with_segment(p, 0, end=39), "segment main .0, 39. cannot be of kind fork"),
        (lambda p: with_segment(p, 1, start=41), "leaves a gap or an overlap"),
        (lambda p: with_segment(p, 1, kind="end"), "cannot be of kind end"),
        (lambda p: with_segment(p, 1, version="v3"), "releases v1, not v3"),
        (lambda p: with_segment(p, 1, path="v9"), "unknown path v9"),
        (lambda p: replace(p, segments=p.segments[1:]), "starts from a state that was not trained before it"),
        (lambda p: replace(p, segments=p.segments[:-1]), "not trained to its end"),
    ],
)
def test_check_finds_what_cannot_be_trained(broken, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        broken(example()).check()
