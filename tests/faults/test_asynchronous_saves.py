"""--async-save under faults (F15): what the writer does wrong, or late, and what is left when a run ends meanwhile."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from asynchronous_course import SECONDS, Counted, Course, threads, train
from distributed_harness import processes
from tiny_job import (
    TinyData,
    checkpoints,
    command,
    differing,
    make_data,
    metrics,
    opened,
    tensors,
    world_of_harness,
)

from megalrps.checkpoint import background
from megalrps.checkpoint.errors import NoSpaceError, SaveError
from megalrps.checkpoint.references import References
from megalrps.checkpoint.store import Store
from megalrps.config import parse_config
from megalrps.errors import EXIT_NO_SPACE, PreemptedError, RepeatedError, exit_status_of
from megalrps.training.dry_run import report_rank
from megalrps.training.prepare import prepare
from megalrps.training.run import Run
from megalrps.training.signals import StopRequest
from megalrps.training.snapshot import Snapshot

STEPS = 8
SAVED = ("v1-00000002", "v1-00000004", "v1-00000006", "v1-00000008")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    made = make_data(tmp_path_factory.mktemp("data"), (STEPS,))
    return TinyData(made.increments, ())


def arguments(data: TinyData, run: Path, *flags: str) -> list[str]:
    """One path of STEPS updates, saved at every second and at the last."""
    return command(data, run, "--paradigm", "ptfs", "--save-interval", "2", "--save-keep", "9", "--async-save", *flags)


def digests(run: Path) -> dict[str, list[str]]:
    """The SHA-256 of every file of tensors, by checkpoint."""
    store = Store(run / "checkpoints")
    return {name: [shard.sha256 for shard in store.manifest(name).shards] for name in store.names()}


def head(run: Path) -> str | None:
    """The checkpoint that the head of the path points to."""
    found = References(run / "lineage").read("heads", "v1")
    return found.checkpoint if found else None


def hidden(run: Path) -> list[str]:
    """What has been left half-written."""
    return [entry.name for entry in (run / "checkpoints").iterdir() if entry.name.startswith(".")]


TP = ("--tensor-model-parallel-size", "2")


def _train_both_ways(rank: int, data: TinyData, runs: Path) -> None:
    """On two replicas, then on two halves of the model: (dp or tp)/(sync or async) in ``runs``."""
    for layout, flags in (("dp", ()), ("tp", TP)):
        for name, way in (("sync", "--no-async-save"), ("async", "--async-save")):
            train(arguments(data, runs / layout / name, way, *flags), Course(), world=world_of_harness())


def check_equal(runs: Path, ranks: int) -> None:
    """That the runs ``sync`` and ``async`` have saved the same bits, as often, and that they are all there."""
    waits, goes_on = digests(runs / "sync"), digests(runs / "async")
    assert goes_on == waits and tuple(goes_on) == SAVED and head(runs / "async") == SAVED[-1]
    assert all(len(files) == ranks for files in goes_on.values())
    assert [line["step"] for line in metrics(runs / "async")] == list(range(1, STEPS + 1))


def test_its_checkpoints_are_those_of_a_run_that_waits_for_every_save(data: TinyData, tmp_path: Path):
    for name, way in (("sync", "--no-async-save"), ("async", "--async-save")):
        train(arguments(data, tmp_path / name, way), Course())
    check_equal(tmp_path, ranks=1)


def test_so_are_those_of_two_ranks(run_ranks, data: TinyData, tmp_path: Path):
    run_ranks(2, _train_both_ways, data, tmp_path)
    check_equal(tmp_path / "dp", ranks=2)
    check_equal(tmp_path / "tp", ranks=2)


def test_training_goes_on_while_the_writer_hangs_and_the_next_save_waits(
    data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    committed: dict[int, str | None] = {}
    agree = Run.agree
    monkeypatch.setattr(
        Run, "agree", lambda run: committed.update({run.state.step: run.state.checkpoint}) or agree(run)
    )
    course = Course(holds="v1-00000002", until=4)
    train(arguments(data, tmp_path / "run"), course)
    order = course.events
    assert order.index("update 4") < order.index("saved v1-00000002") < order.index("update 5"), order
    assert "saved v1-00000004" in order and order.index("saved v1-00000006") < order.index("saved v1-00000008"), order
    said = capsys.readouterr().out
    assert "--save-interval is short: v1-00000004 waited " in said
    assert checkpoints(tmp_path / "run") == SAVED
    assert committed[2] is None and committed[8] == "v1-00000008", "a state counts as committed once it is"


def test_a_fork_or_release_waits_for_the_save_before_it(data: TinyData, tmp_path: Path):
    course = Course(holds="v1-00000006", until=8)
    train(arguments(data, tmp_path / "run"), course)
    order = course.events
    assert order[order.index("update 8") :] == ["update 8", "saved v1-00000006", "saved v1-00000008", "left"]


def test_what_is_overwritten_after_the_copy_is_not_in_the_checkpoint(data: TinyData, tmp_path: Path):
    with opened(arguments(data, tmp_path / "run", "--fp16")) as run:
        run.state.initialise(run.job.model, 7)
        for name, flats in run.state.flats().items():
            for place, flat in enumerate(flats):
                flat.copy_(torch.randn(flat.shape, generator=torch.Generator().manual_seed(place + len(name))))
        run.state.counts()["optimizer.updates"].fill_(5)
        before = {name: tensor.clone() for name, tensor in run.state.tensors().items()}
        snapshot = Snapshot(run.state)
        copy = snapshot.take()
        for tensor in run.state.tensors().values():
            tensor.fill_(-1)
        run.store.save("a", copy, {})
        again = snapshot.take()
    assert list(copy) == list(before) and "optimizer.loss_scale" in copy
    assert differing(tensors(tmp_path / "run", "a"), before) == []
    shared = [name for name in copy if copy[name].data_ptr() != again[name].data_ptr()]
    assert shared == [name for name in copy if copy[name].dim() == 0], "the memory of a copy is used again"


def test_a_dry_run_counts_the_copy_to_the_memory_of_the_host(data: TinyData, tmp_path: Path):
    host = {}
    for way in ("--async-save", "--no-async-save"):
        job = prepare(parse_config(arguments(data, tmp_path / "run", way)), 1)
        host[way] = report_rank(job, 0).host
    with opened(arguments(data, tmp_path / "run")) as run:
        held = sum(flat.nbytes for flats in run.state.flats().values() for flat in flats)
    assert host == {"--async-save": held, "--no-async-save": 0}


def _stalls(rank: int, data: TinyData, run: Path) -> tuple[int, dict[str, list[str]]]:
    """By what the main thread does: its calls; and how many buckets there are."""
    stalls: dict[str, list[str]] = {}

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(Run, name)

        def work(self: Run, *args: Any, **kwargs: Any) -> Any:
            count = Counted()
            with count.counting():
                result = original(self, *args, **kwargs)
            stalls[f"{name} {self.state.step}"] = count.calls
            return result

        return work

    course = Course(holds="v1-00000002", until=3, ended_by=4)
    with mock.patch.object(Run, "commit", counted("commit")), mock.patch.object(Run, "agree", counted("agree")):
        held = train(arguments(data, run), course, world=world_of_harness())
    return len(held.state.buffers.buckets), stalls


def test_the_stall_is_the_copy_alone(run_ranks, data: TinyData, tmp_path: Path):
    for buckets, stalls in run_ranks(2, _stalls, data, tmp_path / "run"):
        assert stalls["commit 2"] == ["copy"] * 3 * buckets, "masters and two moments, a bucket at a time"
        assert stalls["agree 2"] == stalls["agree 3"] == ["all_reduce"]
        assert stalls["agree 4"] == ["all_reduce"], "what follows a save is the thread's work too"
        assert {"open", "write", "gather_object"} <= set(stalls["commit 8"]), "what is not there would be seen"


def _fail_on_a_rank(rank: int, data: TinyData, runs: Path) -> list[tuple[list[str], str, int, int]]:
    """For either rank: the events, the error and its status, and how many saves are still under way."""
    told = []
    for failing in (0, 1):
        error = OSError(28, "No space left on device")
        course = Course(holds="v1-00000004", until=5, error=error if rank == failing else None, ended_by=6)
        with pytest.raises((NoSpaceError, RepeatedError)) as raised:
            train(arguments(data, runs / str(failing)), course, world=world_of_harness())
        told.append((course.events, str(raised.value), exit_status_of(raised.value), len(threads())))
    return told


def test_a_writer_that_fails_ends_the_run_on_all_ranks_in_the_same_step(run_ranks, data: TinyData, tmp_path: Path):
    by_rank = run_ranks(2, _fail_on_a_rank, data, tmp_path)
    for failing in (0, 1):
        run = tmp_path / str(failing)
        for events, message, status, left in (told[failing] for told in by_rank):
            assert events[-2:] == ["update 6", "left"], "the save ended during the sixth"
            assert f"checkpoint v1-00000004 was not saved: rank {failing}: OSError: [Errno 28]" in message
            assert status == EXIT_NO_SPACE and left == 0
        assert head(run) == "v1-00000002" and checkpoints(run) == ("v1-00000002",) and hidden(run) == []


class _ThreadDeathError(BaseException):
    """What neither torch nor the store passes on to the other ranks."""


def _thread_dies_alone(rank: int, data: TinyData, run: Path) -> tuple[list[str], str]:
    save = Store.save

    def die(store: Store, name: str, *args: Any) -> str:
        if rank == 1 and name == "v1-00000004":
            raise _ThreadDeathError("out of memory")
        return save(store, name, *args)

    course = Course(ended_by=5 if rank == 1 else 0)
    with (
        mock.patch.object(Store, "save", die),
        mock.patch.object(background, "_SECONDS_TO_DISCARD", 0.1),
        pytest.raises(
            (SaveError, RuntimeError), match="v1-00000004 was not saved: _ThreadDeathError: out of memory"
        ) as raised,
    ):
        train(arguments(data, run), course, world=world_of_harness())
    return course.events, str(raised.value)


def test_a_thread_that_dies_alone_leaves_no_rank_waiting(run_ranks, data: TinyData, tmp_path: Path):
    run = tmp_path / "run"
    (first, message), (second, _) = run_ranks(2, _thread_dies_alone, data, run)
    last = [[event for event in events if event.startswith("update")][-1] for events in (first, second)]
    assert last in (["update 4"] * 2, ["update 5"] * 2) and message.startswith("rank 1: ")
    assert head(run) == "v1-00000002" and checkpoints(run) == ("v1-00000002",)


def stopped_at(update: int) -> tuple[Callable[[int], None], StopRequest]:
    """A request to stop that comes in the middle of an update."""
    stop = StopRequest()

    def ask(done: int) -> None:
        if done == update:
            stop._note(signal.SIGTERM, None)

    return ask, stop


@pytest.mark.parametrize("update", [4, 5])
def test_a_preempted_run_waits_for_the_save_in_flight(data: TinyData, tmp_path: Path, update: int):
    run = tmp_path / "run"
    ask, stop = stopped_at(update)
    course = Course(holds="v1-00000004", until=update, after=ask)
    with pytest.raises(PreemptedError, match=f"saved as v1-0000000{update}"):
        train(arguments(data, run), course, stop=stop)
    saved = [event for event in course.events if event.startswith("saved")]
    assert saved == [f"saved v1-0000000{step}" for step in sorted({2, 4, update})], "each once"
    assert head(run) == f"v1-0000000{update}" and hidden(run) == []


class _LossError(Exception):
    """What may end a step."""


def test_an_exception_waits_for_the_save_in_flight(data: TinyData, tmp_path: Path):
    run = tmp_path / "run"

    def fail(update: int) -> None:
        if update == 5:
            course.let_go.set()
            raise _LossError

    course = Course(holds="v1-00000004", after=fail)
    with pytest.raises(_LossError):
        train(arguments(data, run), course)
    assert threads() == [] and hidden(run) == []
    assert head(run) == "v1-00000004" and checkpoints(run) == ("v1-00000002", "v1-00000004")


def test_an_exception_gives_a_save_up_that_does_not_end(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "run"

    def fail(update: int) -> None:
        if update == 5:
            assert course.run is not None and course.run.background is not None
            course.run.background.saves._patience = (
                0.05  # half a time-out of the ranks, which ends a process that waits
            )
            raise _LossError

    course = Course(holds="v1-00000004", after=fail)
    with pytest.raises(_LossError) as raised:
        train(arguments(data, run), course)
    assert raised.value.__notes__ == ["checkpoint v1-00000004 was being written, and is given up"]
    (late,) = threads()
    course.let_go.set()  # the disk comes back when the lease is given back already
    late.join(SECONDS)
    assert head(run) == "v1-00000002" and checkpoints(run) == ("v1-00000002",) and hidden(run) == []


def _die_while_it_saves(data: TinyData, run: Path) -> None:
    """kill -9 after update 5, the fourth's checkpoint half-written."""
    torch.set_num_threads(1)
    course = Course(
        holds="v1-00000004", after=lambda update: os.kill(os.getpid(), signal.SIGKILL) if update == 5 else None
    )
    train(arguments(data, run), course)


def test_kill_9_with_a_save_pending_loses_nothing_that_was_acknowledged(data: TinyData, tmp_path: Path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    process = processes().Process(target=_die_while_it_saves, args=(data, run))
    process.start()
    process.join(2 * SECONDS)
    assert process.exitcode == -signal.SIGKILL
    assert head(run) == "v1-00000002" and checkpoints(run) == ("v1-00000002",) and len(hidden(run)) == 1
    train(arguments(data, run), Course())
    train(arguments(data, whole, "--no-async-save"), Course())
    assert digests(run) == digests(whole) and hidden(run) == []
    assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))
