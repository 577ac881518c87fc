"""Where the other ranks of a launch are: each posts its phase and a beat in the launch's key-value store.

The store is the one that the ranks found each other through. It has a thread of its own here, because a call of it may
wait for ever (under c10d the store can live in a rank that has been stopped), and nobody else may wait with it. No
clock of another host is believed: a rank is silent when its count of beats stands still for as long as this one looks.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch.distributed as dist

BEATS_TO_BE_SILENT = 3.0
"""A rank whose count stands still for so many intervals is told as silent."""


@dataclass(frozen=True)
class Sign:
    """What a rank posts: its phase, how many it has ``entered``, for how many ``seconds`` it has been in this one.

    ``beat`` counts the posts. ``ended``: how it left the run, where it has.
    """

    phase: str
    entered: int
    seconds: float = 0.0
    beat: int = 0
    ended: str = ""


@dataclass(frozen=True)
class Seen:
    """The last sign of a rank, and for how many seconds at least it has given no newer one, where that is long."""

    sign: Sign
    silent: float | None = None


class Peers:
    """The board of the ranks of a launch, as ``rank`` of ``size`` sees it; ``store`` None: it is alone.

    ``sign`` tells what this rank is doing; it is called every ``interval`` seconds while the board is kept.
    """

    def __init__(
        self, rank: int, size: int, store: dist.Store | None, sign: Callable[[], Sign], interval: float
    ) -> None:
        self.rank, self.size, self.interval = rank, size, interval
        self._sign = sign
        self._store = None if store is None or size == 1 else dist.PrefixStore("peers", store.clone())  # type: ignore[attr-defined]  # torch's stubs lack it
        self._seen: dict[int, tuple[Sign, float]] = {}  # and when its count last moved
        self._read_at = 0.0
        self._looking, self._over, self._gone = threading.Event(), threading.Event(), threading.Event()
        self._beats = 0
        self._thread = threading.Thread(target=self._keep, name="peers", daemon=True)

    def start(self) -> None:
        """Begin to post."""
        if self._store is not None:
            self._thread.start()

    def stop(self, ended: str) -> None:
        """Post how this rank leaves the run, and no more."""
        self._over.set()
        if self._store is not None and not self._gone.is_set():
            self._thread.join(self.interval)
            within(1.0, lambda: self._post(Sign("the end", self._sign().entered, ended=ended)))

    def look(self) -> None:
        """From now on read what the others post, too: there is something to explain."""
        self._looking.set()

    def seen(self) -> Mapping[int, Seen]:
        """Every rank's last sign, those that gave none left out. Waits until silence can be told from a late beat."""
        if self._store is None:
            return {self.rank: Seen(self._sign())}
        self.look()
        asked, patience = time.monotonic(), BEATS_TO_BE_SILENT * self.interval
        deadline = asked + patience + 2 * self.interval
        while not (self._gone.is_set() or self._can_tell(asked, patience)) and time.monotonic() < deadline:
            time.sleep(self.interval / 4)
        read = self._read_at  # not now: where the store does not answer, that says nothing of the ranks
        seen = {
            rank: Seen(sign, read - moved if read - moved >= patience and not sign.ended else None)
            for rank, (sign, moved) in sorted(self._seen.copy().items())
        }
        return seen | {self.rank: Seen(self._sign())}

    def claim(self) -> bool:
        """Whether this rank is the one to tell what all of them have come to know; True where nobody answers."""
        store = None if self._gone.is_set() else self._store
        first = None if store is None else within(1.0, lambda: store.add("told", 1) == 1)
        return first is not False

    def _can_tell(self, asked: float, patience: float) -> bool:
        """Whether every other rank has beaten since ``asked``, or has not for ``patience`` seconds."""
        seen, read = self._seen.copy(), self._read_at
        return len(seen.keys() | {self.rank}) == self.size and all(
            rank == self.rank or sign.ended or moved > asked or read - moved >= patience
            for rank, (sign, moved) in seen.items()
        )

    def _keep(self) -> None:
        while not self._over.is_set():
            try:
                self._post(self._sign())
                if self._looking.is_set():
                    self._read()
            except RuntimeError:  # the host of the store is gone, and with it the launch; torch logs it
                self._gone.set()
                return
            self._over.wait(self.interval)

    def _post(self, sign: Sign) -> None:
        assert self._store is not None
        self._beats += 1
        self._store.set(str(self.rank), json.dumps(asdict(sign) | {"beat": self._beats}))

    def _read(self) -> None:
        assert self._store is not None
        for rank in range(self.size):
            if self._over.is_set() or not self._store.check([str(rank)]):
                continue
            sign = Sign(**json.loads(self._store.get(str(rank))))
            known = self._seen.get(rank)
            if known is None or known[0].beat != sign.beat:
                self._seen[rank] = sign, time.monotonic()
        self._read_at = time.monotonic()


def within(seconds: float, act: Callable[[], object]) -> object | None:
    """What ``act`` gives, or None where it fails or takes longer: for what must not be waited for."""
    answers: list[object] = []

    def run() -> None:
        try:
            answers.append(act())
        except Exception:
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None
