"""What a person sees: the lines that were asked for, from one rank, and TensorBoard's files where they are wanted."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_job import TinyData, command, metrics, opened

from megalrps.errors import InputError
from megalrps.training import loop
from megalrps.training.console import Log, step_line
from megalrps.training.metrics import StepMetrics
from megalrps.training.options import LoggingOptions

LINE = StepMetrics("main", "v2", 12, 2.34567, 3e-4, 0.9, 1536, 96, 0.01, 12800.4)


def test_a_line_tells_path_step_loss_rate_and_speed():
    line = step_line(LINE, 130)
    for part in ("main -> v2", "step  12/130", "loss 2.3457", "grad norm 0.900", "lr 3.000e-04", "12,800 tokens/s"):
        assert part in line
    assert "MFU" not in line, "a peak that is not known must not be invented"
    assert "MFU 41.3%" in step_line(replace(LINE, mfu=0.4132), 130)


@pytest.mark.parametrize("interval", [1, 3, 100])
def test_lines_come_at_the_interval_and_at_the_end_of_a_segment(
    data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str], interval: int
):
    with opened(command(data.first(1), tmp_path / "run", "--log-interval", str(interval))) as run:
        loop.train(run)
    told = [int(step) for step in re.findall(r"step +(\d+)/", capsys.readouterr().out)]
    assert told == [step for step in range(1, 11) if step % interval == 0 or step in (4, 10)]
    assert len(metrics(tmp_path / "run")) == 10, "metrics.jsonl has every step, whatever is shown"


def test_only_the_first_rank_speaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = LoggingOptions(tensorboard_dir=str(tmp_path / "board"))
    with Log(options, speaks=False, total_steps=10, done_steps=0) as log:
        log.say("hello")
        log.step(LINE, 12)
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "board").exists()


def test_tensorboard_gets_every_step_of_every_path(data: TinyData, tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with opened(command(data.first(1), tmp_path / "run", "--tensorboard-dir", str(tmp_path / "board"))) as run:
        loop.train(run)
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    for path in ("main", "v1"):
        lines = [line for line in metrics(tmp_path / "run") if line["path"] == path]
        for name in ("loss", "lr", "grad_norm", "tokens_per_second"):
            shown = board.Scalars(f"{path}/{name}")
            assert [event.step for event in shown] == [line["step"] for line in lines]
            assert [event.value for event in shown] == pytest.approx([line[name] for line in lines], rel=1e-6)


def test_a_place_tensorboard_cannot_write_to_is_refused_by_its_flag(data: TinyData, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    flags = ("--tensorboard-dir", str(tmp_path / "file" / "board"))
    complaint = re.escape(f"--tensorboard-dir {flags[1]} cannot be written")
    with pytest.raises(InputError, match=complaint), opened(command(data.first(1), tmp_path / "run", *flags)):
        pass
