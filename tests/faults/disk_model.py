"""A disk that may lose power: what it was told, and every state in which it may come back.

The model is POSIX, not a file system: until a file is synced, of what was written there may be nothing, a part, zeros,
or all; until a directory is synced, each of its changes may be there or not, whatever the order they were made in. A
rename is there whole or not at all. (The enumeration is that of crash-consistency checkers: Pillai et al. 2014, "All
file systems are not created equal", ALICE; Mohan et al. 2018, CrashMonkey.)
"""

import builtins
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

FEW_CHANGES = 5
"""So many unsynced directory entries are tried in every subset."""
FEW_FILES = 2
"""So many unsynced files are tried in every combination."""
REST = ("nothing", "half", "zeros", "all")
"""What there may be of the bytes that were written to a file and not synced."""


@dataclass(frozen=True)
class Change:
    """Entries of ``directory`` that change together: ``sets`` name to inode, None removes it."""

    directory: int
    sets: tuple[tuple[str, int | None], ...]


@dataclass(frozen=True)
class Written:
    """Bytes appended to ``inode``."""

    inode: int
    content: bytes


@dataclass(frozen=True)
class Synced:
    """``inode`` was synced; ``what`` it is, in words."""

    inode: int
    what: str


@dataclass(frozen=True)
class Acknowledged:
    """A save returned."""

    step: int


Operation = Change | Written | Synced | Acknowledged


