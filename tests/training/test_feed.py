"""The feed: the same samples as without it, whatever is asked for in which order; bounded; and it ends."""

import itertools
import random
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_job import SEQUENCE_LENGTH, TinyData, command, metrics, opened, trained

from megalrps.data.increment import open_increment
from megalrps.data.options import DataOptions
from megalrps.data.stream import SampleStream
from megalrps.errors import InputError
from megalrps.paths.plan import Window
from megalrps.training import feed as feed_module
from megalrps.training import loop
from megalrps.training.feed import AHEAD_PER_THREAD, AT_ONCE, Draw, Feed, HostLane, Share, Waits
from megalrps.training.loop import Loop
from megalrps.training.page_locked import PageLockedLane, lanes_to

WINDOWS = tuple(Window(start, start + 40, (name,)) for start, name in ((0, "a"), (40, "b"), (80, "c")))
PATIENCE = 20.0  # seconds until a thread that should have done something is taken for dead


def share_of(draw: Draw) -> Share:
    """Values that tell one draw from every other."""
    tokens = draw.indices()[:, None] + 1000 * draw.window.start + np.arange(3)
    return Share(tokens, (tokens[:, 1:] % 7).astype(np.int32), tokens[:, 1:] % 2 == 0)


def course(window: Window, update: int, count: int = 4) -> list[Draw]:
    """The draws of ``window`` from ``update`` on."""
    return [Draw(window, each * count, count) for each in range(update, 40)]


def same(share: Share, draw: Draw) -> bool:
    wanted = share_of(draw)
    return all(np.array_equal(np.asarray(each), vars(wanted)[name]) for name, each in vars(share).items())


