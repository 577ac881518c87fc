"""One writer a path: who holds a lease, who may take it over and when, and what the loser can still do: nothing."""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from distributed_harness import processes
from synthetic_tree import add, elsewhere, flip_bit, gone, leased, prepared, record

from megalrps.checkpoint import leases as module
from megalrps.checkpoint.errors import DamagedReferenceError, FencedError, HeldError
from megalrps.checkpoint.garbage import prune
from megalrps.checkpoint.leases import HeldLeases, Leases, is_over, this_place
from megalrps.checkpoint.publication import Publisher
from megalrps.checkpoint.references import References
from megalrps.errors import EXIT_HELD, exit_status_of

SHORT = 0.6


@pytest.fixture
def references(tmp_path: Path) -> References:
    return prepared(tmp_path)


class Clock:
    """Time that passes in ``sleep`` alone, and things that happen in it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.happening: list[tuple[float, Callable[[], object]]] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        while self.happening and self.happening[0][0] <= self.now - 100.0:
            self.happening.pop(0)[1]()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def take(references: References, *paths: str, seconds: float = SHORT) -> HeldLeases:
    return Leases(references).acquire({path: [] for path in paths}, seconds=seconds)


def files(references: References) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (references.directory / "leases").iterdir()}


def test_who_comes_second_is_refused_and_has_written_nothing(references: References):
    with take(references, "main", "v1"):
        before = files(references)
        with pytest.raises(HeldError, match=f"path v1 is being trained.*process {os.getpid()}") as raised:
            take(references, "v2", "v1")
        assert exit_status_of(raised.value) == EXIT_HELD
        assert files(references) == before, "not even the path that was free"
        with take(references, "v2"):
            pass
    with take(references, "main", "v1") as held:
        assert held.paths == {"main", "v1"}


def _hold(directory: Path, ready: Path) -> None:
    with take(References(directory), "main", seconds=30.0):
        ready.touch()
        time.sleep(60)


def test_a_holder_that_was_killed_is_followed_at_once(references: References, tmp_path: Path):
    holder = processes().Process(target=_hold, args=(references.directory, tmp_path / "ready"))
    holder.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    (lease,) = Leases(references).held()
    assert lease.place.pid == holder.pid and is_over(lease) is False
    os.kill(holder.pid or 0, signal.SIGSTOP)
    with pytest.raises(HeldError):  # it beats no more, but it is there: only an end is an end where it can be seen
        take(references, "main", seconds=0.0)
    holder.kill()
    while is_over(lease) is False and time.monotonic() < deadline:  # a corpse that nobody has asked after is no holder
        time.sleep(0.01)
    began = time.monotonic()
    with take(references, "main", seconds=30.0):
        assert time.monotonic() - began < 5
        (now,) = Leases(references).held()
        assert now.fence == lease.fence + 1
    holder.join()


def test_a_number_of_a_process_that_is_used_again_is_another_process(references: References):
    lease = leased(references, "main", place=gone())
    assert is_over(lease) is True
    with take(references, "main", seconds=30.0):
        pass


def test_a_process_of_another_boot_or_namespace_cannot_be_looked_up():
    here = this_place()
    for changed in ({"host": "x"}, {"boot": "x"}, {"namespace": "x"}):
        lease = module.Lease("main", 1, "x", replace(here, **changed), 0, (), "")
        assert is_over(lease) is None
        assert is_over(replace(lease, owner="")) is True


def test_a_silent_holder_elsewhere_is_watched_and_then_taken_over(references: References, clock: Clock):
    leased(references, "main", place=elsewhere(), fence=6)
    said: list[str] = []
    with Leases(references).acquire({"main": []}, seconds=30.0, watching=said.append):
        assert 130.0 <= clock.now < 131.0
        (lease,) = Leases(references).held()
        assert lease.fence == 7
    assert len(said) == 1 and "elsewhere" in said[0] and "30 s" in said[0]


@pytest.mark.parametrize("sign", [{"beats": 1}, {"owner": "another"}])
def test_a_holder_elsewhere_that_gives_a_sign_of_life_is_left_alone(references: References, clock: Clock, sign: dict):
    leased(references, "main", place=elsewhere())
    clock.happening.append((29.4, lambda: leased(references, "main", place=elsewhere(), **sign)))
    with pytest.raises(HeldError, match="elsewhere"):
        take(references, "v1", "main", seconds=30.0)
    assert set(files(references)) == {"main.json"} and clock.now < 130.0


def test_each_path_is_watched_for_its_own_time(references: References, clock: Clock):
    """A path that somebody takes while another is being watched is not taken over together with that."""
    leased(references, "main", place=elsewhere())
    clock.happening.append((29.0, lambda: leased(references, "v1", place=elsewhere(8), owner="another")))
    with take(references, "main", "v1", seconds=30.0):
        assert 159.0 <= clock.now < 161.0
    clock.happening.append((90.0, lambda: leased(references, "v1", place=elsewhere(8), beats=1)))
    leased(references, "v1", place=elsewhere(8))
    with pytest.raises(HeldError):
        take(references, "main", "v1", seconds=40.0)


def test_a_holder_that_beats_slowly_is_watched_for_as_long_as_it_asked(references: References, clock: Clock):
    leased(references, "main", place=elsewhere(), seconds=300.0)
    with take(references, "main", seconds=30.0):
        assert 400.0 <= clock.now < 401.0
        (lease,) = Leases(references).held()
        assert lease.seconds == 30.0


def test_fencing_numbers_grow_for_ever(references: References):
    fences = []
    for _ in range(5):
        with take(references, "main") as held, references.locked() as locked:
            fences.append(held.check(locked, "main"))
    assert fences == [1, 2, 3, 4, 5]
    (lease,) = Leases(references).all()
    assert lease.owner == "" and Leases(references).held() == ()


def test_a_holder_beats(references: References):
    with take(references, "main", "v1", seconds=0.09):
        deadline = time.monotonic() + 20
        while any(lease.beats < 3 for lease in Leases(references).all()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert all(lease.beats >= 3 for lease in Leases(references).all())
    beats = [lease.beats for lease in Leases(references).all()]
    time.sleep(0.15)
    assert [lease.beats for lease in Leases(references).all()] == beats, "given back, and still beating"


def take_over(references: References, path: str) -> None:
    """As a launch elsewhere does that has watched this one for long enough."""
    before = Leases(references).read(path)
    leased(references, path, place=elsewhere(), owner="winner", fence=before.fence + 1 if before else 1)


def test_who_was_taken_over_publishes_nothing(references: References):
    checkpoints = references.directory.parent / "checkpoints"
    for step in (1, 2):
        add(checkpoints, record("main", step))
    with take(references, "main", seconds=30.0) as held:
        publisher, renamed = Publisher(references, held), []
        publisher.publish("main-00000002", record("main", 2))(lambda: renamed.append(2), "d" * 64)
        take_over(references, "main")
        with pytest.raises(FencedError, match="process 7 on elsewhere") as raised:
            publisher.publish("main-00000004", record("main", 4, "fork"))(lambda: renamed.append(4), "d" * 64)
        assert exit_status_of(raised.value) == EXIT_HELD
        assert renamed == [2], "it was made visible"
        with pytest.raises(FencedError):
            publisher.step_back("main", None)
        with pytest.raises(FencedError):
            publisher.reconcile(checkpoints)
        with pytest.raises(FencedError):
            prune(checkpoints, references, 1, held)
        with pytest.raises(FencedError):
            publisher.set_aside("main-00000002", checkpoints)
        assert sorted(place.name for place in checkpoints.iterdir()) == ["main-00000001", "main-00000002"]
    assert [reference.title for reference in references.all()] == ["heads/main"]
    found = references.read("heads", "main")
    assert found is not None and found.checkpoint == "main-00000002"


def test_giving_back_leaves_alone_what_others_have_taken(references: References):
    with take(references, "main", "v1", seconds=30.0):
        take_over(references, "main")
    leases = {lease.path: lease for lease in Leases(references).all()}
    assert leases["main"].owner == "winner" and leases["v1"].owner == ""


def test_a_beat_finds_out_that_the_path_is_lost(references: References):
    with take(references, "main", seconds=0.09) as held:
        take_over(references, "main")
        winner = files(references)
        deadline = time.monotonic() + 20
        while held.lost is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert isinstance(held.lost, FencedError)
        assert files(references) == winner


def test_a_lease_that_cannot_be_read_ends_the_holder_and_no_block_that_has_failed(references: References):
    with pytest.raises(KeyError, match="the real reason"), take(references, "main", seconds=0.09) as held:
        flip_bit(references.directory / "leases" / "main.json", 30)
        deadline = time.monotonic() + 20
        while held.lost is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert isinstance(held.lost, DamagedReferenceError)
        raise KeyError("the real reason")


def test_a_disk_that_is_full_for_a_while_loses_nothing(references: References, monkeypatch: pytest.MonkeyPatch):
    with take(references, "main", seconds=0.09) as held:
        with monkeypatch.context() as full:
            full.setattr(module, "write_sealed", _no_space)
            time.sleep(0.2)
        assert held.lost is None
        before = Leases(references).all()[0].beats
        deadline = time.monotonic() + 20
        while Leases(references).all()[0].beats <= before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert Leases(references).all()[0].beats > before


def _no_space(*args: object) -> None:
    raise OSError(28, os.strerror(28))


def test_of_launches_at_once_exactly_one_holds(references: References):
    start, held, refused = threading.Barrier(6), [], []

    def run() -> None:
        start.wait()
        try:
            held.append(take(references, "main", "v1", seconds=30.0))
        except HeldError:
            refused.append(1)

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 5)


def test_damaged_leases_are_named(references: References):
    leased(references, "main", owner="")
    flip_bit(references.directory / "leases" / "main.json", 30)
    with pytest.raises(DamagedReferenceError, match=r"leases/main\.json is damaged.*when no launch trains this run"):
        take(references, "main")
