"""The three paradigms: golden geometry, learning rates at every boundary, data windows, growth, refusals."""

import math
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalrps.errors import InputError
from megalrps.paths.options import PlanOptions, planned_increments, warmup_steps
from megalrps.paths.paradigms import PARADIGMS, build_plan
from megalrps.paths.plan import Fork, Increment, Plan, Window
from megalrps.paths.schedules import DECAY_STYLES

GOLDEN = PlanOptions(increment_steps=(10000,) * 4)


def plan_of(options: PlanOptions) -> Plan:
    return build_plan(planned_increments(options), options)


@st.composite
def plannable(draw: st.DrawFn) -> PlanOptions:
    """Unequal increments with one alpha a version, some of them for versions to come."""
    steps = tuple(draw(st.lists(st.integers(4, 500), min_size=2, max_size=6)))
    alphas = draw(st.lists(st.floats(0.15, 1.0), min_size=len(steps), max_size=len(steps) + 2))
    style = draw(st.sampled_from(sorted(DECAY_STYLES)))
    paradigm = draw(st.sampled_from(sorted(PARADIGMS)))
    warmup = draw(st.sampled_from([None, 0]))
    optimizer = draw(st.sampled_from(["carry", "reset"]))
    options = PlanOptions(paradigm, tuple(alphas), steps, lr_decay_style=style, branch_optimizer=optimizer)
    default_fits = warmup_steps(planned_increments(options), options) <= min(steps) // 2
    return options if default_fits else replace(options, lr_warmup_iters=warmup or 0)


def test_golden_forks_ends_and_order_of_path_switching() -> None:
    plan = plan_of(GOLDEN)
    assert [path.parent for path in plan.branches] == [Fork("main", step) for step in (4000, 14000, 24000, 34000)]
    assert [path.end for path in plan.releases] == [10000, 20000, 30000, 40000]
    assert [(s.path, s.start, s.end, s.kind, s.version) for s in plan.segments] == [
        ("main", 0, 4000, "fork", "v1"),
        ("v1", 4000, 10000, "release", "v1"),
        ("main", 4000, 14000, "fork", "v2"),
        ("v2", 14000, 20000, "release", "v2"),
        ("main", 14000, 24000, "fork", "v3"),
        ("v3", 24000, 30000, "release", "v3"),
        ("main", 24000, 34000, "fork", "v4"),
        ("v4", 34000, 40000, "release", "v4"),
    ]


def test_main_path_keeps_the_maximal_rate_after_the_warm_up() -> None:
    main = plan_of(GOLDEN).path("main")
    for step in (0, 1, 999, 2000, 2001, 4000, 4001, 34000):
        assert main.curve(step) == 3e-4 * min(1, step / 2000)


