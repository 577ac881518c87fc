"""Found out before a step is spent: ranks of different jobs, increments and held-out parts that cannot be used."""

import resource
from pathlib import Path

import pytest
from tiny_job import (
    TinyData,
    command,
    launch,
    make_data,
    metrics,
    opened,
    summary,
    trained,
    world_of_harness,
    write_increment,
)

from megalrps.errors import EXIT_NO_SPACE, InputError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return make_data(tmp_path_factory.mktemp("data"), (6, 6))


def _open_with_own_options(rank: int, commands: list[list[str]]) -> tuple[str, str]:
    try:
        with opened(commands[rank], world_of_harness()):
            return "opened", ""
    except InputError as error:
        return type(error).__name__, str(error)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--lr", "2e-2"), "--lr: 0.01 and 0.02"),
        (("--seed", "7"), "--seed: 1234 and 7"),
        (("--save-interval", "3"), "--save-interval: 1000 and 3"),
    ],
)
def test_ranks_of_different_jobs_do_not_train_together(run_ranks, data: TinyData, tmp_path: Path, flags, named):
    run = tmp_path / "run"
    (kind, text), other = run_ranks(2, _open_with_own_options, [command(data, run), command(data, run, *flags)])
    assert (kind, other) == ("InputError", ("RepeatedError", text))
    assert "ranks 0 and 1" in text and named in text
    assert not run.exists()


def test_ranks_whose_data_differ_do_not_train_together(run_ranks, data: TinyData, tmp_path: Path):
    """The same names and sizes with other tokens, as an old copy on one node has them."""
    other = TinyData(
        (write_increment(tmp_path / "a.train", "a", 769, content="old"), *data.increments[1:]), data.held_out
    )
    run = tmp_path / "run"
    (kind, text), _ = run_ranks(2, _open_with_own_options, [command(data, run), command(other, run)])
    assert kind == "InputError" and "increment a" in text


def test_ranks_of_one_job_open(run_ranks, data: TinyData, tmp_path: Path):
    assert run_ranks(2, _open_with_own_options, [command(data, tmp_path / "run")] * 2) == [("opened", "")] * 2


def test_a_later_increment_without_a_sample_is_refused_before_the_first_is_trained(data: TinyData, tmp_path: Path):
    short = write_increment(tmp_path / "c.train", "c", 9)
    arguments = command(TinyData((*data.increments, short), ()), tmp_path / "run", "--increment-steps", "6", "6", "6")
    with pytest.raises(InputError, match="c has 9 tokens, not one sample"), opened(arguments):
        pass
    assert not (tmp_path / "run").exists()


def test_a_held_out_part_without_a_target_is_refused_before_training(data: TinyData, tmp_path: Path):
    lone = write_increment(tmp_path / "b.valid", "b", 1)
    arguments = command(TinyData(data.increments, (data.held_out[0], lone)), tmp_path / "run")
    with pytest.raises(InputError, match="too short to evaluate on"), opened(arguments):
        pass
    assert not (tmp_path / "run").exists()


def test_held_out_parts_in_another_order_are_refused(data: TinyData, tmp_path: Path):
    arguments = command(TinyData(data.increments, data.held_out[::-1]), tmp_path / "run")
    with pytest.raises(InputError, match="in the order of --increments"), opened(arguments):
        pass


def test_training_data_is_no_held_out_part(data: TinyData, tmp_path: Path):
    arguments = command(TinyData(data.increments, data.increments), tmp_path / "run")
    with pytest.raises(InputError, match="that is trained on"), opened(arguments):
        pass


@pytest.mark.parametrize("flags", [("--save-interval", "-1"), ("--save-keep", "0"), ("--seq-length", "100000")])
def test_a_dry_run_refuses_what_the_launch_would(data: TinyData, tmp_path: Path, flags, capfd):
    run = tmp_path / "run"
    assert launch(command(data, run, *flags, "--dry-run")) == 2
    told = capfd.readouterr().err
    assert launch(command(data, run, *flags)) == 2
    assert capfd.readouterr().err == told and not run.exists()


def test_a_dry_run_refuses_another_runs_directory(data: TinyData, tmp_path: Path, capfd):
    run = trained(command(data, tmp_path / "run"))
    assert launch(command(data, run, "--lr", "5e-3", "--dry-run")) == 2
    assert "--lr was 0.01 and is 0.005" in capfd.readouterr().err
    assert launch(command(data, run, "--dry-run")) == 0


def test_a_run_without_its_plan_file_is_still_a_run(data: TinyData, tmp_path: Path):
    run = trained(command(data, tmp_path / "run"))
    before, lines = summary(run), metrics(run)
    (run / "plan.json").unlink()
    trained(command(data, run))
    assert (run / "plan.json").exists() and summary(run) == before and metrics(run) == lines


def test_a_finished_run_that_lost_its_metrics_keeps_its_results(data: TinyData, tmp_path: Path, capfd):
    run = trained(command(data, tmp_path / "run"))
    before = summary(run)
    (run / "metrics.jsonl").unlink()
    assert launch(command(data, run)) == 0
    assert "no report" in capfd.readouterr().out and summary(run) == before


def test_a_full_disk_is_one_line_and_loses_nothing(data: TinyData, tmp_path: Path, capfd):
    """A file size limit stands for the disk: the run goes on, once there is room, to the same releases."""
    run, whole = tmp_path / "run", trained(command(data, tmp_path / "whole"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        status = launch(command(data, run))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told = capfd.readouterr().err
    assert status == EXIT_NO_SPACE and told.count("\n") == 1 and "File too large" in told and "start again" in told
    assert launch(command(data, run)) == 0
    assert summary(run)["releases"][1]["perplexity"] == summary(whole)["releases"][1]["perplexity"]


def test_the_log_says_when_an_increment_is_gone_over_again(data: TinyData, tmp_path: Path, capfd):
    arguments = command(data, tmp_path / "run", "--dry-run")
    launch(arguments)
    assert "a (6 steps), b (6 steps)" in capfd.readouterr().out
    launch([*arguments, "--increment-steps", "6", "15"])
    assert "a (6 steps), b (15 steps, 2.50 passes)" in capfd.readouterr().out
