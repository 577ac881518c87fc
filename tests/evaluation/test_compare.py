"""Runs side by side: the table, the summary others script against, and what cannot be compared."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic_run
from synthetic_run import INCREMENTS, Invented, make_run

from megalrps.errors import InputError
from megalrps.evaluation.compare import (
    Comparison,
    compared,
    increment_table,
    paid_until,
    paradigm_table,
    write_comparison,
)
from megalrps.evaluation.run_files import read_run

PARADIGMS = ("ptfs", "cpt", "lrps")


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    for paradigm in PARADIGMS:
        make_run(tmp_path / paradigm, paradigm)
    return compared([read_run(tmp_path / paradigm) for paradigm in PARADIGMS])


def test_the_table_holds_means_over_the_versions_own_increments_and_costs(comparison: Comparison) -> None:
    table = paradigm_table(comparison)
    assert table.header == ("paradigm", "v1", "v2", "v3", "steps", "tokens", "of ptfs")
    rows = {row[0].text: row for row in table.rows}
    assert [rows[name][4].text for name in PARADIGMS] == ["580", "300", "408"]
    assert [rows[name][6].text for name in PARADIGMS] == ["100.0 %", "51.7 %", "70.3 %"]
    release = comparison.release("cpt", "v2")
    mean = (release.perplexity["language"] + release.perplexity["library"]) / 2
    assert rows["cpt"][2].text == f"{mean:.2f}"


def test_the_best_is_marked_unless_all_are_equal(comparison: Comparison) -> None:
    marks = [[cell.best for cell in row[1:]] for row in increment_table(comparison, "v3").rows]
    assert marks == [[True, True, False], [False, False, False], [True, True, False]]


def test_a_version_is_paid_for_with_everything_up_to_its_release(comparison: Comparison) -> None:
    paid = {paradigm: paid_until(run) for paradigm, run in comparison.runs.items()}
    assert paid == {
        "ptfs": {"v1": 100, "v2": 280, "v3": 580},
        "cpt": {"v1": 100, "v2": 180, "v3": 300},
        "lrps": {"v1": 100, "v2": 240, "v3": 408},
    }


def test_page_drawings_and_summary_are_written_together(comparison: Comparison, tmp_path: Path) -> None:
    report = write_comparison(comparison, tmp_path / "all" / "report.html")
    names = sorted(path.name for path in (tmp_path / "all").iterdir())
    assert names == ["loss_by_cost.png", "perplexity_by_cost.png", "report.html", "summary.json"]
    summary = json.loads((tmp_path / "all" / "summary.json").read_text())
    assert summary == {name: json.loads((tmp_path / name / "summary.json").read_text()) for name in PARADIGMS}
    page = report.page.read_text()
    assert "<script" not in page
    assert page.count("<table>") == page.count("<caption>") == 4
    assert page.count('src="data:') == 2


def test_only_versions_that_all_runs_released_are_compared(tmp_path: Path, comparison: Comparison) -> None:
    lrps = comparison.runs["lrps"]
    assert lrps.summary is not None
    younger = replace(lrps, summary=replace(lrps.summary, releases=lrps.summary.releases[:2]))
    shorter = compared([comparison.runs["cpt"], younger])
    assert shorter.versions == ("v1", "v2")
    report = write_comparison(shorter, tmp_path / "all" / "report.html")
    assert report.warnings == ("lrps: summary.json tells of 2 of the plan's 3 versions.",)


def test_a_runs_own_summary_is_never_overwritten(comparison: Comparison, tmp_path: Path) -> None:
    before = (tmp_path / "lrps" / "summary.json").read_bytes()
    with pytest.raises(InputError, match="is a run's directory"):
        write_comparison(comparison, tmp_path / "lrps" / "report.html")
    assert (tmp_path / "lrps" / "summary.json").read_bytes() == before


def test_what_cannot_be_compared_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "lrps")
    make_run(tmp_path / "unfinished", "cpt", Invented(stop_after=50))
    make_run(tmp_path / "shorter", "cpt", Invented(increments=INCREMENTS[:2]))
    monkeypatch.setattr(synthetic_run, "TOKENS_PER_STEP", 99)
    make_run(tmp_path / "smaller", "cpt")
    lrps = read_run(tmp_path / "lrps")
    for others, complaint in (
        ([], "at least two runs"),
        (["lrps"], "two runs of one paradigm"),
        (["unfinished"], r"unfinished has no summary\.json yet"),
        (["shorter"], "different increments"),
        (["smaller"], "a step of lrps is 2048 tokens, one of smaller 99"),
    ):
        with pytest.raises(InputError, match=complaint):
            compared([lrps, *(read_run(tmp_path / name) for name in others)])