def test_golden_identity_a_release_has_the_learning_rates_of_one_uninterrupted_run() -> None:
    plan = plan_of(GOLDEN)
    for path in plan.branches:
        fork, end = path.start, path.end
        for step in {0, 1, 1999, 2000, 2001, fork - 1, fork, fork + 1, (fork + end) // 2, end - 1, end}:
            x = max(0, step - fork) / (end - fork)
            concatenated = (
                3e-5 + 2.7e-4 * (1 + math.cos(math.pi * x)) / 2 if step > fork else 3e-4 * min(1, step / 2000)
            )
            assert path.curve(step) == pytest.approx(concatenated, rel=1e-12)
        assert (path.curve(fork), path.curve(end)) == (3e-4, 3e-5)
        with pytest.raises(ValueError):
            path.curve(end + 1)


def test_branch_and_main_path_draw_the_same_window_over_the_overlap() -> None:
    plan = plan_of(GOLDEN)
    for step in (10001, 14000, 14001, 20000):
        assert plan.window_at("main", step) == plan.window_at("v2", step) == Window(10000, 20000, ("inc2",))
    assert plan.window_at("v4", 1) == Window(0, 10000, ("inc1",))
    with pytest.raises(ValueError, match="v2 has no update 20001"):
        plan.window_at("v2", 20001)
    with pytest.raises(ValueError, match="main has no update 34001"):
        plan.window_at("main", 34001)


def test_where_segments_start_from() -> None:
    plan = plan_of(GOLDEN)
    assert [plan.source(segment) for segment in plan.segments[:4]] == [
        None,
        Fork("main", 4000),
        Fork("main", 4000),
        Fork("main", 14000),
    ]
    assert [plan.source(segment) for segment in plan_of(replace(GOLDEN, paradigm="ptfs")).segments] == [None] * 4
    assert plan_of(replace(GOLDEN, paradigm="cpt")).path("v3").parent == Fork("v2", 20000)


def test_ptfs_trains_every_version_on_the_union_over_one_schedule() -> None:
    plan = plan_of(replace(GOLDEN, paradigm="ptfs"))
    for i, path in enumerate(plan.paths, start=1):
        assert path.windows == (Window(0, 10000 * i, tuple(f"inc{j}" for j in range(1, i + 1))),)
        assert [path.curve(t) for t in (0, 1, 2000, path.end)] == [0.0, 3e-4 / 2000, 3e-4, 3e-5]
        middle = (2000 + path.end) // 2
        assert path.curve(middle) == pytest.approx(1.65e-4, rel=1e-12)
    assert plan.branches == ()


def test_cpt_rewarms_for_every_version_and_sees_new_data_only() -> None:
    plan = plan_of(replace(GOLDEN, paradigm="cpt"))
    v3 = plan.path("v3")
    assert v3.windows == (Window(20000, 30000, ("inc3",)),)
    assert v3.curve(20000) == 3e-5  # where the version before it ended
    assert [v3.curve(20000 + t) for t in (1, 1000, 2000, 10000)] == pytest.approx([1.5e-7, 1.5e-4, 3e-4, 3e-5])
    assert plan.branches == ()


def test_alpha_one_forks_where_the_increment_begins_and_version_1_at_the_random_initialisation() -> None:
    plan = plan_of(replace(GOLDEN, alpha=(1.0,)))
    assert [path.start for path in plan.branches] == [0, 10000, 20000, 30000]
    assert plan.segments[0].path == "v1"
    assert plan.source(plan.segments[0]) is None
    assert plan.path("v1").curve(1) < 3e-4
    assert [s.path for s in plan_of(PlanOptions(increment_steps=(7,), alpha=(1.0,))).segments] == ["v1"]


def test_optimizer_state_is_reset_at_forks_only_when_asked() -> None:
    for optimizer, carried in (("carry", True), ("reset", False)):
        plan = plan_of(replace(GOLDEN, branch_optimizer=optimizer))
        assert plan.path("main").carry_optimizer
        assert {path.carry_optimizer for path in plan.branches} == {carried}


@given(plannable())
@settings(deadline=None, max_examples=80)
def test_the_plan_of_more_increments_extends_the_plan_of_fewer(options: PlanOptions) -> None:
    increments = planned_increments(options)
    whole = build_plan(increments, options)
    for n in range(1, len(increments)):
        part = build_plan(increments[:n], options)
        assert whole.segments[: len(part.segments)] == part.segments
        for segment in part.segments:
            assert whole.segment_fingerprint(segment) == part.segment_fingerprint(segment)


@given(plannable())
@settings(deadline=None, max_examples=50)
def test_every_release_has_seen_each_step_of_its_trajectory_once_with_a_rate_in_range(options: PlanOptions) -> None:
    plan = plan_of(options)
    for path in plan.releases:
        for step in {1, 2, path.start or 1, path.start + 1, path.end - 1 or 1, path.end}:
            assert 0.0 < path.curve(step) <= options.lr * (1 + 1e-12)
            window = plan.window_at(path.name, step)
            assert window.start < step <= window.end


def test_a_segment_keeps_its_fingerprint_only_while_nothing_that_decides_it_changes() -> None:
    plan = plan_of(GOLDEN)
    prints = [plan.segment_fingerprint(segment) for segment in plan.segments]
    assert len(set(prints)) == len(prints)
    renamed = build_plan(planned_increments(GOLDEN, ("old", "inc2", "inc3", "inc4")), GOLDEN)
    assert not set(prints) & {renamed.segment_fingerprint(segment) for segment in renamed.segments}
    linear = plan_of(replace(GOLDEN, lr_decay_style="linear"))
    kept = [linear.segment_fingerprint(s) == p for s, p in zip(linear.segments, prints, strict=True)]
    assert kept == [True, False] * 4  # the main path knows nothing of the branches' decay
    reset = plan_of(replace(GOLDEN, branch_optimizer="reset"))
    assert [reset.segment_fingerprint(s) == p for s, p in zip(reset.segments, prints, strict=True)] == kept


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"paradigm": "lprs"}, "--paradigm lprs is unknown: did you mean lrps"),
        ({"lr_decay_style": "cosin"}, "--lr-decay-style cosin is unknown: did you mean cosine"),
        ({"branch_optimizer": "drop"}, "--branch-optimizer drop"),
        ({"alpha": (0.0,)}, r"--alpha 0 must lie in \(0, 1\]"),
        ({"alpha": (1.1,)}, r"--alpha 1.1 must lie in \(0, 1\]"),
        ({"alpha": (math.nan,)}, "--alpha nan"),
        ({"alpha": ()}, "--alpha has 0 values for 4 versions"),
        ({"alpha": (0.6, 0.6)}, "--alpha has 2 values for 4 versions"),
        ({"alpha": (0.6, 0.6, 0.6, 0.6, 7.0)}, "--alpha 7"),
        ({"alpha": (0.00001,)}, "increment inc1 of 10000 steps is too short for its branch: --alpha 1e-05"),
        ({"increment_steps": ()}, "--increment-steps is required"),
        ({"increment_steps": (100, 0)}, "--increment-steps 0 of increment inc2"),
        ({"lr": 0.0}, "--lr 0 "),
        ({"lr": math.inf}, "--lr inf "),
        ({"min_lr": 3.1e-4}, "--min-lr 0.00031 must lie between 0 and --lr 0.0003"),
        ({"min_lr": -1e-5}, "--min-lr -1e-05"),
        ({"min_lr": math.nan}, "--min-lr nan"),
        ({"min_lr": 0.0, "lr_decay_style": "exponential"}, "--min-lr 0 "),
        ({"lr_warmup_iters": -1}, "--lr-warmup-iters -1"),
        ({"lr_warmup_iters": 4001}, "--lr-warmup-iters 4001 does not fit before the first fork at step 4000"),
        ({"lr_warmup_iters": 10000, "paradigm": "ptfs"}, "--lr-warmup-iters 10000 .* use at most 9999"),
        (
            {"increment_steps": (10000, 1500), "paradigm": "cpt", "lr_warmup_iters": 2000},
            r"--lr-warmup-iters 2000 .* \(10000, 11500\]",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line_that_names_the_flag(changes: dict, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint) as error:
        plan_of(replace(GOLDEN, **changes))
    assert "\n" not in str(error.value)


def test_increments_need_names_of_their_own() -> None:
    with pytest.raises(InputError, match="--increment-names: 'a'"):
        build_plan((Increment("a", 100), Increment("a", 100)), GOLDEN)
    with pytest.raises(InputError, match="--increment-names has 1 names for 4"):
        planned_increments(GOLDEN, ("a",))
    with pytest.raises(InputError, match="--increment-steps is required"):
        build_plan((), GOLDEN)


def test_default_warm_up_is_2000_or_half_of_the_first_main_path() -> None:
    assert warmup_steps(planned_increments(GOLDEN), GOLDEN) == 2000
    small = PlanOptions(increment_steps=(100, 10000))
    assert warmup_steps(planned_increments(small), small) == 20
    assert plan_of(replace(GOLDEN, lr_warmup_iters=4000)).path("v1").curve(4000) == 3e-4


def test_the_help_of_the_options_names_every_choice() -> None:
    import inspect

    source = inspect.getsource(PlanOptions)
    assert all(name in source for name in (*PARADIGMS, *DECAY_STYLES))
    assert source.count('"""') == 2 * (len(fields(PlanOptions)) + 1)


def test_the_default_warm_up_of_cpt_fits_a_short_increment():
    """Nobody asked for 2,000 steps, so nobody is told that they do not fit; long increments keep theirs."""
    increments = (Increment("a", 10000), Increment("b", 600), Increment("c", 10000))
    plan = build_plan(increments, PlanOptions(paradigm="cpt"))
    rates = [plan.path(name).curve for name in ("v1", "v2", "v3")]
    assert [rates[0](2000), rates[1](10300), rates[2](12600)] == [3e-4] * 3
    assert all(rate(peak - 1) < 3e-4 for rate, peak in zip(rates, (2000, 10300, 12600), strict=True))
