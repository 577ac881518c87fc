"""A run read back: what its files say together, and what is refused because they do not belong together."""

import json
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import INCREMENTS, TOKENS_PER_STEP, Invented, make_run

from megalrps.errors import InputError
from megalrps.evaluation.run_files import read_run


def test_a_finished_run_is_read_whole(tmp_path: Path) -> None:
    plan = make_run(tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert run.name == "run"
    assert run.plan == plan
    assert run.trained_steps == run.planned_steps == 408
    assert run.tokens_per_step == TOKENS_PER_STEP
    assert run.reached == {"main": 228, "v1": 100, "v2": 180, "v3": 300}
    assert run.held_out == ("language", "library", "tests")
    assert run.alpha == (0.6,)
    assert run.largest_lr_difference() == 0


def test_an_unfinished_run_has_no_summary_and_unbegun_paths(tmp_path: Path) -> None:
    make_run(tmp_path / "run", invented=Invented(stop_after=120))
    run = read_run(tmp_path / "run")
    assert run.summary is None
    assert run.reached == {"main": 60, "v1": 100, "v2": 132, "v3": 228}
    assert set(run.smoothed_traces) == {"main", "v1"}


@pytest.mark.parametrize("paradigm", ["lrps", "cpt", "ptfs"])
def test_a_trajectory_is_gapless_from_step_one(tmp_path: Path, paradigm: str) -> None:
    plan = make_run(tmp_path / "run", paradigm)
    run = read_run(tmp_path / "run")
    for path in plan.paths:
        whole = run.inherited(path.name).then(run.traces[path.name])
        assert whole.steps.tolist() == list(range(1, path.end + 1))


def test_the_average_of_a_branch_goes_on_from_its_parents(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    run = read_run(tmp_path / "run")
    branch, main = run.smoothed_traces["v2"], run.smoothed_traces["main"]
    assert branch.steps[0] == 132
    assert branch.loss[0] == main.loss[main.steps == 132]


@pytest.mark.parametrize("paradigm", ["lrps", "cpt", "ptfs"])
def test_a_version_was_trained_on_all_increments_up_to_its_own(tmp_path: Path, paradigm: str) -> None:
    make_run(tmp_path / "run", paradigm)
    assert read_run(tmp_path / "run").trained_on == {
        "v1": ("language",),
        "v2": ("language", "library"),
        "v3": ("language", "library", "tests"),
    }


def rewrite_metrics(run: Path, number: int, **changes: object) -> None:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines()
    lines[number] = json.dumps(json.loads(lines[number]) | changes)
    file.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"path": "other"}, "path 'other', which plan.json does not have"),
        ({"step": 301}, "step 301 of path 'v3', which trains steps 229 to 300"),
        ({"step": 0}, "step 0 of path 'v3', which trains steps 229 to 300"),
        ({"tokens": 5}, "5 tokens at step 300 of path 'v3'"),
    ],
)
def test_metrics_of_another_run_are_refused(tmp_path: Path, changes: dict[str, object], complaint: str) -> None:
    make_run(tmp_path / "run")
    rewrite_metrics(tmp_path / "run", -1, **changes)
    with pytest.raises(InputError, match=complaint):
        read_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("paradigm", "increments", "complaint"),
    [("cpt", 3, "paradigm 'lrps', where plan.json says 'cpt'"), ("lrps", 2, "'v3' at step 300 of path 'v3' is not in")],
)
def test_a_summary_of_another_run_is_refused(tmp_path: Path, paradigm: str, increments: int, complaint: str) -> None:
    make_run(tmp_path / "other")
    make_run(tmp_path / "run", paradigm, Invented(increments=INCREMENTS[:increments]))
    (tmp_path / "other" / "summary.json").replace(tmp_path / "run" / "summary.json")
    with pytest.raises(InputError, match=complaint):
        read_run(tmp_path / "run")


@pytest.mark.parametrize("file", ["plan.json", "metrics.jsonl"])
def test_a_missing_file_is_named(tmp_path: Path, file: str) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "run" / file).unlink()
    with pytest.raises(InputError, match=rf"{file}: no such file; hand the directory of a run"):
        read_run(tmp_path / "run")


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        read_run(tmp_path / "run")


@pytest.mark.parametrize(
    "content", ["plan: {alpha: [2.0]}", "plan: {alpha: [yes please]}", "plan: {alpha: []}", "a: ["]
)
def test_options_that_were_changed_by_hand_are_refused(tmp_path: Path, content: str) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(content)
    with pytest.raises(InputError, match=r"config\.yaml: .*; restore the file"):
        read_run(tmp_path / "run")


def test_a_rate_that_differs_from_the_plans_is_measured(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    rewrite_metrics(tmp_path / "run", 50, lr=0.0)
    run = read_run(tmp_path / "run")
    record = run.metrics.records[50]
    assert run.largest_lr_difference() == pytest.approx(run.plan.path(record.path).curve(record.step) / 3e-3)
    assert np.isfinite(run.largest_lr_difference())
