"""A run that is asked to stop saves and leaves: status 20, committed in time, and resumed bit for bit (F6)."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from counts import count, record, seed
from entry_ranks import UPDATE, Fault, finished, torchrun, wait_until
from tiny_job import TinyData, checkpoints, command, differing, make_data, results, tensors

from megalrps.errors import EXIT_PREEMPTED
from megalrps.training.signals import GRACE_SECONDS

STEPS = 8
SECONDS_TO_COMMIT = 10.0
SAVE = "megalrps.checkpoint.storage.CheckpointWriter.finish"
AGREE = "megalrps.training.control.Control.agree"
MEASURE = "megalrps.evaluation.releases._measure"
PREPARE = "megalrps.training.opening.prepare"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return make_data(tmp_path_factory.mktemp("data"), (STEPS,))


def arguments_of(data: TinyData, run: Path) -> list[str]:
    return command(data, run, "--save-interval", "3")


@pytest.fixture(scope="module")
def undisturbed(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert [rank.status for rank in finished(arguments_of(data, folder / "run"), 2, folder)] == [0, 0]
    return folder / "run"


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def terminate_twice() -> None:
    terminate()
    terminate()


def warn() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def state_of(run: Path) -> dict:
    return json.loads((run / "run_state.json").read_text())


def check_resumes(data: TinyData, folder: Path, undisturbed: Path) -> None:
    """The same command, started again, ends as if nothing had happened."""
    run = folder / "run"
    ranks = finished(arguments_of(data, run), 2, folder)
    assert [rank.status for rank in ranks] == [0, 0], ranks[0].text
    kept, expected = results(run), results(undisturbed)
    assert set(kept.pop("checkpoints")) >= set(expected.pop("checkpoints"))  # and what was saved on the signal
    assert kept == expected and state_of(run)["state"] == "finished"
    for name in checkpoints(undisturbed):
        assert differing(tensors(run, name), tensors(undisturbed, name)) == [], name


def drawn(number: int) -> list[Fault]:
    """``number`` faults in training: who gets which signal, and in which phase of which step."""
    draw = random.Random(seed())
    ranks = [(0,), (1,), (0, 1)]
    acts = [terminate, terminate_twice, warn]
    faults = [Fault(UPDATE, terminate_twice, 5, (1,)), Fault(SAVE, warn, 1, (0,))]  # these in every session
    while len(faults) < number:
        where, calls = draw.choice([(UPDATE, STEPS), (AGREE, STEPS), (SAVE, 2)])
        act, who = draw.choice(acts), draw.choice(ranks)
        # the first rank alone finishes a save; the first agreement is before the first update: nothing to save
        faults.append(Fault(where, act, draw.randint(1 + (where == AGREE), calls), (0,) if where == SAVE else who))
    return faults


FAULTS = drawn(count("F6", 2, 20))


@pytest.mark.parametrize("case", range(len(FAULTS)))
def test_a_signal_in_training_commits_in_time_and_costs_nothing(
    data: TinyData, undisturbed: Path, tmp_path: Path, case: int
):
    fault, run = FAULTS[case], tmp_path / "run"
    ranks = finished(arguments_of(data, run), 2, tmp_path, fault)
    assert [rank.status for rank in ranks] == [EXIT_PREEMPTED] * 2, f"{fault}\n{ranks[0].text}"
    reason = "SIGUSR1" if fault.act is warn else "SIGTERM"
    state = state_of(run)
    assert (state["state"], state["exit_status"], state["reason"]) == ("preempted", EXIT_PREEMPTED, reason), fault
    assert ranks[0].text.count(f"stopped by {reason}") == 1 and "stopped by" not in ranks[1].text
    updates = [len(rank.updates.read_text()) if rank.updates.exists() else 0 for rank in ranks]
    assert updates[0] == updates[1] == (state["step"] or 0), f"{fault}: the ranks made {updates} updates"
    seconds = [
        (run / "checkpoints" / state["checkpoint"] / "manifest.json").stat().st_mtime - float(rank.noted.read_text())
        for rank in ranks
        if rank.noted.exists()
    ]
    assert seconds and max(seconds) < SECONDS_TO_COMMIT, f"{fault}: committed after {seconds} s"
    record("F6", **{f"seconds to commit, case {case}": round(max(seconds), 2)})
    check_resumes(data, tmp_path, undisturbed)


# What is left of a run that was asked where there is nothing to save: its updates, and whether it says so in a file.
EARLY_AND_LATE = {
    "while the data is opened": (Fault(PREPARE, terminate, 1, (1,)), 0, False),
    "before the first update": (Fault("megalrps.training.loop.Loop.restore", warn, 1, (1,)), 0, True),
    "during the evaluation": (Fault(MEASURE, terminate, 1, (1,)), STEPS, True),
}


@pytest.mark.parametrize("when", EARLY_AND_LATE)
def test_a_signal_where_nothing_is_to_be_saved_ends_the_run_at_once(tmp_path: Path, when: str):
    fault, updates, told = EARLY_AND_LATE[when]
    run, data = tmp_path / "run", make_data(tmp_path, (STEPS // 2, STEPS // 2))
    arguments = arguments_of(data, run)
    ranks = finished(arguments, 2, tmp_path, fault)
    assert [rank.status for rank in ranks] == [EXIT_PREEMPTED] * 2, ranks[0].text
    assert bool(lines_of(run)) == bool(updates)
    if not updates:
        assert not checkpoints(run) and "nothing to save" in ranks[0].text
    else:
        assert len(list((run / "evaluations").iterdir())) == 1, "the part that was being measured is finished"
    assert (run / "run_state.json").exists() == told
    if told:
        assert state_of(run)["state"] == "preempted"
    else:
        assert not run.exists(), "asked before it took hold, it has written nothing"


def lines_of(run: Path) -> list[dict]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize("times", range(1, 1 + count("F6 of torchrun", 1, 2)))
def test_sigterm_to_torchrun_ends_all_ranks_with_the_state_committed(
    data: TinyData, undisturbed: Path, tmp_path: Path, times: int
):
    """torchrun passes it on, also the second one, and makes 1 of every status: the file keeps it."""
    run, log = tmp_path / "run", tmp_path / "log"
    with torchrun(arguments_of(data, run), tmp_path, seconds_an_update=0.3) as launch:
        wait_until(lambda: len(lines_of(run)) >= 4, launch, log)
        sent = time.time()
        for _ in range(times):
            launch.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        launch.wait(60)
        ended = time.time()
    state = state_of(run)
    assert launch.returncode == 1 and state["exit_status"] == EXIT_PREEMPTED, log.read_text()
    assert (state["state"], state["reason"], state["step"]) == ("preempted", "SIGTERM", lines_of(run)[-1]["step"])
    assert log.read_text().count("stopped by SIGTERM") == 1
    seconds = (run / "checkpoints" / state["checkpoint"] / "manifest.json").stat().st_mtime - sent
    assert seconds < SECONDS_TO_COMMIT and ended - sent < GRACE_SECONDS
    for name, figure in (("to commit", seconds), ("to end", ended - sent)):
        record("F6", **{f"seconds {name}, {times} SIGTERM to torchrun": round(figure, 2)})
    check_resumes(data, tmp_path, undisturbed)
