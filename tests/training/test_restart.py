"""A run that is killed at any moment and started again ends as if nothing had happened to it.

Deaths within an update, of one rank and of one of two, are in tests/faults/test_killed_training.py.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_job import (
    Death,
    TinyData,
    checkpoints,
    command,
    differing,
    files_of,
    launch,
    launch_and_die,
    metrics,
    opened,
    results,
    summary,
    tensors,
    trained,
)

from megalrps.checkpoint.references import References
from megalrps.checkpoint.storage import CheckpointWriter
from megalrps.errors import EXIT_DAMAGED, EXIT_LOST
from megalrps.training import loop
from megalrps.training.metrics import MetricsFile

UPDATE = "megalrps.training.loop.train_step"
COMMIT = "megalrps.training.run.Run.commit"
SAVE = "megalrps.checkpoint.store.Store.save"
EVALUATION = "megalrps.evaluation.releases"

# The undisturbed run commits main 3 and 4 (the fork), v1 6, 9 and 10 (the release), main 6, 9, 12 and 13, v2 15, ...
DEATHS = {
    "before anything is written": Death("megalrps.training.opening.write_json"),
    "between the lines and the first checkpoint": Death(SAVE),
    "after a fork point": Death(COMMIT, 2, after=True),
    "after a release": Death(COMMIT, 5, after=True),
    "before an old checkpoint is removed": Death("megalrps.training.run.prune"),
    "in the middle of an evaluation": Death(f"{EVALUATION}.write_json", 2),
    "before the summary": Death(f"{EVALUATION}.write_summary"),
    "before the report": Death("megalrps.evaluation.report.write_report"),
}


@pytest.fixture(scope="module")
def data(data: TinyData) -> TinyData:
    """Two increments: forks at 4 and 13, releases at 10 and 18, 24 steps in all."""
    return data.first(2)


@pytest.fixture(scope="module")
def undisturbed(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nothing has disturbed, saved every third step; not to be written to."""
    return trained(saved_often(data, tmp_path_factory.mktemp("undisturbed") / "run"))


def saved_often(data: TinyData, run: Path, *flags: str) -> list[str]:
    """The command line of the undisturbed run, in another directory."""
    return command(data, run, "--save-interval", "3", *flags)


def check_undisturbed(run: Path, undisturbed: Path) -> None:
    assert results(run) == results(undisturbed)
    for name in checkpoints(undisturbed):
        assert differing(tensors(run, name), tensors(undisturbed, name)) == [], name


@pytest.mark.parametrize("death", DEATHS)
def test_a_killed_run_started_again_ends_as_if_undisturbed(
    data: TinyData, undisturbed: Path, tmp_path: Path, death: str
):
    arguments = saved_often(data, tmp_path / "run")
    launch_and_die(arguments, DEATHS[death])
    assert launch(arguments) == 0
    check_undisturbed(tmp_path / "run", undisturbed)


def test_a_run_that_dies_every_seven_updates_ends_as_if_undisturbed(data: TinyData, undisturbed: Path, tmp_path: Path):
    arguments = saved_often(data, tmp_path / "run")
    for _ in range(3):
        launch_and_die(arguments, Death(UPDATE, 7))
    assert launch(arguments) == 0
    check_undisturbed(tmp_path / "run", undisturbed)


def test_half_a_line_of_metrics_is_written_anew(data: TinyData, undisturbed: Path, tmp_path: Path):
    arguments, file = saved_often(data, tmp_path / "run"), tmp_path / "run" / "metrics.jsonl"
    launch_and_die(arguments, Death(UPDATE, 9))
    file.write_bytes(file.read_bytes()[:-20])
    assert launch(arguments) == 0
    check_undisturbed(tmp_path / "run", undisturbed)


def test_a_branch_that_resets_the_moments_does_so_once(data: TinyData, tmp_path: Path):
    whole, killed = (saved_often(data, tmp_path / name, "--branch-optimizer", "reset") for name in ("whole", "killed"))
    assert launch(whole) == 0
    launch_and_die(killed, Death(UPDATE, 9))
    assert launch(killed) == 0
    check_undisturbed(tmp_path / "killed", tmp_path / "whole")


def test_without_checkpoints_in_between_it_goes_on_from_the_fork(data: TinyData, undisturbed: Path, tmp_path: Path):
    arguments = command(data, tmp_path / "run")
    launch_and_die(arguments, Death(UPDATE, 9))
    assert checkpoints(tmp_path / "run") == ("main-00000004",)
    assert launch(arguments) == 0
    for name in ("main-00000013", "v1-00000010", "v2-00000018"):
        assert differing(tensors(tmp_path / "run", name), tensors(undisturbed, name)) == []
    assert results(tmp_path / "run")["metrics"] == results(undisturbed)["metrics"]