def feed_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("feed ")]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No thread of a feed outlives its block."""
    yield
    assert feed_threads() == []


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class LateCopier:
    """A device that copies at the last moment it may: when somebody waits for it. Counts what it is asked for."""

    def __init__(self) -> None:
        self.entered: list[int] = []
        self.made = 0
        self.received_by: set[str] = set()

    def enter(self) -> None:
        self.entered.append(threading.get_ident())

    def page_locked(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        assert threading.get_ident() in self.entered
        self.made += 1
        return torch.empty(shape, dtype=dtype)

    def copy(self, sources: Any) -> Any:
        copies = [torch.full_like(source, 0) for source in sources]
        return copies, LateCopy(sources, copies)

    def receive(self, copies: Any, done: "LateCopy") -> None:
        assert all(one is other for one, other in zip(copies, done.copies, strict=True))
        self.received_by.add(threading.current_thread().name)
        done.synchronize()


class LateCopy:
    def __init__(self, sources: list[torch.Tensor], copies: list[torch.Tensor]) -> None:
        self.pairs, self.copies = list(zip(sources, copies, strict=True)), copies
        self.lock = threading.Lock()

    def synchronize(self) -> None:
        with self.lock:
            while self.pairs:
                source, copy = self.pairs.pop()
                copy.copy_(source)


@pytest.mark.parametrize("kind", ["host", "late device"])
@pytest.mark.parametrize("threads", [0, 1, 3])
def test_every_draw_of_a_random_schedule_is_given_as_if_there_were_no_feed(restless: None, threads: int, kind: str):
    copier = LateCopier()
    lanes: Callable[[], Any] = HostLane if kind == "host" else lambda: PageLockedLane(copier)
    for seed in range(8):
        chance = random.Random(seed)
        with Feed(share_of, threads=threads, lanes=lanes) as feed:
            window, update = WINDOWS[0], 0
            for turn in range(60):
                does = chance.random()
                if turn == 0 or does < 0.1:  # a restart, a jump back, a switch to another path
                    window, update = chance.choice(WINDOWS), chance.randrange(40)
                    feed.follow(course(window, update))
                elif does < 0.2:  # somebody asks for what nobody foresaw
                    draw = Draw(chance.choice(WINDOWS), chance.randrange(160), chance.randrange(1, 6))
                    assert same(feed.take(draw), draw), (seed, turn)
                    continue
                elif does < 0.25:  # some are left out
                    update += chance.randrange(8)
                draw = Draw(window, update % 40 * 4, 4)
                update += 1
                assert same(feed.take(draw), draw), (seed, turn)
    if kind == "late device":
        assert copier.received_by == {threading.current_thread().name}


def test_streams_are_used_by_several_threads_at_once(restless: None, data: TinyData):
    increments = [open_increment(prefix) for prefix in data.increments]
    window = Window(0, 100, ("a", "b", "c"))
    draws = [Draw(window, 7 * number, 7) for number in range(200)]  # several epochs
    calm = SampleStream(increments, SEQUENCE_LENGTH, seed=5)
    expected = [calm.samples(draw.indices()) for draw in draws]
    for _ in range(5):
        stream = SampleStream(increments, SEQUENCE_LENGTH, seed=5)  # knows nothing yet: threads meet in its caches
        with Feed(lambda draw, stream=stream: Share(stream.samples(draw.indices())), threads=4) as feed:
            feed.follow(draws)
            for draw, tokens in zip(draws, expected, strict=True):
                assert np.array_equal(feed.take(draw).tokens, tokens)


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_comes_at_its_own_update_with_its_own_type(threads: int):
    class RemoteGoneError(InputError):
        pass

    bad = {5: RemoteGoneError("gone"), 6: MemoryError("full"), 9: SystemExit(3)}

    def read(draw: Draw) -> Share:
        if draw.window is WINDOWS[0] and draw.first // 4 in bad:
            raise bad[draw.first // 4]
        return share_of(draw)

    with Feed(read, threads=threads) as feed:
        draws = course(WINDOWS[0], 0)
        feed.follow(draws)
        for number, draw in enumerate(draws[:8]):
            if number in bad:
                with pytest.raises(type(bad[number])) as caught:
                    feed.take(draw)
                assert caught.value is bad[number]
            else:
                assert same(feed.take(draw), draw)
        feed.follow(course(WINDOWS[1], 0))  # the path is left before its next bad update
        for draw in course(WINDOWS[1], 0):
            assert same(feed.take(draw), draw)


def test_no_more_is_made_and_kept_than_there_is_room_for():
    reads, read, alive = Counter[int](), threading.Semaphore(0), list[Any]()

    def reading(draw: Draw) -> Share:
        share = share_of(draw)
        reads[draw.first // 4] += 1
        alive.append(weakref.ref(share.tokens))
        read.release()
        return share

    room = 2 * AHEAD_PER_THREAD
    with Feed(reading, threads=2) as feed:
        draws = course(WINDOWS[0], 0)
        feed.follow(draws)
        for taken in range(3 * AT_ONCE):
            if taken % AT_ONCE == 0:
                for _ in range(AT_ONCE if taken else room):
                    assert read.acquire(timeout=PATIENCE)
            assert not read.acquire(timeout=0.01)
            assert len(reads) == taken - taken % AT_ONCE + room
            assert sum(each() is not None for each in alive) <= room
            feed.take(draws[taken])
    assert set(reads.values()) == {1}


def test_a_branch_takes_what_was_read_for_the_main_path():
    reads = Counter[Draw]()

    def reading(draw: Draw) -> Share:
        reads[draw] += 1
        return share_of(draw)

    main = course(WINDOWS[0], 0)
    with Feed(reading, threads=1) as feed:
        feed.follow(main)
        for draw in main[:10]:
            feed.take(draw)
        feed.follow(main[10:20])  # the branch, over the same window
        for draw in main[10:20]:
            feed.take(draw)
    assert set(reads.values()) == {1}


def test_a_thread_that_is_stuck_holds_nobody_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(feed_module, "_SECONDS_TO_END", 0.05)
    reached, wakes = threading.Event(), threading.Event()

    def stuck(draw: Draw) -> Share:
        reached.set()
        assert wakes.wait(PATIENCE)
        return share_of(draw)

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Feed(stuck, threads=2) as feed:
        feed.follow(course(WINDOWS[0], 0))
        assert reached.wait(PATIENCE)
        raise KeyboardInterrupt
    assert time.monotonic() - began < PATIENCE / 2
    left = feed_threads()
    assert left and all(thread.daemon for thread in left)
    wakes.set()
    for thread in left:
        thread.join(PATIENCE)


def test_page_locked_buffers_are_made_once_and_not_refilled_before_they_are_copied():
    copier = LateCopier()
    lane = PageLockedLane(copier)
    draws = course(WINDOWS[0], 0)
    sent = [lane.send(share_of(draw)) for draw in draws[:7]]
    assert copier.made == 6  # two sets of three
    for receive, draw in zip(sent, draws, strict=False):
        assert same(receive(), draw)
    plain = lane.send(Share(share_of(draws[0]).tokens))()
    assert (plain.starts_BS, plain.counted_BS, copier.made) == (None, None, 6)
    shorter = Draw(WINDOWS[0], 0, 3)
    assert same(lane.send(share_of(shorter))(), shorter)
    assert copier.made == 9


@pytest.mark.gpu
@pytest.mark.parametrize("threads", [0, 2])
def test_shares_come_whole_to_a_busy_gpu(threads: int):
    window, count, length = WINDOWS[0], 64, 4097

    def large(draw: Draw) -> Share:
        tokens = (draw.indices()[:, None] * 31 + np.arange(length)) % 50_000
        return Share(tokens, tokens[:, 1:].astype(np.int32), tokens[:, 1:] % 2 == 0)

    device = torch.device("cuda")
    matrix = torch.randn(4096, 4096, device=device)
    with Feed(large, threads=threads, lanes=lanes_to(device)) as feed:
        draws = course(window, 0, count)
        feed.follow(draws)
        wrong = torch.zeros((), dtype=torch.int64, device=device)
        for draw in draws:
            share, wanted = feed.take(draw), large(draw)
            matrix = torch.tanh(matrix @ matrix)  # the loop's stream is behind the copies by far
            for name, each in vars(wanted).items():
                found = vars(share)[name]
                assert found.device.type == "cuda" and found.dtype == torch.from_numpy(each).dtype
                wrong += (found != torch.from_numpy(each).to(device)).sum()
            del share, found  # its memory goes back while the comparison is still to be computed
        assert int(wrong) == 0


def test_a_wait_is_told_once_and_with_the_mend():
    waits = Waits(threads=2)
    assert [waits.note(0.09, 1.0) for _ in range(120)] == [None] * 120  # nine in a hundred
    assert waits.note(30.0, 100.0) is None  # one look at a cold disk
    said = [text for text in (waits.note(0.5, 2.0) for _ in range(200)) if text is not None]
    assert len(said) == 1
    assert "of the last 1" in said[0] and "--num-workers (now 2)" in said[0]


def test_a_negative_number_of_threads_is_refused():
    with pytest.raises(InputError, match="--num-workers -1"):
        DataOptions(increments=("a",), num_workers=-1).check()


def test_the_threads_read_the_whole_plan_each_draw_before_its_update_and_change_nothing(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    read, reads = Loop._read, Counter[tuple[str, Draw]]()
    follow, begun = Feed.follow, list[bool]()

    def reading(self: Loop, draw: Draw) -> Share:
        reads[threading.current_thread().name[:5], draw] += 1
        return read(self, draw)

    def following(self: Feed, course: Iterator[Draw]) -> None:
        first = next(course)
        begun.append(first in [task.draw for task in self._ahead])
        follow(self, itertools.chain([first], course))

    monkeypatch.setattr(Loop, "_read", reading)
    monkeypatch.setattr(Feed, "follow", following)
    lines = {}
    for threads in (2, 0):
        with opened(command(data.first(2), tmp_path / f"{threads}", "--num-workers", str(threads))) as run:
            loop.train(run)
        if threads:
            assert begun.count(False) == 1, "a segment's first update is begun while the one before it is trained"
        clocks = {"seconds", "data_seconds", "tokens_per_second"}
        written = metrics(tmp_path / f"{threads}")
        lines[threads] = [{name: each for name, each in line.items() if name not in clocks} for line in written]
    assert lines[0] == lines[2]
    plan = run.job.plan
    draws = Counter(
        Loop(run)._draw(plan.window_at(segment.path, step), step)
        for segment in plan.segments
        for step in range(segment.start + 1, segment.end + 1)
    )
    ahead = Counter({draw: times for (name, draw), times in reads.items() if name == "feed "})
    assert set(ahead) == set(draws)
    assert ahead <= draws  # over a switch of paths, one read may do for both
    assert Counter({draw: times for (name, draw), times in reads.items() if name != "feed "}) == draws  # without


def test_a_loop_waits_in_the_phase_of_data_and_ends_with_the_error_of_its_update(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    read, phases = Loop._read, list[str]()

    def reading(self: Loop, draw: Draw) -> Share:
        update = draw.first // draw.count + 1
        if update == 3:
            until = time.monotonic() + PATIENCE
            while not self.run.watch.phase.endswith("step 3 of path main") and time.monotonic() < until:
                time.sleep(0.001)
            time.sleep(0.02)
            phases.append(self.run.watch.phase)
        if update == 4:
            raise InputError("the store is gone")
        return read(self, draw)

    monkeypatch.setattr(Loop, "_read", reading)
    with pytest.raises(InputError, match="the store is gone"):
        trained(command(data, tmp_path / "run"))
    lines = metrics(tmp_path / "run")
    assert phases == ["data of step 3 of path main"]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert 0.02 <= lines[2]["data_seconds"] <= lines[2]["seconds"]
