"""A rank that is stopped, stuck, or in another collective than the others ends the run in time, and is named (F7)."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import counts
import pytest
import torch.distributed as dist
from counts import record
from entry_ranks import UPDATE, Fault, children_of, is_alive, rank_of, started, torchrun, wait, wait_until
from tiny_job import TinyData, checkpoints, command, make_data, tensors

from megalrps.errors import EXIT_STUCK

TIMEOUT_SECONDS = 4.0
TORCHRUN_TIMEOUT_SECONDS = 8.0  # in which busy processes also find each other
SECONDS_TO_END = 35.0
STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    whole = make_data(tmp_path_factory.mktemp("data"), (STEPS,))
    return TinyData(whole.increments, ())


def arguments_of(data: TinyData, run: Path, seconds: float = TIMEOUT_SECONDS) -> list[str]:
    return command(data, run, "--save-interval", "2", "--distributed-timeout-minutes", str(seconds / 60))


def stop_self() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep_for_ever() -> None:
    """Stuck outside any collective, as in a kernel: signals are not even noticed by Python's main thread."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    time.sleep(1000)


def gather_objects() -> None:
    """A collective of the group of all ranks while the others are in an update."""
    dist.all_gather_object([None] * dist.get_world_size(), "elsewhere")


# What befalls rank 1 before its third update, and whether it can end by itself.
STUCK: dict[str, tuple[Callable[[], None], bool]] = {
    "stopped": (stop_self, False),
    "asleep": (sleep_for_ever, True),
    "in another collective": (gather_objects, True),
}


@pytest.mark.parametrize("how", STUCK)
def test_a_stuck_rank_ends_the_run_in_time_and_is_named(data: TinyData, tmp_path: Path, how: str):
    act, ends = STUCK[how]
    run = tmp_path / "run"
    with started(arguments_of(data, run), 2, tmp_path, Fault(UPDATE, act, 3, (1,))) as ranks:
        wait(ranks if ends else ranks[:1], 60.0)
        seconds = time.time() - float(ranks[1].noted.read_text())
    # torchrun kills what is left 30 s after the first rank has ended
    assert seconds < TIMEOUT_SECONDS + SECONDS_TO_END - 30.0, f"{how}: {seconds:.1f} s"
    statuses = [rank.status for rank in ranks[: 2 if ends else 1]]
    assert set(statuses) == {EXIT_STUCK}, "\n".join(rank.text for rank in ranks)
    text = "".join(rank.text for rank in ranks)
    told = [line for line in text.splitlines() if "error:" in line and "rank" in line]
    assert len(told) == 1, text
    sign = "no sign of life" if how == "stopped" else "in data of step 3 of path main"
    assert f"rank 1 {sign}" in told[0] and "step 3 of path main" in told[0], told[0]
    assert "rank 0 in" in told[0] and "--distributed-timeout-minutes" in told[0], told[0]
    state = json.loads((run / "run_state.json").read_text())
    assert (state["state"], state["exit_status"]) == ("failed", EXIT_STUCK)
    assert state["message"] and "rank 1" in state["message"]
    assert checkpoints(run) == ("main-00000002",)
    tensors(run, "main-00000002")
    record("F7", **{f"seconds beyond the time-out, {how}": round(seconds - TIMEOUT_SECONDS, 1)})


@pytest.mark.skipif(not counts.SESSION.full, reason="waits for torchrun's 30 s; --full-faults does")
@pytest.mark.parametrize("stopped", (0, 1))
def test_torchrun_ends_the_stopped_rank_too(data: TinyData, tmp_path: Path, stopped: int):
    run, log = tmp_path / "run", tmp_path / "log"
    with torchrun(arguments_of(data, run, TORCHRUN_TIMEOUT_SECONDS), tmp_path, seconds_an_update=0.3) as launch:
        wait_until(lambda: bool(list(run.glob("checkpoints/*/manifest.json"))), launch, log)
        ranks = {rank_of(process): process for process in children_of(launch.pid)}
        os.kill(ranks[stopped], signal.SIGSTOP)
        began = time.monotonic()
        while any(is_alive(process) for process in ranks.values()):
            assert time.monotonic() - began < TORCHRUN_TIMEOUT_SECONDS + SECONDS_TO_END, log.read_text()
            time.sleep(0.05)
        seconds = round(time.monotonic() - began - TORCHRUN_TIMEOUT_SECONDS, 1)
        assert launch.wait(30) == 1
    assert f"rank {stopped} no sign of life" in log.read_text()
    record("F7", **{f"seconds beyond the time-out, rank {stopped} of torchrun stopped": seconds})