def test_the_seconds_of_killed_launches_that_a_checkpoint_covers_are_counted(data: TinyData, tmp_path: Path):
    arguments = saved_often(data.first(1), tmp_path / "run")
    launch_and_die(arguments, Death(UPDATE, 9))
    assert launch(arguments) == 0
    seconds = sum(line["seconds"] for line in metrics(tmp_path / "run"))
    assert summary(tmp_path / "run")["wall_seconds"] == pytest.approx(seconds, abs=2e-3)


def test_a_finished_run_started_again_trains_nothing_and_touches_no_result(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "run"
    arguments = saved_often(data, run)
    assert launch(arguments) == 0
    before = files_of(run)
    monkeypatch.setattr(loop, "train_step", lambda *_, **__: pytest.fail("an update was made again"))
    assert launch(arguments) == 0
    after = files_of(run)
    kept = [name for name in before if name.startswith(("checkpoints", "evaluations"))]
    assert len(kept) > 10 and all(after[name] == before[name] for name in kept)
    assert after.keys() == before.keys()
    for name in ("summary.json", "metrics.jsonl", "plan.json", "config.yaml"):
        assert after[name][1] == before[name][1], name


def flip(file: Path) -> None:
    """Change one byte in the middle of ``file``."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damaged", "used"), [("manifest.json", 1, "v1-00000006"), ("rank-00000.bin", 2, "main-00000004")]
)
def test_damaged_checkpoints_are_set_aside_and_an_older_one_is_used(
    data: TinyData,
    undisturbed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    damaged: int,
    used: str,
):
    run = tmp_path / "run"
    launch_and_die(saved_often(data, run), Death(SAVE, 5))  # at the end of v1, whose step 10 is lost
    for name in ("v1-00000009", "v1-00000006")[:damaged]:
        flip(run / "checkpoints" / name / file)
    assert launch(saved_often(data, run)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "v1-00000009" in said and file in said, "the log must name the damaged file"
    assert f"restored {used}" in said
    aside = [entry for entry in (run / "checkpoints").iterdir() if entry.name.startswith(".")]
    assert len(aside) == damaged and all(entry.name.endswith(".refused") for entry in aside)
    for name in checkpoints(undisturbed):
        assert differing(tensors(run, name), tensors(undisturbed, name)) == [], name
    assert results(run)["metrics"] == results(undisturbed)["metrics"]
    assert results(run)["summary"] == results(undisturbed)["summary"]


def test_a_damaged_fork_point_stops_the_run_with_its_name(
    data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    launch_and_die(command(data, run), Death(UPDATE, 5))
    flip(run / "checkpoints" / "main-00000004" / "rank-00000.bin")
    assert launch(command(data, run)) == EXIT_DAMAGED
    error = capsys.readouterr().err
    assert error.startswith("pretrain_gpt.py: error: ") and "main-00000004" in error


def test_a_fork_point_that_was_removed_and_given_up_is_made_again_and_nothing_else(
    data: TinyData, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run, lost = tmp_path / "run", "main-00000013"
    with opened(command(data, run)) as held:
        loop.train(held)
    shutil.rmtree(run / "checkpoints" / lost)
    kept = files_of(run)
    assert launch(command(data, run)) == EXIT_LOST, "it was acknowledged: a person decides"
    assert f"forks/{lost} points to {lost}, which is not there" in capsys.readouterr().err
    assert {name: files_of(run)[name] for name in kept if name.startswith("checkpoints/")} == {
        name: kept[name] for name in kept if name.startswith("checkpoints/")
    }
    with References(run / "lineage").locked() as locked:  # what tools/lineage.py forget does
        locked.drop("forks", lost, expected=lost)
        locked.drop("heads", "main", expected=lost)
    with opened(command(data, run)) as held:
        loop.train(held)
    assert differing(tensors(run, lost), tensors(undisturbed, lost)) == []
    after = files_of(run / "checkpoints")
    assert {f"checkpoints/{name}": after[name] for name in after if not name.startswith(lost)} == {
        name: kept[name] for name in kept if name.startswith("checkpoints/")
    }
    steps = [(line["path"], line["step"]) for line in metrics(run)]
    assert len(set(steps)) == len(steps) == 24
    assert steps[-9:] == [("main", step) for step in range(5, 14)], "in the order of execution"


def test_the_lines_are_on_the_disk_before_the_checkpoint_that_covers_them(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    order: list[str] = []
    for owner, name in ((MetricsFile, "write"), (MetricsFile, "sync"), (CheckpointWriter, "_commit")):
        original = getattr(owner, name)

        def noting(*args: Any, original: Any = original, name: str = name) -> Any:
            order.append(name)
            return original(*args)

        monkeypatch.setattr(owner, name, noting)
    with opened(saved_often(data.first(1), tmp_path / "run")) as run:
        loop.train(run)
    saves = [place for place, name in enumerate(order) if name == "_commit"]
    assert len(saves) == 5 and all(order[place - 1] == "sync" for place in saves)
