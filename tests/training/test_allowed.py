"""--allow: a change of the result, with a reason, is made and recorded; what is trained stays; the rest is refused."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import pytest
from tiny_job import TinyData, checkpoints, command, files_of, launch, metrics, opened, tokens_of, write_increment

from megalrps import __version__
from megalrps.checkpoint.lineage import read_lineage
from megalrps.checkpoint.record import CheckpointRecord
from megalrps.config import Config, parse_config
from megalrps.errors import EXIT_PREEMPTED
from megalrps.evaluation import report
from megalrps.training.continuation import differences_in_rounding
from megalrps.training.decisive import CHANGEABLE, FIXED, FREE, OF_THE_CURVES, ONLY_WITH_FP16, ROUNDING
from megalrps.training.prepare import prepare

WRITE_REPORT = report.write_report  # before the tests of this folder leave it out
MAXIMUM, MINIMUM = 1e-2, 1e-3


def records(run: Path) -> dict[str, CheckpointRecord]:
    return dict(read_lineage(run / "checkpoints").records)


@pytest.fixture(scope="module")
def begun(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over two increments that was left at step 12 of the main path: main 4 and 12, v1 6 and 10."""
    run = tmp_path_factory.mktemp("begun") / "run"
    arguments = command(data.first(2), run, "--save-interval", "6", "--exit-interval", "12")
    assert launch(arguments) == EXIT_PREEMPTED
    assert checkpoints(run) == ("main-00000004", "main-00000006", "main-00000012", "v1-00000006", "v1-00000010")
    return run


def copy_of(run: Path, place: Path) -> Path:
    for name, (_, content) in files_of(run).items():
        file = place / "run" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if (run / name).is_file():
            file.write_bytes(content)
        else:
            file.mkdir(exist_ok=True)
    return place / "run"


def rates(run: Path, path: str, after: int) -> list[float]:
    return [line["lr"] for line in metrics(run) if line["path"] == path and line["step"] > after]


def planned_rates(arguments: Sequence[str], path: str, after: int) -> list[float]:
    curve = prepare(parse_config(arguments), 1).plan.path(path)
    return [curve.curve(step) for step in range(max(after, curve.start) + 1, curve.end + 1)]


def test_every_option_stands_in_one_table():
    """Who adds an option decides what it does to a run that goes on: megalrps/training/decisive.py."""
    tables = [set(FIXED), set(CHANGEABLE), set(ROUNDING), set(FREE)]
    names = {option for body in Config().to_json().values() for option in body}
    assert set.union(*tables) == names
    assert sum(map(len, tables)) == len(names), "an option stands in two tables"
    assert set(OF_THE_CURVES) <= CHANGEABLE and CHANGEABLE | set(FIXED) >= ONLY_WITH_FP16
    assert {each.name for each in fields(Config().plan)} == set(OF_THE_CURVES) | (set(FIXED) & {*vars(Config().plan)})


