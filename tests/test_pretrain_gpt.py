"""The entry as a user meets it: what a launch leaves, what a dry run tells, and torchrun."""

import json
import sys
from pathlib import Path

import pytest
from tiny_job import (
    Death,
    TinyData,
    checkpoints,
    command,
    entry_process,
    files_of,
    launch,
    launch_and_die,
    make_data,
    metrics,
    summary,
    tensors,
)

STEPS = (6, 7)  # forks at 2 and 9, releases at 6 and 13, 17 steps in all


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return make_data(tmp_path_factory.mktemp("data"), STEPS)


@pytest.fixture(scope="module")
def finished(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert launch(command(data, run)) == 0
    return run


# What a launch leaves


def test_a_launch_leaves_plan_metrics_releases_summary_and_report(finished: Path, data: TinyData):
    found = {entry.name for entry in finished.iterdir()}
    assert {"plan.json", "config.yaml", "metrics.jsonl", "summary.json", "report.html", "checkpoints"} <= found
    told = summary(finished)
    assert [(release["name"], release["path"], release["step"]) for release in told["releases"]] == [
        ("v1", "v1", 6),
        ("v2", "v2", 13),
    ]
    for release in told["releases"]:
        assert Path(release["checkpoint"]).is_dir()
        assert release["tokens"] == release["step"] * 8 * 16
        assert list(release["perplexity"]) == list(release["bits_per_byte"]) == ["a", "b"]
    assert told["cost_steps"] == len(metrics(finished)) == 17
    assert Path(told["report"]) == finished / "report.html"
    assert told["wall_seconds"] == pytest.approx(sum(line["seconds"] for line in metrics(finished)), abs=2e-3)
    first, second = (release["perplexity"]["a"] for release in told["releases"])
    assert 1 < second < first < 128, "a model that has learned beats a guess, and one that has learned more, the other"


def test_the_options_it_leaves_are_those_of_the_same_run(finished: Path, capsys: pytest.CaptureFixture[str]):
    before = (finished / "summary.json").read_bytes()
    assert launch(["--config", str(finished / "config.yaml")]) == 0
    assert "17 of 17 steps done" in capsys.readouterr().out
    assert (finished / "summary.json").read_bytes() == before


# What a dry run tells


def test_a_dry_run_tells_what_the_run_will_be_and_writes_nothing(
    finished: Path, data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data_before = files_of(Path(data.increments[0]).parent)
    assert launch(command(data, tmp_path / "run", "--dry-run", "--json")) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert err == "" and out.count("\n") == 1
    assert told["plan"] == json.loads((finished / "plan.json").read_text())
    assert told["cost_steps"] == told["cost_steps_by_paradigm"]["lrps"] == len(metrics(finished))
    assert told["cost_steps_by_paradigm"]["ptfs"] == 6 + 13 and told["cost_steps_by_paradigm"]["cpt"] == 13
    weights = [tensor for name, tensor in tensors(finished, "v1-00000006").items() if name.startswith("model.")]
    assert told["parameters"] == sum(weight.numel() for weight in weights) == summary(finished)["parameters"]
    (rank,) = told["ranks"]
    state = sum(rank["bytes"][part] for part in ("parameters", "gradients", "optimizer"))
    assert state == pytest.approx(16 * told["parameters"], rel=0.01) and state >= 16 * told["parameters"]
    assert rank["bytes_total"] == sum(rank["bytes"].values()) > state
    assert list(tmp_path.iterdir()) == [] and files_of(Path(data.increments[0]).parent) == data_before


def test_a_dry_run_needs_no_directory_and_touches_none(
    finished: Path, data: TinyData, capsys: pytest.CaptureFixture[str]
):
    arguments = command(data, finished, "--dry-run")
    before = files_of(finished)
    assert launch(arguments) == 0
    assert files_of(finished) == before
    place = arguments.index("--save")
    assert launch(arguments[:place] + arguments[place + 2 :]) == 0
    text = capsys.readouterr().out
    for part in ("num-layers: 2", "main", "v2", "17 steps", "GiB a rank"):
        assert part in text


def test_under_torchrun_a_dry_run_answers_once(
    data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    answers = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert launch(command(data, tmp_path / "run", "--dry-run", "--json")) == 0
        answers.append(capsys.readouterr().out)
    assert len(json.loads(answers[0])["ranks"]) == 2 and answers[1] == ""


def test_torchrun_goes_on_from_a_process_that_was_killed(data: TinyData, finished: Path, tmp_path: Path):
    run = tmp_path / "run"
    arguments = command(data, run, "--save-interval", "2")
    launch_and_die(arguments, Death("megalrps.training.loop.train_step", 6))  # the last but one update of v1
    assert checkpoints(run) == ("main-00000002", "v1-00000004")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    ended = entry_process(arguments, tmp_path, sys.executable, *torchrun)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("restored v1-00000004") == 1, "one rank speaks"
    assert "Traceback" not in ended.stderr and "Warning" not in ended.stderr
    lines, expected = metrics(run), metrics(finished)
    assert [(line["path"], line["step"]) for line in lines] == [(line["path"], line["step"]) for line in expected]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-5)
    for found, wanted in zip(summary(run)["releases"], summary(finished)["releases"], strict=True):
        assert found["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-5)
