"""run_state.json tells how the launch that holds the paths stands, and how it ended."""

import errno
import json
import os
import signal
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_job import TinyData, command, files_of, launch, opened

from megalrps.checkpoint.leases import Leases
from megalrps.checkpoint.names import checkpoint_name
from megalrps.errors import EXIT_HELD, EXIT_NO_SPACE, EXIT_PREEMPTED, InputError, PreemptedError
from megalrps.training import loop, opening
from megalrps.training.loop import Loop

ENDS = {
    "well": (None, "finished", 0, None),
    "asked": (PreemptedError("stopped", "SIGUSR1"), "preempted", EXIT_PREEMPTED, "SIGUSR1"),
    "told": (InputError("--lr is wrong"), "failed", 2, None),
    "defect": (ZeroDivisionError("ours"), "failed", 1, None),
    "full": (OSError(errno.ENOSPC, "No space left"), "failed", EXIT_NO_SPACE, None),
    "interrupted": (KeyboardInterrupt(), "failed", 130, None),
}


def state_of(run: Path) -> dict:
    return json.loads((run / "run_state.json").read_text())


@pytest.mark.parametrize("end", ENDS)
def test_the_end_of_a_launch_is_told(data: TinyData, tmp_path: Path, end: str):
    error, state, status, reason = ENDS[end]
    try:
        with opened(command(data, tmp_path / "run")) as run:
            running = state_of(tmp_path / "run")
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error
    told = state_of(tmp_path / "run")
    assert (running["state"], running["exit_status"]) == ("running", None)
    assert (told["state"], told["exit_status"], told["reason"]) == (state, status, reason)
    assert error is None or str(error) in told["message"] or type(error).__name__ in told["message"]
    for name, value in (("pid", os.getpid()), ("host", socket.gethostname()), ("world_size", 1)):
        assert running[name] == told[name] == value
    assert told["launch"] == running["launch"] and len(told["launch"]) == 16
    assert run.paths == set(told["paths"])


def test_a_launch_that_stops_tells_the_step_and_the_checkpoint(data: TinyData, tmp_path: Path):
    arguments = command(data, tmp_path / "run", "--exit-interval", "6")
    assert launch(arguments) == EXIT_PREEMPTED
    told = state_of(tmp_path / "run")
    assert (told["state"], told["reason"]) == ("preempted", "--exit-interval")
    assert (told["path"], told["step"], told["checkpoint"]) == ("v1", 6, checkpoint_name("v1", 6))


def test_a_launch_that_never_held_the_paths_writes_nothing(data: TinyData, tmp_path: Path):
    arguments = command(data, tmp_path / "run")
    with opened(arguments):
        before = (tmp_path / "run" / "run_state.json").read_bytes()
        assert launch(arguments) == EXIT_HELD
        assert (tmp_path / "run" / "run_state.json").read_bytes() == before
    assert state_of(tmp_path / "run")["state"] == "finished"


def test_launches_of_different_paths_have_files_of_their_own(data: TinyData, tmp_path: Path):
    with opened(command(data, tmp_path / "run", "--paths", "v1", "main")):
        pass
    assert [file.name for file in (tmp_path / "run").glob("run_state*")] == ["run_state.v1+main.json"]


def test_a_save_too_slow_for_the_launcher_is_told_once(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    arguments = command(data.first(1), tmp_path / "run", "--save-interval", "3")
    with opened(arguments) as run:
        monkeypatch.setattr(loop, "SAFE_GRACE_SECONDS", 0)
        trainer = Loop(run)
        trainer.train_segment(run.job.plan.segments[0])
        trainer.train_segment(run.job.plan.segments[1])
    said = [line for line in capsys.readouterr().out.splitlines() if "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in line]
    assert len(said) == 1 and f"{loop.GRACE_SECONDS} s after a SIGTERM" in said[0]


def test_a_signal_while_a_silent_holder_is_watched_ends_the_wait(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """That takes --lease-seconds, which may be more than a launcher gives; nothing has been written by then."""
    arguments = command(data, tmp_path / "run", "--lease-seconds", "60")
    with opened(arguments) as run:
        leases = Leases(run.publisher.references)
        with leases.references.locked() as locked:
            for lease in leases.all():
                leases._write(locked, replace(lease, place=replace(lease.place, host="elsewhere")))
        monkeypatch.setattr(opening, "announce", lambda text: os.kill(os.getpid(), signal.SIGTERM))
        before = files_of(tmp_path / "run")
        assert launch(arguments) == EXIT_PREEMPTED
        assert files_of(tmp_path / "run") == before
