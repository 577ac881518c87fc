"""Cutting text at its seams."""

from hypothesis import given, settings
from hypothesis import strategies as st

from megalrps.data.chunks import cut_text


def test_a_text_that_fits_stays_whole() -> None:
    assert list(cut_text("a\n\nb\n", 100)) == ["a\n\nb"]
    assert list(cut_text("", 100)) == []
    assert list(cut_text("\n \n\n", 100)) == [" "]


def test_a_cut_falls_before_a_definition_rather_than_inside_one() -> None:
    first = "def first():\n    one = 1\n\n    return one\n\n"
    second = "def second():\n    two = 2\n\n    return two\n\n"
    assert list(cut_text(first + second, len(first) + 30)) == [first.strip("\n"), second.strip("\n")]


def test_a_definition_larger_than_a_piece_is_cut_at_blank_lines() -> None:
    methods = [f"    def method_{n}(self):\n        return {n}\n\n" for n in range(6)]
    pieces = list(cut_text("class Large:\n" + "".join(methods), 100))
    assert [piece.split(":")[0].strip() for piece in pieces] == [
        "class Large",
        "def method_2(self)",
        "def method_4(self)",
    ]


def test_a_paragraph_larger_than_a_piece_is_cut_at_lines() -> None:
    assert list(cut_text("one\ntwo\nthree\n", 8)) == ["one\ntwo", "three"]
    assert list(cut_text("x" * 50, 8)) == ["x" * 50]


@settings(deadline=None, max_examples=200)
@given(
    text=st.text(st.sampled_from("ab \né"), max_size=200),
    limit=st.integers(1, 60),
)
def test_nothing_but_blank_lines_is_lost_and_no_piece_is_too_long(text: str, limit: int) -> None:
    pieces = list(cut_text(text, limit))
    assert "".join(pieces).replace("\n", "") == text.replace("\n", "")
    for piece in pieces:
        assert len(piece.encode()) <= limit or "\n" not in piece
        assert piece == piece.strip("\n") != ""
