"""Saves in the background: on a thread, one at a time, and what goes wrong on it is raised where it is waited for."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalrps.checkpoint import background
from megalrps.checkpoint.background import BackgroundSave
from megalrps.checkpoint.errors import CheckpointExistsError, SaveError
from megalrps.checkpoint.storage import CheckpointWriter
from megalrps.checkpoint.store import Store

SECONDS = 30.0
WRITE = "_write_shard"


def state(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"x": torch.full((1000,), value)}


def publish(rename: Callable[[], None], digest: str) -> None:
    rename()


@pytest.fixture
def saves(tmp_path: Path) -> BackgroundSave[int]:
    store = Store(tmp_path)
    store.prepare()
    return BackgroundSave(store, SECONDS)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> "Gate":
    gate = Gate()
    monkeypatch.setattr(CheckpointWriter, WRITE, gate.around(getattr(CheckpointWriter, WRITE)))
    return gate


class Gate:
    """Where a writer waits: ``reached`` by it, until it is ``opened``."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def around(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def write(*args: Any) -> Any:
            self.reached.set()
            assert self.opened.wait(SECONDS)
            return original(*args)

        return write


def start(saves: BackgroundSave[int], name: str = "a", result: int = 7) -> None:
    saves.start(name, state(), {"step": 1}, publish, lambda: result)


def thread_of(name: str) -> threading.Thread:
    """The thread that saves ``name``."""
    running = [thread for thread in threading.enumerate() if thread.name == f"save {name}"]
    assert len(running) == 1, f"{name} is not being saved"
    return running[0]


def entries(saves: BackgroundSave[int]) -> list[str]:
    """All that lies in the store, what is hidden too."""
    return sorted(entry.name for entry in saves.store.directory.iterdir())


def test_it_saves_on_a_thread_and_gives_what_was_done_afterwards(saves: BackgroundSave[int], gate: Gate):
    threads = []
    with saves:
        assert not saves.busy and not saves.ended and not saves.failed
        saves.start("a", state(), {"step": 1}, publish, lambda: threads.append(threading.current_thread()) or 7)
        assert gate.reached.wait(SECONDS), "start() has returned, and the thread writes"
        assert saves.busy and not saves.ended and saves.store.names() == ()
        gate.opened.set()
        assert saves.finish() == 7
        assert not saves.busy and threads != [threading.main_thread()]
    loaded = {"x": torch.zeros(1000)}
    assert saves.store.load("a", loaded).record == {"step": 1} and torch.equal(loaded["x"], state()["x"])


def test_a_second_save_in_flight_is_refused_and_changes_nothing(saves: BackgroundSave[int], gate: Gate):
    with saves:
        start(saves, "a")
        with pytest.raises(AssertionError, match="in flight"):
            start(saves, "b")
        gate.opened.set()
        saves.finish()
        start(saves, "b")
    assert saves.store.names() == ("a", "b")


class _OddEnd(BaseException):
    """Neither an Exception nor anything that torch wraps."""


@pytest.mark.parametrize("where", ["the writer", "publishing", "afterwards"])
@pytest.mark.parametrize("kind", [OSError, SystemExit, _OddEnd])
def test_whatever_ends_the_thread_is_raised_by_who_waits(
    saves: BackgroundSave[int], monkeypatch: pytest.MonkeyPatch, where: str, kind: type[BaseException]
):
    def fail(*args: Any) -> Any:
        raise kind("the disk is on fire")

    if where == "the writer":
        monkeypatch.setattr(CheckpointWriter, WRITE, fail)
    saves.start(
        "a",
        state(),
        {},
        fail if where == "publishing" else publish,
        fail if where == "afterwards" else lambda: 7,
    )
    while not saves.ended:
        time.sleep(0.001)
    assert saves.ended and saves.failed and saves.busy
    with pytest.raises(Exception, match="the disk is on fire") as raised:
        saves.finish()
    assert where == "afterwards" or isinstance(raised.value, SaveError)
    assert not saves.busy and entries(saves) == (["a"] if where == "afterwards" else [])


