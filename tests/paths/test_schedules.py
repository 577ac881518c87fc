"""Decay styles: closed forms at every boundary, for a branch and for a full schedule."""

import math

import pytest

from megalrps.errors import InputError
from megalrps.paths.curves import Curve
from megalrps.paths.schedules import DECAY_STYLES, decay_pieces, full_pieces

MAX, MIN = 3e-4, 3e-5
DROP = math.sqrt(MIN / MAX)  # 0.316: DeepSeek's factor at each of two drops

AFTER_ONE_OF_6000 = {
    "cosine": MIN + (MAX - MIN) * (1 + math.cos(math.pi / 6000)) / 2,
    "knee": MAX - (MAX - MIN) / 6000,
    "multi-step": MAX * DROP,
    "linear": MAX - (MAX - MIN) / 6000,
    "1-sqrt": MIN + (MAX - MIN) * (1 - math.sqrt(1 / 6000)),
    "exponential": MAX * 0.1 ** (1 / 6000),
    "exponential-half": MIN + (MAX - MIN) * (2 * 0.5 ** (1 / 6000) - 1),
    "inverse-linear": 1 / (1 / 6000 / MIN + 5999 / 6000 / MAX),
    "constant": MAX,
}
HALF_WAY = {
    "cosine": (MAX + MIN) / 2,
    "knee": (MAX + MIN) / 2,
    "multi-step": MAX * DROP,
    "linear": (MAX + MIN) / 2,
    "1-sqrt": MIN + (MAX - MIN) * (1 - math.sqrt(0.5)),
    "exponential": MAX * DROP,
    "exponential-half": MIN + (MAX - MIN) * (math.sqrt(2) - 1),
    "inverse-linear": 2 / (1 / MIN + 1 / MAX),
    "constant": MAX,
}


def test_the_tables_here_hold_every_style() -> None:
    assert set(AFTER_ONE_OF_6000) == set(HALF_WAY) == set(DECAY_STYLES)


@pytest.mark.parametrize("style", DECAY_STYLES)
def test_branch_at_fork_plus_one_half_way_and_end(style: str) -> None:
    branch = Curve(decay_pieces(style, 4000, 10000, MAX, MIN))
    assert branch(4001) == pytest.approx(AFTER_ONE_OF_6000[style], rel=1e-12)
    assert branch(7000) == pytest.approx(HALF_WAY[style], rel=1e-12)
    assert branch(10000) == (MAX if style == "constant" else MIN)


@pytest.mark.parametrize("style", DECAY_STYLES)
@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_the_shortest_branches_still_end_at_the_minimum(style: str, length: int) -> None:
    branch = Curve(decay_pieces(style, 10, 10 + length, MAX, MIN))
    assert (branch.start, branch.end) == (10, 10 + length)
    assert branch(10 + length) == (MAX if style == "constant" else MIN)


@pytest.mark.parametrize(("style", "decay_start"), [("knee", 5000), ("multi-step", 8000), ("cosine", 2000)])
def test_full_schedule_warms_up_holds_and_decays(style: str, decay_start: int) -> None:
    shift = 20000
    curve = Curve(full_pieces(style, shift, shift + 10000, 2000, MAX, MIN))
    assert curve(shift) == 0.0
    assert [curve(shift + t) for t in (1, 1000, 2000)] == pytest.approx([MAX / 2000, MAX / 2, MAX], rel=1e-12)
    assert curve(shift + 2000) == curve(shift + decay_start) == MAX
    assert curve(shift + decay_start + 1) < MAX
    assert curve(shift + 10000) == MIN


def test_multi_step_drops_after_80_and_90_per_cent() -> None:
    curve = Curve(full_pieces("multi-step", 0, 1000, 100, MAX, MIN))
    assert [curve(t) for t in (800, 801, 900, 901)] == pytest.approx([MAX, MAX * DROP, MAX * DROP, MIN], rel=1e-12)


@pytest.mark.parametrize(("style", "most"), [("cosine", 99), ("knee", 50), ("multi-step", 80), ("constant", 99)])
def test_the_longest_warm_up_that_fits(style: str, most: int) -> None:
    assert Curve(full_pieces(style, 0, 100, most, MAX, MIN))(most) == MAX
    with pytest.raises(InputError, match=f"--lr-warmup-iters {most + 1} .* use at most {most}"):
        full_pieces(style, 0, 100, most + 1, MAX, MIN)


@pytest.mark.parametrize("style", DECAY_STYLES)
def test_a_minimum_of_zero_is_reached_or_refused(style: str) -> None:
    if DECAY_STYLES[style].needs_positive_minimum:
        with pytest.raises(InputError, match=f"--min-lr 0 .* {style}"):
            decay_pieces(style, 0, 10, MAX, 0.0)
    elif style != "constant":
        assert Curve(decay_pieces(style, 0, 10, MAX, 0.0))(10) == 0.0
