"""Leases: one writer a path, whatever is launched twice. No torch.

A launch takes the lease of every path that it trains, with a fencing number that only grows, and shows that it lives by
counting beats. Whether a holder is dead is known at once where its process can be looked up, and otherwise when its
count has stood still for as long as another launch watches it: no clock of another host is believed. If that
was a mistake, the number decides: every commit is made under the lineage's lock and looks at it first, so a holder that
was only asleep has committed nothing since, and is told so (Gray & Cheriton 1989, leases; Chubby's sequencers, Burrows
2006, section 2.4).
"""

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from megalrps.checkpoint.errors import DamagedReferenceError, FencedError, HeldError, UnknownFormatError
from megalrps.checkpoint.names import check_name
from megalrps.checkpoint.references import LockedReferences, References
from megalrps.checkpoint.sealed import read_sealed, write_sealed
from megalrps.files import sync_directory

FORMAT = 1
BEATS = 3
"""A holder beats so many times in the time after which it counts as dead."""

_WATCHED_EVERY = 0.5


@dataclass(frozen=True)
class Place:
    """A process, as others may look it up: only those of the same kernel and process namespace can."""

    host: str
    boot: str
    namespace: str
    pid: int
    started: int
    """Clock ticks after boot: numbers of processes are used again."""


@dataclass(frozen=True)
class Lease:
    """Who trains ``path``. ``owner`` is a number of its own for each launch, empty once the lease was given back."""

    path: str
    fence: int
    owner: str
    place: Place
    beats: int
    reads: tuple[str, ...]
    """Checkpoints that the holder is going to load: not to be collected."""
    since: str
    """UTC, ISO 8601: for people; nothing is decided by it."""
    seconds: float = 0.0
    """Without a beat for so long the holder wants to count as dead; a beat comes BEATS times in it."""

    @property
    def holder(self) -> str:
        """In words."""
        return f"process {self.place.pid} on {self.place.host}, since {self.since}"


def this_place() -> Place:
    """The calling process."""
    pid = os.getpid()
    return Place(socket.gethostname(), _boot(), _namespace(), pid, _started(pid) or 0)


def is_over(lease: Lease) -> bool | None:
    """Whether the holder is known to be gone; None: it cannot be looked up from here."""
    if not lease.owner:
        return True
    place = lease.place
    if (place.host, place.boot, place.namespace) != (socket.gethostname(), _boot(), _namespace()):
        return None
    return _started(place.pid) != place.started


@dataclass(frozen=True)
class _Seen:
    """A lease as it was when it was first looked at, and when that was, by this host's monotonic clock."""

    owner: str
    beats: int
    at: float


class Leases:
    """The leases of one lineage, in ``RUN/lineage/leases``."""

    def __init__(self, references: References) -> None:
        self.references = references
        self.directory = references.directory / "leases"

    def prepare(self) -> None:
        """Make the directory where it is not."""
        self.directory.mkdir(parents=True, exist_ok=True)
        sync_directory(self.directory.parent)  # or the fencing numbers begin again at 1 after a loss of power

    def read(self, path: str) -> Lease | None:
        """The lease of ``path``, None where nobody ever held one; DamagedReferenceError or UnknownFormatError."""
        file = self._file(path)
        mend = "when no launch trains this run, remove it"
        value = read_sealed(file, FORMAT, mend)
        if value is None:
            return None
        try:
            members = {key: member for key, member in value.items() if key != "format"}
            return Lease(**{**members, "place": Place(**members["place"]), "reads": tuple(members["reads"])})
        except (TypeError, KeyError) as error:
            raise DamagedReferenceError(f"{file} is no lease ({error}): {mend}") from error

    def all(self) -> tuple[Lease, ...]:
        """Every lease that was ever taken, by path."""
        return tuple(lease for lease in map(self.read, self.names()) if lease is not None)

    def names(self) -> tuple[str, ...]:
        """The paths that were ever leased, those whose files are damaged too."""
        return tuple(sorted(file.stem for file in self.directory.glob("*.json") if not file.name.startswith(".")))

    def held(self) -> tuple[Lease, ...]:
        """Those whose holders are not known to be gone: what they train and read is in use."""
        return tuple(lease for lease in self.all() if is_over(lease) is not True)

    def acquire(
        self,
        reads: Mapping[str, Sequence[str]],
        *,
        seconds: float,
        watching: Callable[[str], None] = lambda text: None,
        waiting: Callable[[], None] = lambda: None,
    ) -> "HeldLeases":
        """Take the leases of all paths in ``reads`` (with the checkpoints to be loaded for each), or none of them.

        ``seconds``, or the holder's own where they are more, without a beat, watched from here, make a holder dead that
        cannot be looked up; ``watching`` is told once that this is being waited for, and ``waiting`` is called
        meanwhile, and may raise. Raises HeldError, having written nothing, while somebody else lives.
        """
        seen: dict[str, _Seen] = {}
        while True:
            with self.references.locked() as locked:
                before = {path: self.read(path) for path in reads}
                doubtful = [lease for lease in before.values() if lease and self._is_doubtful(lease, seen, seconds)]
                if not doubtful:
                    owner = secrets.token_hex(8)
                    taken = {
                        path: self._take(locked, path, before[path], owner, reads[path], seconds) for path in reads
                    }
                    return HeldLeases(self, taken, seconds / BEATS)
            if not seen:
                watching(
                    f"path {doubtful[0].path} was held by {doubtful[0].holder}: watching "
                    f"{max(seconds, doubtful[0].seconds):g} s for a sign of its life"
                )
            for lease in doubtful:
                seen.setdefault(lease.path, _Seen(lease.owner, lease.beats, time.monotonic()))
            waiting()
            time.sleep(min(_WATCHED_EVERY, seconds))

    def _is_doubtful(self, lease: Lease, seen: Mapping[str, "_Seen"], seconds: float) -> bool:
        """Whether it is not known yet if the holder lives, which was ``seen`` before; HeldError where it does.

        Every path is watched for its own time: one that was taken while another was being watched is not over with it.
        """
        over, first = is_over(lease), seen.get(lease.path)
        if over is None and first is None:
            return True
        if over is None and first is not None and (first.owner, first.beats) == (lease.owner, lease.beats):
            return time.monotonic() - first.at < max(seconds, lease.seconds)
        if not over:
            raise HeldError(
                f"path {lease.path} is being trained by another launch ({lease.holder}): wait for it or stop it; other "
                "paths of this run can be trained meanwhile (--paths)"
            )
        return False

    def _take(
        self,
        locked: LockedReferences,
        path: str,
        before: Lease | None,
        owner: str,
        reads: Sequence[str],
        seconds: float,
    ) -> Lease:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        lease = Lease(path, (before.fence if before else 0) + 1, owner, this_place(), 0, tuple(reads), since, seconds)
        self._write(locked, lease)
        return lease

    def _write(self, locked: LockedReferences, lease: Lease) -> None:
        assert locked.references is self.references
        write_sealed(self._file(lease.path), {"format": FORMAT, **asdict(lease), "reads": list(lease.reads)})

    def _file(self, path: str) -> Path:
        return self.directory / f"{check_name(path)}.json"