def test_leaving_the_block_waits_and_raises(saves: BackgroundSave[int], gate: Gate):
    threading.Timer(0.05, gate.opened.set).start()
    with saves:
        start(saves)
    assert saves.store.names() == ("a",)
    with pytest.raises(CheckpointExistsError, match="checkpoint a exists"), saves:
        start(saves)


def test_an_exception_waits_for_the_save_and_is_what_is_raised(saves: BackgroundSave[int], gate: Gate):
    threading.Timer(0.05, gate.opened.set).start()
    with pytest.raises(KeyError, match="loss"), saves:
        start(saves)
        raise KeyError("loss")
    assert entries(saves) == ["a"], "what was trained before the exception is worth keeping"
    with pytest.raises(KeyError) as raised, saves:
        start(saves)
        raise KeyError("loss")
    (note,) = raised.value.__notes__
    assert "was not saved: checkpoint a exists" in note


@pytest.mark.parametrize("abandons", [False, True])
def test_a_save_that_does_not_end_is_given_up_and_never_seen(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch, abandons: bool
):
    monkeypatch.setattr(background, "_SECONDS_TO_DISCARD", 0.05)
    store = Store(tmp_path)
    saves: BackgroundSave[int] = BackgroundSave(store, patience=SECONDS if abandons else 0.05)
    with pytest.raises(KeyError) as raised, saves:
        start(saves)
        assert gate.reached.wait(SECONDS)
        if abandons:
            saves.abandon()
        thread = thread_of("a")
        raise KeyError("loss")
    assert raised.value.__notes__ == ["checkpoint a was being written, and is given up"]
    gate.opened.set()  # and then the disk comes back
    thread.join(SECONDS)
    assert entries(saves) == [], "neither a checkpoint nor a half of one"


def test_one_that_is_being_published_is_not_given_up(saves: BackgroundSave[int]):
    reached, opened = threading.Event(), threading.Event()

    def slowly(rename: Callable[[], None], digest: str) -> None:
        reached.set()
        assert opened.wait(SECONDS)
        rename()

    with saves:
        saves.start("a", state(), {}, slowly, lambda: 7)
        assert reached.wait(SECONDS)
        saves.abandon()
        opened.set()
        assert saves.finish() == 7
    assert entries(saves) == ["a"]


def _save_beside_collectives(rank: int, directory: Path) -> tuple[list[float], str]:
    """Sums on the default group while both ranks save on another; then a save of which rank 1 cannot do its part."""
    saves: BackgroundSave[None] = BackgroundSave(Store(directory, dist.new_group(backend="gloo")), SECONDS)
    gate, sums = Gate(), []
    original = getattr(CheckpointWriter, WRITE)
    with saves:
        setattr(CheckpointWriter, WRITE, gate.around(original) if rank == 0 else original)
        saves.start("a", {**state(), f"own_{rank}": torch.ones(10)}, {}, publish, lambda: None)
        for step in range(5):
            total = torch.tensor(float(step))
            dist.all_reduce(total)
            sums.append(total.item())
        assert not saves.ended, "the sums were made while it was in flight"
        gate.opened.set()
        saves.finish()
        if rank == 1:
            setattr(CheckpointWriter, WRITE, _no_space)
        saves.start("b", {**state(), f"own_{rank}": torch.ones(10)}, {}, publish, lambda: None)
        try:
            saves.finish()
        except SaveError as error:
            return sums, str(error)
    return sums, "saved"


def _no_space(*args: Any) -> Any:
    raise OSError(28, "No space left on device")


def test_ranks_save_beside_their_training_and_fail_together(run_ranks, tmp_path: Path):
    (sums, first), (_, second) = run_ranks(2, _save_beside_collectives, tmp_path)
    assert sums == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert first == second and "checkpoint b was not saved: rank 1" in first and "No space" in first
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    assert set(Store(tmp_path).verify("a").tensors) == {"x", "own_0", "own_1"}