def test_a_change_that_is_allowed_counts_from_the_newest_checkpoint_on(
    data: TinyData, begun: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    run = copy_of(begun, tmp_path)
    before, kept = metrics(run), files_of(run / "checkpoints")
    changed = command(data.first(2), run, "--lr", "2e-2", "--clip-grad", "0.5", "--save-keep", "9")
    reasons = ("--allow", "lr=it was too slow", "clip-grad = spikes = bad")
    assert launch([*changed, *reasons]) == 0
    told = capfd.readouterr().out
    assert "allowed: --lr was 0.01 and is 0.02 (it was too slow)" in told
    assert "restored main-00000012" in told
    after = files_of(run / "checkpoints")
    assert {name: after[name] for name in kept if "/" in name} == {name: kept[name] for name in kept if "/" in name}
    assert metrics(run)[: len(before)] == before, "what was trained is trained again"
    assert rates(run, "main", 12) == planned_rates(changed, "main", 12) == [2e-2]
    assert rates(run, "v2", 0) == planned_rates(changed, "v2", 13)
    allowed = {
        "lr": {"was": MAXIMUM, "is": 2e-2, "reason": "it was too slow"},
        "clip-grad": {"was": 1.0, "is": 0.5, "reason": "spikes = bad"},
    }
    found = {name: dict(record.allowed) for name, record in records(run).items()}
    assert found == {name: allowed if name[:2] == "v2" or name[-2:] == "13" else {} for name in checkpoints(run)}
    for name, record in records(run).items():
        assert record.config["plan"]["lr"] == (2e-2 if found[name] else MAXIMUM)

    assert launch(changed) == 0, "the lineage itself says that it is allowed"
    assert launch([*changed, *reasons]) == 0, "the very same launch, as a batch system repeats it"
    old = command(data.first(2), run)
    capfd.readouterr()
    assert launch(old) == 2, "the old options are not the lineage's any more"
    error = capfd.readouterr().err
    assert "--lr was 0.02 and is 0.01" in error and "--clip-grad was 0.5 and is 1.0" in error

    longer = command(data, run, "--clip-grad", "0.5", "--lr", "3e-2", "--allow", "lr=third try")
    assert launch(longer) == 0
    third = records(run)["v3-00000028"].allowed
    assert third["clip-grad"] == allowed["clip-grad"]
    assert third["lr"] == {"was": 2e-2, "is": 3e-2, "reason": "third try", "earlier": [allowed["lr"]]}
    assert launch(command(data, run, "--clip-grad", "0.5", "--lr", "2e-2")) == 2, "an earlier decision does not count"
    assert rates(run, "main", 13) == [3e-2] * 9


def test_reports_and_tools_read_a_run_with_allowed_changes(
    data: TinyData, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(report, "write_report", WRITE_REPORT)
    run = copy_of(begun, tmp_path)
    flags = ("--lr-decay-style", "knee", "--min-lr", "2e-3", "--allow", "lr-decay-style=a", "min-lr=b")
    assert launch(command(data.first(2), run, *flags)) == 0
    assert "no report" not in capfd.readouterr().out
    assert (run / "report.html").stat().st_size > 10_000
    assert rates(run, "v1", 0)[-1] == MINIMUM and rates(run, "v2", 0)[-1] == 2e-3


def test_a_branch_in_the_middle_of_its_decay_goes_on_with_the_new_one(data: TinyData, tmp_path: Path):
    run = tmp_path / "run"
    assert launch(command(data.first(1), run, "--exit-interval", "8")) == EXIT_PREEMPTED
    changed = command(data.first(1), run, "--min-lr", "0", "--lr-decay-style", "linear")
    assert launch([*changed, "--allow", "min-lr=zero", "lr-decay-style=linear"]) == 0
    old = planned_rates(command(data.first(1), run), "v1", 4)[:4]
    assert rates(run, "v1", 0) == old + planned_rates(changed, "v1", 8) and rates(run, "v1", 0)[-1] == 0.0
    assert [(line["path"], line["step"]) for line in metrics(run)] == [
        *(("main", step) for step in range(1, 5)),
        *(("v1", step) for step in range(5, 11)),
    ]
    assert records(run)["main-00000004"].allowed == {}, "the main path does not decay: it was not changed"


def test_other_content_of_an_increment_is_allowed_by_its_name(data: TinyData, begun: Path, tmp_path: Path):
    run = copy_of(begun, tmp_path)
    other = write_increment(tmp_path / "b.train", "b", tokens_of(8), content="other")
    changed = command(TinyData((data.increments[0], other), data.held_out[:2]), run)
    assert launch(changed) == 2
    assert launch([*changed, "--allow", "data.b=a licence was withdrawn"]) == 0
    decision = records(run)["v2-00000018"].allowed["data.b"]
    assert decision["reason"] == "a licence was withdrawn"
    assert decision["was"] == records(begun)["main-00000012"].data["b"] != decision["is"]
    assert launch(changed) == 0
    shorter = write_increment(tmp_path / "short" / "b.train", "b", tokens_of(7), content="other")
    arguments = command(TinyData((data.increments[0], shorter), data.held_out[:2]), run, "--allow", "data.b=shorter")
    assert launch(arguments) == 2, "samples are counted in it: it must have as many steps"


REFUSED = {
    "no reason": (("lr",), "--allow 'lr': say what is changed, and why"),
    "an empty reason": (("lr= ",), "--allow 'lr= ': say what is changed, and why"),
    "no change": (("=because",), "--allow '=because': say what is changed"),
    "twice": (("lr=a", "lr=b"), "--allow lr is given twice"),
    "unknown": (("lrr=a",), "--allow lrr is unknown: did you mean lr?"),
    "with dashes": (("--lr=a",), "unknown"),
    "unknown increment": (("data.c=a",), "--allow data.c is unknown: did you mean data."),
    "nothing needs it": (("min-lr=a",), "--allow min-lr: nothing that {run} holds was trained with another value"),
    "may change anyway": (("save-interval=a",), "--allow save-interval is not needed"),
    "rounding": (("attention-backend=a",), "--allow attention-backend is not needed"),
    "shape": (("hidden-size=a",), "--allow hidden-size is not possible: it is the shape of the weights"),
    "batch": (("global-batch-size=a",), "--allow global-batch-size is not possible: the position of every sample"),
    "length": (("seq-length=a",), "--allow seq-length is not possible: the position of every sample"),
    "seed": (("seed=a",), "--allow seed is not possible: the order of the samples"),
    "alpha": (("alpha=a",), "--allow alpha is not possible: it says at which steps"),
    "paradigm": (("paradigm=a",), "--allow paradigm is not possible: it says at which steps"),
    "order": (("increments=a",), "--allow increments is not possible: increments that were trained on stay"),
    "moments": (("exp-avg-dtype=a",), "--allow exp-avg-dtype is not possible: the checkpoints hold the moments"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_allowed_is_refused_with_the_reason(
    data: TinyData, begun: Path, capfd: pytest.CaptureFixture[str], case: str
):
    texts, complaint = REFUSED[case]
    before = files_of(begun)
    arguments = [f"--allow={texts[0]}"] if texts[0].startswith("-") else ["--allow", *texts]
    assert launch(command(data.first(2), begun, *arguments)) == 2
    error = capfd.readouterr().err
    assert complaint.format(run=begun) in error
    assert case == "with dashes" or error.count("\n") == 1
    assert files_of(begun) == before


def test_one_reason_does_not_cover_another_change(data: TinyData, begun: Path, capfd: pytest.CaptureFixture[str]):
    flags = ("--lr", "2e-2", "--weight-decay", "0.2", "--allow", "lr=a")
    assert launch(command(data.first(2), begun, *flags)) == 2
    assert "main-00000004, trained with other options: --weight-decay was 0.1 and is 0.2. " in capfd.readouterr().err
    assert launch(command(data.first(2), begun, "--lr", "2e-2", "--seq-length", "8", "--allow", "lr=a")) == 2
    assert "--seq-length was 16 and is 8. Give the old options to go on, or name" in capfd.readouterr().err


def test_a_loss_scale_is_not_taken_up_by_a_run_without_one(
    data: TinyData, begun: Path, capfd: pytest.CaptureFixture[str]
):
    assert launch(command(data.first(2), begun, "--fp16", "--allow", "fp16=why not")) == 2
    assert "--fp16 was False and is True. Give the old options to go on, or name" in capfd.readouterr().err
    with opened(command(data.first(2), begun, "--hysteresis", "3")) as run:
        assert run.allowed == {}, "an option of fp16 alone changes nothing here"


def test_the_log_says_what_may_change_the_last_bits(data: TinyData, begun: Path):
    job = prepare(parse_config(command(data.first(2), begun, "--micro-batch-size", "4")), 1)
    made_by, now = {"torch": "2.11.0", "megalrps": __version__}, {"torch": "2.13.0", "megalrps": __version__}
    record = records(begun)["main-00000012"]
    told = differences_in_rounding(record, made_by, job, now)
    assert told == ["--micro-batch-size was unset and is 4", "torch was 2.11.0 and is 2.13.0"]
    with opened(command(data.first(2), begun)) as run:
        assert differences_in_rounding(record, now, run.job, now) == []