class HeldLeases:
    """Leases that this process holds; in a ``with`` block they beat, and are given back at its end."""

    def __init__(self, leases: Leases, taken: Mapping[str, Lease], seconds: float) -> None:
        self._leases = leases
        self._taken = dict(taken)
        self._seconds = seconds
        self._beaten = time.monotonic()
        self._over = threading.Event()
        self._beating = threading.Thread(target=self._beat_on, name="lease", daemon=True)
        self.lost: FencedError | DamagedReferenceError | UnknownFormatError | None = None
        """Why nothing can be committed any more, once a beat has found out."""

    @property
    def paths(self) -> frozenset[str]:
        """The paths that this process may commit to."""
        return frozenset(self._taken)

    @property
    def owner(self) -> str:
        """The number of this launch."""
        return next(iter(self._taken.values())).owner

    def check(self, locked: LockedReferences, path: str) -> int:
        """The fencing number of ``path``; raises FencedError where somebody else holds it now."""
        assert locked.references is self._leases.references
        mine, found = self._taken[path], self._leases.read(path)
        if found is None or (found.owner, found.fence) != (mine.owner, mine.fence):
            by = f" ({found.holder})" if found is not None and found.owner else ""
            raise FencedError(
                f"path {path} was taken over by another launch{by}: this one stops, and has committed nothing since"
            )
        return mine.fence

    def check_all(self, locked: LockedReferences) -> None:
        """Raise as :meth:`check` where somebody else holds any of the paths now."""
        for path in sorted(self._taken):
            self.check(locked, path)

    def beat(self) -> None:
        """Show that this process lives; raises FencedError as :meth:`check`."""
        with self._leases.references.locked() as locked:
            for path, lease in self._taken.items():
                self.check(locked, path)
                self._taken[path] = replace(lease, beats=lease.beats + 1)
                self._leases._write(locked, self._taken[path])
        self._beaten = time.monotonic()

    def are_held(self) -> bool:
        """Whether nobody else can have the paths: beaten lately, or now. For what is written without the lock."""
        if self.lost is None and time.monotonic() - self._beaten > (BEATS - 1) * self._seconds:
            self._try_to_beat()
        return self.lost is None

    def give_back(self) -> None:
        """Let others have the paths at once; leaves alone what others have taken."""
        with self._leases.references.locked() as locked:
            for path in self._taken:
                try:
                    self.check(locked, path)
                except (FencedError, DamagedReferenceError, UnknownFormatError):  # not ours any more, or not readable
                    continue
                self._leases._write(locked, replace(self._taken[path], owner=""))

    def __enter__(self) -> Self:
        self._beating.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._beating.join()
        try:
            self.give_back()
        except OSError:  # a full disk may be why the block ends; the next launch finds this process gone
            if error is None:
                raise

    def _beat_on(self) -> None:
        while not self._over.wait(self._seconds):
            self._try_to_beat()
            if self.lost is not None:
                return

    def _try_to_beat(self) -> None:
        try:
            self.beat()
        except (FencedError, DamagedReferenceError, UnknownFormatError) as error:
            self.lost = error
        except OSError:  # a disk that is full for a while: the count stands still, which is true
            return


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _namespace() -> str:
    return str(Path("/proc/self/ns/pid").readlink())


def _started(pid: int) -> int | None:
    """When the process started, in clock ticks after boot; None where there is none, or only its corpse."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
