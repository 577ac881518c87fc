"""--load, and what a launch does where something of a run is missing: it never begins again because of that."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_job import TinyData, checkpoints, command, files_of, launch, metrics, opened

from megalrps.errors import EXIT_DAMAGED, EXIT_LOST, EXIT_PREEMPTED, InputError


@pytest.fixture(scope="module")
def left(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was left after three steps, before its first fork: one periodic checkpoint, main-00000003."""
    run = tmp_path_factory.mktemp("left") / "run"
    assert launch(command(data.first(1), run, "--exit-interval", "3")) == EXIT_PREEMPTED
    assert checkpoints(run) == ("main-00000003",)
    return run


@pytest.fixture
def run(left: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(left, tmp_path / "run"))


def open_only(data: TinyData, run: Path, load: str) -> int:
    """Open the run, train nothing; the step that its newest checkpoint holds."""
    with opened(command(data.first(1), run, "--load", load)) as held:
        return max((record.step for record in held.lineage.records.values()), default=0)


def without_a_trace(run: Path) -> None:
    shutil.rmtree(run)


def empty(run: Path) -> None:
    without_a_trace(run)
    run.mkdir()


def with_empty_folders(run: Path) -> None:
    """What a launch leaves that died before its first checkpoint."""
    without_a_trace(run)
    for folder in ("checkpoints", "evaluations", "lineage/heads", "lineage/forks", "lineage/leases"):
        (run / folder).mkdir(parents=True)
    (run / "lineage" / "lock").touch()


def with_its_plan_alone(run: Path) -> None:
    plan = (run / "plan.json").read_bytes()
    with_empty_folders(run)
    (run / "plan.json").write_bytes(plan)


BEFORE_A_RUN = (without_a_trace, empty, with_empty_folders, with_its_plan_alone)


@pytest.mark.parametrize("make", BEFORE_A_RUN, ids=lambda make: make.__name__)
def test_where_no_run_has_begun_only_required_refuses(
    data: TinyData, run: Path, capfd: pytest.CaptureFixture[str], make: Callable[[Path], None]
):
    make(run)
    before = files_of(run) if run.exists() else None
    assert launch(command(data.first(1), run, "--load", "required")) == 2
    assert f"--load required: --save {run} holds no checkpoint" in capfd.readouterr().err
    assert (files_of(run) if run.exists() else None) == before
    assert open_only(data, run, "auto") == 0
    assert open_only(data, run, "none") == 0


def test_a_run_is_gone_on_with_unless_none_is_asked_for(data: TinyData, run: Path, capfd: pytest.CaptureFixture[str]):
    before = files_of(run)
    assert launch(command(data.first(1), run, "--load", "none")) == 2
    assert f"--load none: --save {run} holds 1 checkpoints; name a new directory" in capfd.readouterr().err
    assert files_of(run) == before
    assert open_only(data, run, "auto") == open_only(data, run, "required") == 3


def test_a_run_without_plan_and_metrics_is_a_run(data: TinyData, run: Path):
    for name in ("plan.json", "metrics.jsonl", "config.yaml"):
        (run / name).unlink()
    with pytest.raises(InputError, match="--load none"):
        open_only(data, run, "none")
    assert open_only(data, run, "required") == 3


def without_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "main-00000003")


def without_their_folder_and_the_plan(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "plan.json").unlink()
    (run / "metrics.jsonl").unlink()
    (run / "config.yaml").unlink()


def with_a_damaged_head_alone(run: Path) -> None:
    without_checkpoints(run)
    (run / "lineage" / "heads" / "main.json").write_text("{}")


LOST = (without_checkpoints, without_their_folder_and_the_plan, with_a_damaged_head_alone)


@pytest.mark.parametrize("lose", LOST, ids=lambda lose: lose.__name__)
@pytest.mark.parametrize("load", ["auto", "required", "none"])
def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(
    data: TinyData, run: Path, capfd: pytest.CaptureFixture[str], lose: Callable[[Path], None], load: str
):
    lose(run)
    before = files_of(run)
    assert launch(command(data.first(1), run, "--load", load)) == (2 if load == "none" else EXIT_LOST)
    error = capfd.readouterr().err
    assert "heads/main" in error and error.count("\n") == 1
    assert files_of(run) == before
    assert launch(command(data.first(1), run, "--load", load, "--dry-run")) == (2 if load == "none" else EXIT_LOST)


def test_a_path_whose_only_checkpoint_is_damaged_is_not_begun_again(
    data: TinyData, run: Path, capfd: pytest.CaptureFixture[str]
):
    manifest = run / "checkpoints" / "main-00000003" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-1])
    for _ in range(2):  # however often it is tried
        assert launch(command(data.first(1), run)) == EXIT_DAMAGED
        error = capfd.readouterr().err
        assert "manifest.json" in error and "Path main has no other checkpoint" in error
    shutil.rmtree(manifest.parent)  # as the message says
    assert launch(command(data.first(1), run)) == 0
    assert [line["step"] for line in metrics(run) if line["path"] == "main"] == [1, 2, 3, 4]


def test_a_head_that_is_lost_is_told_though_older_checkpoints_are_there(
    data: TinyData, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    assert launch(command(data.first(1), run, "--save-interval", "2", "--exit-interval", "8")) == EXIT_PREEMPTED
    shutil.rmtree(run / "checkpoints" / "v1-00000008")
    before = files_of(run / "checkpoints")
    assert launch(command(data.first(1), run)) == EXIT_LOST
    assert "heads/v1 points to v1-00000008, which is not there" in capfd.readouterr().err
    assert files_of(run / "checkpoints") == before
