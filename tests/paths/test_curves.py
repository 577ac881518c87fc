"""Curves: exact at their ends, unchanged by being cut, the same after a round trip through JSON."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalrps.paths.curves import SHAPES, Curve, Piece

FORMULAS = {
    "linear": lambda x, a, b: a + (b - a) * x,
    "cosine": lambda x, a, b: b + (a - b) * (1 + math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x, a, b: b + (a - b) * (1 - math.sqrt(x)),
    "exponential": lambda x, a, b: a ** (1 - x) * b**x,
    "exponential-half": lambda x, a, b: b + (a - b) * (2 * 0.5**x - 1),
    "inverse-linear": lambda x, a, b: a * b / (a * x + b * (1 - x)),
}
"""Every shape in closed form, written independently of the package."""


@pytest.mark.parametrize("shape", sorted(set(SHAPES) - {"constant"}))
def test_shape_follows_its_formula_and_meets_its_ends_exactly(shape: str) -> None:
    piece = Piece(100, 107, 3e-4, 3e-5, shape)
    assert piece(100) == 3e-4
    assert piece(107) == 3e-5
    for step in range(101, 107):
        assert piece(step) == pytest.approx(FORMULAS[shape]((step - 100) / 7, 3e-4, 3e-5), rel=1e-12)
    rates = [piece(step) for step in range(100, 108)]
    assert rates == sorted(rates, reverse=True)


def test_every_shape_but_the_constant_has_a_formula_here() -> None:
    assert set(FORMULAS) | {"constant"} == set(SHAPES)


@pytest.mark.parametrize("shape", sorted(set(SHAPES) - {"constant", "exponential", "inverse-linear"}))
def test_shape_reaches_zero(shape: str) -> None:
    assert Piece(0, 10, 1e-3, 0.0, shape)(10) == 0.0


@pytest.mark.parametrize(
    "fields",
    [
        (0, 10, 1.0, 0.1, "sigmoid"),
        (10, 10, 1.0, 0.1, "linear"),
        (-1, 10, 1.0, 0.1, "linear"),
        (0, None, 1.0, 0.1, "linear"),
        (0, None, 1.0, 0.1, "constant"),
        (0, 10, 1.0, 0.0, "exponential"),
        (0, 10, 0.0, 1.0, "inverse-linear"),
        (0, 10, 1.0, -0.1, "linear"),
        (0, 10, math.nan, 0.1, "linear"),
        (0, 10, 1.0, 0.1, "linear", 10),
        (0, 10, 1.0, 0.1, "linear", 0),
        (0, 10, 1.0, 1.0, "constant", 5),
    ],
)
def test_a_piece_that_is_no_function_of_the_step_is_refused(fields: tuple) -> None:
    with pytest.raises(ValueError):
        Piece(*fields)


def example_curve() -> Curve:
    """Warm-up, plateau, decay, and a second warm-up that jumps back to 0."""
    return Curve(
        (
            Piece(0, 4, 0.0, 1.0, "linear"),
            Piece(4, 9, 1.0, 1.0, "constant"),
            Piece(9, 20, 1.0, 0.1, "cosine"),
            Piece(20, 26, 0.0, 1.0, "linear"),
            Piece(26, None, 1.0, 1.0, "constant"),
        )
    )


def test_a_boundary_step_belongs_to_the_piece_that_ends_there() -> None:
    curve = example_curve()
    assert [curve(step) for step in (0, 4, 9, 20)] == [0.0, 1.0, 1.0, 0.1]
    assert curve(21) == pytest.approx(1 / 6)
    assert curve(10**9) == 1.0


@given(st.integers(0, 40), st.integers(0, 40))
@settings(deadline=None, max_examples=60)
def test_cutting_a_curve_changes_no_earlier_rate_and_leaves_none_later(first: int, second: int) -> None:
    curve = example_curve()
    cut = curve.until(first)
    assert [cut(step) for step in range(1, first + 1)] == [curve(step) for step in range(1, first + 1)]
    with pytest.raises(ValueError, match=f"no learning rate at step {first + 1}"):
        cut(first + 1)
    if second <= first:
        assert cut.until(second) == curve.until(second)


def test_a_constant_forgets_its_old_end_when_cut_so_that_a_longer_plan_has_the_same_prefix() -> None:
    short, long = (Curve((Piece(0, end, 1.0, 1.0, "constant"),)) for end in (50, None))
    assert short.until(30) == long.until(30)


def test_pieces_must_follow_one_another() -> None:
    with pytest.raises(ValueError, match="ends at step 4 "):
        Curve((Piece(0, 4, 0.0, 1.0, "linear"), Piece(5, 9, 1.0, 1.0, "constant")))
    with pytest.raises(ValueError, match="ends at step None"):
        example_curve().then(Piece(30, 40, 1.0, 0.1, "linear"))


def test_a_step_before_the_start_and_an_end_beyond_the_curve_are_refused() -> None:
    curve = Curve((Piece(5, 9, 1.0, 0.5, "linear"),))
    with pytest.raises(ValueError, match="covers steps 5 to 9"):
        curve(4)
    with pytest.raises(ValueError, match="ends at step 9"):
        curve.until(10)


@given(st.integers(1, 40))
@settings(deadline=None, max_examples=40)
def test_json_keeps_a_cut_curve_exactly(cut: int) -> None:
    curve = example_curve().until(cut)
    assert Curve.from_json(json.loads(json.dumps(curve.to_json()))) == curve
