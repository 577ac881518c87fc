"""Numbers in words: exact where they claim to be."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalrps.evaluation.words import curve_sentences, duration, joined, rate, short_count
from megalrps.paths.curves import SHAPES, Curve, Piece


@given(st.floats(0, 10))
def test_a_rate_reads_back_as_the_same_float(value: float) -> None:
    assert float(rate(value)) == value


@pytest.mark.parametrize(
    ("value", "text"), [(3e-4, "3e-4"), (9.5e-5, "9.5e-5"), (0.0, "0"), (0.01, "0.01"), (1.0, "1")]
)
def test_rates_look_as_people_write_them(value: float, text: str) -> None:
    assert rate(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7, "7"),
        (999, "999"),
        (1000, "1k"),
        (9999, "10k"),
        (614400, "614k"),
        (999_999, "1M"),
        (10.49e9, "10.5B"),
        (2.5e12, "2.5T"),
    ],
)
def test_counts_have_three_digits_and_a_unit(value: float, text: str) -> None:
    assert short_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (4.24, "4.2 s"),
        (59.96, "1 min 0 s"),
        (73, "1 min 13 s"),
        (3599.7, "1 h 0 min"),
        (12_000, "3 h 20 min"),
        (200_000, "2 d 8 h"),
    ],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_names_are_joined_as_in_a_sentence() -> None:
    assert [joined(["a"]), joined(["a", "b"]), joined(["a", "b", "c"])] == ["a", "a and b", "a, b and c"]


def value_of(formula: str, x: float) -> float:
    """The formula of a sentence, computed: what a reader would get with a pocket calculator."""
    for written, python in (("½", "0.5*"), ("cos πx", "cos(pi*x)"), ("√x", "sqrt(x)"), ("·", "*"), ("^", "**")):
        formula = formula.replace(written, python)
    return float(eval(formula, {"x": x, "cos": math.cos, "pi": math.pi, "sqrt": math.sqrt}))


@pytest.mark.parametrize("shape", sorted(set(SHAPES) - {"constant"}))
@pytest.mark.parametrize("start", [0, 1400])
def test_the_formula_on_the_page_is_the_curve(shape: str, start: int) -> None:
    piece = Piece(start, start + 600, 3e-4, 2.7e-5, shape)
    (sentence,) = curve_sentences(Curve((piece,)), start, start + 600)
    words, _, progress = sentence.rstrip(".").partition(" with x = ")
    formula = words.partition("lr(t) = ")[2]
    for step in (start + 1, start + 77, start + 599, start + 600):
        x = float(eval(progress.replace(",", ""), {"t": step}))
        assert value_of(formula, x) == pytest.approx(piece(step), rel=1e-12)


def test_a_warm_up_from_zero_and_a_hold_are_said_shortly_and_end_with_the_path() -> None:
    curve = Curve((Piece(0, 10, 0.0, 3e-3, "linear"), Piece(10, None, 3e-3, 3e-3, "constant")))
    assert curve_sentences(curve, 0, 228) == [
        "Steps 1 to 10: linear from 0 to 3e-3, lr(t) = 3e-3·x with x = t / 10.",
        "Steps 11 to 228: held at 3e-3.",
    ]
    assert curve_sentences(curve, 10, 11) == ["Step 11: held at 3e-3."]


def test_what_a_path_inherits_is_not_said_again() -> None:
    main = Curve((Piece(0, None, 3e-3, 3e-3, "constant"),))
    branch = main.until(40).then(Piece(40, 100, 3e-3, 0.0, "linear"))
    assert curve_sentences(branch, 40, 100) == [
        "Steps 41 to 100: linear from 3e-3 to 0, lr(t) = 3e-3 + (0 - 3e-3)·x with x = (t - 40) / 60."
    ]