class Recorder:
    """Records what happens under ``root`` through ``os`` and ``open``; nothing is really synced meanwhile.

    ``what``: the words for a synced thing, given its path under ``root`` and the last change made in it.
    """

    def __init__(self, root: Path, what: Callable[[str, Change | None], str]) -> None:
        self.root, self.operations = root, list[Operation]()
        self._what = what
        self._inodes = itertools.count(1)
        self.directories: dict[int, dict[str, int]] = {0: {}}
        self._paths: dict[int, str] = {0: ""}
        self._descriptors: dict[int, int] = {}
        self._streams: dict[int, tuple[Any, int]] = {}

    def acknowledge(self, step: int) -> None:
        """A save has returned to who asked for it."""
        self._poll()
        self.operations.append(Acknowledged(step))

    @contextmanager
    def recording(self) -> Iterator["Recorder"]:
        """Record while the block runs."""
        with ExitStack() as stack:
            for name in ("open", "write", "fsync", "close", "mkdir", "rename", "replace", "unlink", "rmdir"):
                operate = getattr(self, f"_{name}")
                stack.enter_context(mock.patch.object(os, name, _bound(operate, getattr(os, name))))
            stack.enter_context(mock.patch.object(builtins, "open", _bound(self._stream, builtins.open)))
            yield self
            self._poll()

    @property
    def told(self) -> "Recording":
        """What was recorded."""
        return Recording(tuple(self.operations), frozenset(self.directories))

    def _place(self, path: Any, dir_fd: int | None = None) -> tuple[int, str] | None:
        """The directory's inode and the name in it; None outside the root."""
        if isinstance(path, int):
            return None
        if dir_fd is not None:
            holder = self._descriptors.get(dir_fd)
            return None if holder is None else (holder, os.fspath(path))
        try:
            parts = Path(path).relative_to(self.root).parts
        except ValueError:
            return None
        holder = 0
        for part in parts[:-1]:
            holder = self.directories[holder][part]
        return holder, parts[-1] if parts else ""

    def _inode(self, place: tuple[int, str]) -> int | None:
        return self.directories[place[0]].get(place[1]) if place[1] else place[0]

    def _change(self, directory: int, **sets: int | None) -> None:
        self._poll()
        for name, inode in sets.items():
            if inode is None:
                self.directories[directory].pop(name)
            else:
                self.directories[directory][name] = inode
                self._paths[inode] = f"{self._paths[directory]}/{name}".lstrip("/")
        self.operations.append(Change(directory, tuple(sets.items())))

    def _made(self, place: tuple[int, str]) -> int:
        inode = next(self._inodes)
        self._change(place[0], **{place[1]: inode})
        return inode

    def _open(self, original: Any, path: Any, flags: int, *args: Any, dir_fd: int | None = None, **kwargs: Any) -> int:
        place = self._place(path, dir_fd)
        descriptor: int = original(path, flags, *args, dir_fd=dir_fd, **kwargs)
        self._descriptors.pop(descriptor, None)
        if place is not None:
            inode = self._inode(place)
            if inode is None:
                assert flags & os.O_CREAT, f"{path} was made unseen"
                inode = self._made(place)
            self._descriptors[descriptor] = inode
        return descriptor

    def _stream(self, original: Any, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        place = self._place(path)
        stream = original(path, mode, *args, **kwargs)
        if place is not None and mode[0] in "aw":
            inode = self._inode(place)
            self._streams[inode or self._made(place)] = (stream, os.fstat(stream.fileno()).st_size)
            self._descriptors[stream.fileno()] = inode or self._inode(place) or 0
        return stream

    def _poll(self) -> None:
        """Note what the streams have written meanwhile."""
        for inode, (stream, known) in list(self._streams.items()):
            content = Path(self.root, self._paths[inode]).read_bytes()
            if len(content) > known:
                self.operations.append(Written(inode, content[known:]))
                self._streams[inode] = (stream, len(content))

    def _write(self, original: Any, descriptor: int, content: Any) -> int:
        count: int = original(descriptor, content)
        if descriptor in self._descriptors:
            self.operations.append(Written(self._descriptors[descriptor], bytes(content[:count])))
        return count

    def _fsync(self, original: Any, descriptor: int) -> None:
        self._poll()
        inode = self._descriptors.get(descriptor)
        if inode is not None:
            changes = (each for each in reversed(self.operations) if isinstance(each, Change))
            last = next((change for change in changes if change.directory == inode), None)
            self.operations.append(Synced(inode, self._what(self._paths[inode], last)))

    def _close(self, original: Any, descriptor: int) -> None:
        self._descriptors.pop(descriptor, None)
        original(descriptor)

    def _mkdir(self, original: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        original(path, *args, **kwargs)
        place = self._place(path, kwargs.get("dir_fd"))
        if place is not None:
            self.directories[self._made(place)] = {}

    def _rename(self, original: Any, source: Any, target: Any) -> None:
        original(source, target)
        before, after = self._place(source), self._place(target)
        if before is not None and after is not None:
            assert before[0] == after[0], "a rename from one directory to another is not modelled"
            self._change(before[0], **{before[1]: None, after[1]: self._inode(before)})

    _replace = _rename

    def _unlink(self, original: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        original(path, *args, **kwargs)
        place = self._place(path, kwargs.get("dir_fd"))
        if place is not None:
            self._change(place[0], **{place[1]: None})

    _rmdir = _unlink


def _bound(operate: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return operate(original, *args, **kwargs)

    return call


@dataclass(frozen=True)
class State:
    """What there is after a loss of power: for each path, sorted, what :meth:`Recording.tree` makes of it."""

    acknowledged: tuple[int, ...]
    """The steps whose saves had returned by then."""
    entries: tuple[tuple[str, int, int, int], ...]
    """Path, inode (-1 for a directory), bytes there of what was ever written to it, and zeros behind them."""


@dataclass(frozen=True)
class Recording:
    """What a disk was told; ``directories`` are the inodes that are."""

    operations: tuple[Operation, ...]
    directories: frozenset[int]

    def without(self, kind: str) -> "Recording":
        """The same without what :class:`Synced` calls ``kind``."""
        kept = tuple(each for each in self.operations if not (isinstance(each, Synced) and each.what == kind))
        assert len(kept) < len(self.operations), f"nothing of the kind was synced: {kind}"
        return Recording(kept, self.directories)

    @cached_property
    def written(self) -> Mapping[int, bytes]:
        """All that was ever written, by inode."""
        written: dict[int, list[bytes]] = {}
        for operation in self.operations:
            if isinstance(operation, Written):
                written.setdefault(operation.inode, []).append(operation.content)
        return {inode: b"".join(parts) for inode, parts in written.items()}

    def states(self) -> list[State]:
        """Every different state after power was lost at any moment."""
        disk, acknowledged, seen = _Disk(), (), dict[State, None]()
        for operation in (None, *self.operations):
            if isinstance(operation, Acknowledged):
                acknowledged = (*acknowledged, operation.step)
            elif operation is not None:
                disk.do(operation)
            for chosen in _subsets(disk.changes):
                paths = tuple(_walk(_after(disk.entries, chosen), 0, "", self.directories))
                unsynced = [inode for _, inode in paths if disk.synced.get(inode, 0) < disk.length.get(inode, 0)]
                for rests in _rests(len(unsynced)):
                    kinds = dict(zip(unsynced, rests, strict=True))
                    entries = tuple(
                        (path, -1, 0, 0)
                        if inode in self.directories
                        else (path, inode, *disk.kept(inode, kinds.get(inode, "all")))
                        for path, inode in paths
                    )
                    seen.setdefault(State(acknowledged, entries))
        return list(seen)

    def materialise(self, state: State, root: Path) -> None:
        """Make what there is in ``state`` in the empty directory ``root``."""
        for path, inode, length, zeros in state.entries:
            if inode < 0:
                (root / path).mkdir()
            else:
                (root / path).write_bytes(self.written.get(inode, b"")[:length] + bytes(zeros))


@dataclass
class _Disk:
    """What is durable at one moment, and what was told since."""

    entries: dict[int, dict[str, int]] = field(default_factory=lambda: {0: {}})
    synced: dict[int, int] = field(default_factory=dict)
    length: dict[int, int] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)

    def do(self, operation: Operation) -> None:
        if isinstance(operation, Change):
            self.changes.append(operation)
        elif isinstance(operation, Written):
            self.length[operation.inode] = self.length.get(operation.inode, 0) + len(operation.content)
        elif isinstance(operation, Synced):
            self.synced[operation.inode] = self.length.get(operation.inode, 0)
            self.entries = _after(self.entries, [c for c in self.changes if c.directory == operation.inode])
            self.changes = [change for change in self.changes if change.directory != operation.inode]

    def kept(self, inode: int, rest: str) -> tuple[int, int]:
        """Bytes, and zeros behind them."""
        synced, length = self.synced.get(inode, 0), self.length.get(inode, 0)
        return {
            "nothing": (synced, 0),
            "half": ((synced + length) // 2, 0),
            "zeros": (synced, length - synced),
            "all": (length, 0),
        }[rest]


def _after(entries: Mapping[int, Mapping[str, int]], changes: Sequence[Change]) -> dict[int, dict[str, int]]:
    after = {directory: dict(names) for directory, names in entries.items()}
    for change in changes:
        names = after.setdefault(change.directory, {})
        for name, inode in change.sets:
            if inode is None:
                names.pop(name, None)
            else:
                names[name] = inode
    return after


def _subsets(changes: Sequence[Change]) -> Iterator[list[Change]]:
    """All where they are few; else those up to each one, all but each one, and each one alone."""
    if len(changes) <= FEW_CHANGES:
        for kept in itertools.product((False, True), repeat=len(changes)):
            yield [change for change, keep in zip(changes, kept, strict=True) if keep]
        return
    for place in range(len(changes) + 1):
        yield list(changes[:place])
        yield [*changes[:place], *changes[place + 1 :]]
        yield list(changes[place : place + 1])


def _rests(files: int) -> Iterator[tuple[str, ...]]:
    """All where they are few; else the same for every file, and all of every file but one."""
    if files <= FEW_FILES:
        yield from itertools.product(REST, repeat=files)
        return
    for rest in REST:
        yield (rest,) * files
    for place, rest in itertools.product(range(files), REST[:-1]):
        yield tuple(rest if each == place else REST[-1] for each in range(files))


def _walk(
    entries: Mapping[int, Mapping[str, int]], directory: int, path: str, directories: frozenset[int]
) -> Iterator[tuple[str, int]]:
    for name, inode in sorted(entries.get(directory, {}).items()):
        inside = f"{path}/{name}".lstrip("/")
        yield inside, inode
        if inode in directories:
            yield from _walk(entries, inode, inside, directories)
