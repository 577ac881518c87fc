"""The watch ends a process that does not go on, says where it stands, and lets one work that only takes long."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from distributed_harness import processes

from megalrps.errors import EXIT_STUCK, InputError, StuckError
from megalrps.training.peers import Seen, Sign
from megalrps.training.watch import Watch, describe, is_collective_failure

SECONDS = 0.4


def gets_stuck(watch: Watch) -> None:
    watch.enter("forward and backward", "of step 1")
    watch.enter("data", "of step 2")
    watch.enter("forward and backward", "of step 2 of path main")
    time.sleep(60)


def takes_long_at_first(watch: Watch) -> None:
    watch.enter("forward and backward", "of step 1")
    time.sleep(4 * SECONDS + 2)


def saves_for_long(watch: Watch) -> None:
    for _ in range(2):
        watch.enter("saving")
    time.sleep(4 * SECONDS + 2)


def sleeps_with_its_machine(watch: Watch) -> None:
    """Stopped for longer than it may stand still, and continued by a process of its own."""
    for _ in range(2):
        watch.enter("data")
    if os.fork() == 0:
        time.sleep(SECONDS + 4)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.3)


def watched(act: Callable[[Watch], None], log: Path) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    watch = Watch(seconds=SECONDS)
    watch.last_words.append(lambda error: log.with_name("last words").write_text(str(error)))
    with watch:
        act(watch)
    os._exit(0)


# What a process does under the watch, and how that ends.
ENDS = {gets_stuck: EXIT_STUCK, takes_long_at_first: 0, saves_for_long: 0, sleeps_with_its_machine: 0}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[Callable, tuple[int | None, Path]]:
    """All of them at once: they sleep."""
    started = {}
    for act in ENDS:
        log = tmp_path_factory.mktemp("watched") / "log"
        started[act] = processes().Process(target=watched, args=(act, log)), log
        started[act][0].start()
    for process, _ in started.values():
        process.join(30)
    return {act: (process.exitcode, log) for act, (process, log) in started.items()}


@pytest.mark.parametrize("act", ENDS)
def test_only_a_process_that_is_stuck_is_ended(ended: dict, act: Callable):
    status, log = ended[act]
    assert status == ENDS[act], log.read_text()


def test_a_stuck_process_says_where_half_way_and_at_the_end(ended: dict):
    _, log = ended[gets_stuck]
    half, _, end = log.read_text().partition("its threads:")
    assert half == "rank 0 of 1 has been in forward and backward of step 2 of path main for 0 s; "
    assert "in gets_stuck" in end, "its stack"
    told = log.with_name("last words").read_text()
    assert "no progress for 2 s in forward and backward of step 2 of path main" in told
    assert f"error: {told}" in end


def test_ranks_are_told_by_where_they_are_those_behind_first():
    here = {rank: Seen(Sign("optimizer of step 7", 40, 6.0)) for rank in (0, 1, 2, 5)}
    others = {
        3: Seen(Sign("sum of gradients of step 7", 39, 9.0)),
        6: Seen(Sign("data of step 7", 37), silent=5.2),
        7: Seen(Sign("the end", 12, ended="ValueError: no\nluck")),
    }
    assert describe(here | others, 8) == (
        "rank 4 no sign of life at all; rank 7 has left the run (ValueError: no luck); "
        "rank 6 no sign of life for 5 s or longer, last seen in data of step 7; "
        "rank 3 in sum of gradients of step 7 for 9 s; ranks 0-2, 5 in optimizer of step 7 for 6 s"
    )


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (RuntimeError("[/src/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (dist.DistBackendError("NCCL error"), True),
        (dist.DistStoreError("wait timeout after 3000ms"), True),
        (RuntimeError("shape mismatch"), False),
        (InputError("Timed out waiting"), False),
    ],
)
def test_the_failure_of_a_collective_is_told_from_a_defect(error: Exception, is_one: bool):
    assert is_collective_failure(error) == is_one
    with pytest.raises(StuckError if is_one else type(error)), Watch() as watch, watch.explained():
        raise error


def test_the_watch_leaves_no_thread_behind():
    with Watch():
        pass
    assert not [thread.name for thread in threading.enumerate() if thread.name in ("watch", "peers")]
