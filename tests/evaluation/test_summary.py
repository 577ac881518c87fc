"""summary.json: an interface others script against, read strictly and written as documented."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalrps.errors import InputError
from megalrps.evaluation.json_fields import Fields
from megalrps.evaluation.perplexity import HeldOutLoss
from megalrps.evaluation.summary import Release, Summary, read_summary, write_comparison_summary, write_summary

NAMES = st.text("abc-1.", min_size=1, max_size=6)
PERPLEXITY = st.floats(1, 1e30)


@st.composite
def releases(draw: st.DrawFn) -> Release:
    increments = draw(st.lists(NAMES, max_size=3, unique=True))
    return Release(
        name=draw(NAMES),
        path=draw(NAMES),
        step=draw(st.integers(0, 10**9)),
        tokens=draw(st.integers(0, 10**15)),
        checkpoint=draw(NAMES),
        perplexity={name: draw(PERPLEXITY) for name in increments},
        bits_per_byte={name: draw(st.floats(0, 100)) for name in increments},
    )


SUMMARIES = st.builds(
    Summary,
    paradigm=NAMES,
    releases=st.lists(releases(), max_size=3, unique_by=lambda release: release.name).map(tuple),
    cost_steps=st.integers(0, 10**9),
    wall_seconds=st.floats(0, 1e9),
    report=NAMES,
    device=st.none() | NAMES,
    parameters=st.none() | st.integers(0, 10**12),
)


@given(SUMMARIES)
def test_a_summary_survives_its_json(summary: Summary) -> None:
    value = json.loads(json.dumps(summary.to_json()))
    assert Summary.from_fields(Fields(value, "summary.json", "", "mend it")) == summary


def example() -> Summary:
    losses = {"old": HeldOutLoss("old", 69.0, 30, 40), "new": HeldOutLoss("new", 90.0, 30, 40)}
    return Summary("lrps", (Release.measured("v1", "v1", 100, 204800, "checkpoints/a", losses),), 100, 12.5, "r.html")


def test_the_keys_are_the_documented_ones() -> None:
    value = example().to_json()
    assert list(value) == ["paradigm", "releases", "cost_steps", "wall_seconds", "report"]
    expected = ["name", "path", "step", "tokens", "checkpoint", "perplexity", "bits_per_byte"]
    assert list(value["releases"][0]) == expected
    assert value["releases"][0]["perplexity"]["old"] == pytest.approx(math.exp(2.3))
    assert value["releases"][0]["bits_per_byte"]["new"] == pytest.approx(90 / 40 / math.log(2))


def test_the_mean_is_of_the_increments_asked_for_and_only_if_all_were_measured() -> None:
    release = example().releases[0]
    assert release.mean_perplexity(["old", "new"]) == pytest.approx((math.exp(2.3) + math.exp(3)) / 2)
    assert release.mean_perplexity(["old"]) == pytest.approx(math.exp(2.3))
    assert release.mean_perplexity(["old", "other"]) is None
    assert release.mean_perplexity([]) is None


def changed(**changes: Any) -> dict[str, Any]:
    return example().to_json() | changes


def with_release(**changes: Any) -> dict[str, Any]:
    value = copy.deepcopy(example().to_json())
    value["releases"][0] |= changes
    return value


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ([], "a JSON object is expected, not list"),
        ({}, "no 'paradigm', 'releases', 'cost_steps', 'wall_seconds', 'report'"),
        (changed(speed=3), "unknown 'speed'"),
        (changed(cost_steps=1.5), "'cost_steps' must be a whole number"),
        (changed(cost_steps=True), "'cost_steps' must be a whole number"),
        (changed(wall_seconds=-1), "'wall_seconds' must be a finite number >= 0"),
        (changed(releases={}), "'releases' must be a list"),
        (changed(releases=["v1"]), "(releases[0]): a JSON object is expected"),
        (changed(releases=[example().to_json()["releases"][0]] * 2), "released twice"),
        (with_release(step=-1), "(releases[0]): 'step' must be a whole number >= 0"),
        (with_release(ppl={}), "(releases[0]): unknown 'ppl'"),
        (with_release(perplexity={"old": 2.0}), "must name the same increments"),
        (with_release(perplexity={"old": 0.5, "new": 2.0}), "a perplexity below 1 ('old')"),
        (with_release(perplexity={"old": "2", "new": 2.0}), "(releases[0].perplexity): 'old' must be a number"),
    ],
)
def test_another_format_is_refused_in_one_line_naming_file_place_and_mend(
    tmp_path: Path, value: Any, complaint: str
) -> None:
    file = tmp_path / "summary.json"
    file.write_text(json.dumps(value))
    with pytest.raises(InputError) as error:
        read_summary(file)
    message = str(error.value)
    assert message.startswith(str(file))
    assert complaint in message
    assert "hand another run" in message
    assert "\n" not in message


def test_a_comparison_is_not_taken_for_a_run(tmp_path: Path) -> None:
    write_comparison_summary(tmp_path / "summary.json", {"lrps": example(), "cpt": example()})
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written == {"lrps": example().to_json(), "cpt": example().to_json()}
    with pytest.raises(InputError, match=r"a comparison of runs \(lrps, cpt\)"):
        read_summary(tmp_path / "summary.json")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_summary(tmp_path / "summary.json")
    (tmp_path / "summary.json").write_text('{"paradigm": "lr')
    with pytest.raises(InputError, match="not JSON"):
        read_summary(tmp_path / "summary.json")


def test_what_no_reader_would_accept_is_not_written(tmp_path: Path) -> None:
    diverged = Release("v1", "v1", 1, 1, "a", {"old": math.inf}, {"old": 3.0})
    with pytest.raises(InputError, match="'old' must be a finite number"):
        write_summary(tmp_path / "summary.json", Summary("lrps", (diverged,), 1, 1.0, "r.html"))
    assert not list(tmp_path.iterdir())
