"""F5: a disk that is full, at any write of a save: status 25, what was committed stays, the rest is given back.

First the refusal is simulated at each write in turn, and every later one until there is room again. Then a real file
system of 1 MiB fills up under a real training run, which goes on, to the same result, when it has grown.
"""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from counts import count, record, seed
from small_runs import check_launch, launched, name_of
from tiny_job import command, launch, make_data, results, trained

from megalrps.checkpoint.errors import NoSpaceError
from megalrps.checkpoint.garbage import bytes_of
from megalrps.errors import EXIT_NO_SPACE, exit_status_of
from megalrps.training.metrics import MetricsFile

STRIDE = {True: 4, False: 1}[count("F5", small=4, full=60) < 60]
"""Every so many-th write is one to be refused."""
RECOVERED = 0.95
"""Of the bytes that a refused save has written, at least so much is free again when the run is opened."""


class FullDisk:
    """Refuses, with ``number``, the ``first``-th call that needs room and all later ones."""

    NEEDY = ("write", "mkdir", "open", "replace")

    def __init__(self, first: int, number: int) -> None:
        self.first, self.number, self.calls, self.refused = first, number, 0, ""

    @contextmanager
    def fills(self) -> Iterator[None]:
        """The disk is so while the block runs."""
        with mock.patch.multiple(os, **{name: self._wrapped(name, getattr(os, name)) for name in self.NEEDY}):
            yield

    def _wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operate(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and (not args[1] & os.O_CREAT or Path(args[0]).exists()):
                return original(*args, **kwargs)
            self.calls += 1
            if self.calls < self.first:
                return original(*args, **kwargs)
            if not self.refused:
                self.refused = f"{name} of {args[0]}"
                if name == "write":
                    original(args[0], args[1][: len(args[1]) // 2])
            raise OSError(self.number, os.strerror(self.number), *args[:1])

        return operate


def check_refusal(root: Path, first: int, number: int) -> str:
    """Fill the disk at a write of the third save; returns which one was refused, "" when there are not so many."""
    disk = FullDisk(first, number)
    with launched(root) as run:
        for step in (1, 2):
            run.save(step)
        before = bytes_of(root)
        try:
            with disk.fills():
                run.save(3)
        except NoSpaceError as refusal:
            assert exit_status_of(refusal) == EXIT_NO_SPACE
            assert "make room and start again" in str(refusal) and "\n" not in str(refusal)
        else:
            assert not disk.refused, f"a save has succeeded on a full disk: {disk.refused}"
            return ""
        partial = [entry for entry in run.store.directory.iterdir() if entry.name.startswith(".")]
        assert not partial, f"something half-made is left: {partial}"
        # the same launch goes on when there is room, past a checkpoint that is whole and was not acknowledged
        visible = name_of(3) in run.store.names()
        after = bytes_of(root)
        assert visible or after - before <= (1 - RECOVERED) * before / 2, f"{after - before} bytes are not given back"
        run.save(4)
    with launched(root) as run:
        check_launch(run, [1, 2, *[3] * visible, 4])
        run.save(5)
    return disk.refused


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_full_disk_at_every_write_of_a_save(tmp_path: Path, number: int):
    first, refused = 1 + seed() % STRIDE, []
    while True:
        place = check_refusal(tmp_path / str(first), first, number)
        if not place:
            break
        refused.append(place)
        first += STRIDE
    assert len(refused) >= 16 // STRIDE, f"the writes are no longer seen: {refused}"
    record("F5", **{f"refused writes, {errno.errorcode[number]}": len(refused)})


# --- a real one -------------------------------------------------------------------------------------------------------


@contextmanager
def file_system(place: Path, kibibytes: int) -> Iterator[Callable[[str], None]]:
    """A file system of that size at ``place``; yields what remounts it with other options. Skips without the right."""
    place.mkdir()
    options = f"size={kibibytes}k,mode=700"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system here: {mounted.stderr.strip()}")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_run_on_a_disk_that_fills_up(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Status 25 and one line; the room of the save that failed is there again; more room, and the run ends the same."""
    data = make_data(tmp_path / "data", [8])
    flags = ("--save-interval", "2", "--save-keep", "9", "--paradigm", "ptfs")
    whole = trained(command(data, tmp_path / "whole", *flags))
    with file_system(tmp_path / "small", 1024) as remount:
        run = tmp_path / "small" / "run"
        assert launch(command(data, run, *flags)) == EXIT_NO_SPACE
        said = capfd.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("pretrain_gpt.py: error: ") and "No space left on device" in said
        names = sorted(entry.name for entry in (run / "checkpoints").iterdir())
        assert names and all(name.startswith(("main-", "v1-")) for name in names), (
            f"something half-made is left: {names}"
        )
        used = sum(block.st_blocks * 512 for block in map(Path.stat, run.rglob("*")) if block.st_nlink == 1)
        state = os.statvfs(tmp_path / "small")
        free = state.f_bavail * state.f_frsize
        assert used + free >= RECOVERED * 1024 * 1024
        assert launch(command(data, run, *flags)) == EXIT_NO_SPACE, "there is no more room than before"
        remount("size=64m")
        assert launch(command(data, run, *flags)) == 0
        assert results(run) == results(whole)
        record("F5", bytes_of_the_disk=1 << 20, checkpoints_before_it_was_full=len(names), free_after_refusal=free)


def test_a_log_that_does_not_fit(tmp_path: Path):
    """Half a line may be left of the step that did not fit; the next launch drops it, and whole lines stay."""
    from small_runs import PATH, line_of

    with file_system(tmp_path / "small", 64) as remount:
        path = tmp_path / "small" / "metrics.jsonl"
        written = 0
        with pytest.raises(OSError, match="No space left") as refusal, MetricsFile(path, {}) as metrics:
            for step in range(1, 1000):
                metrics.write(line_of(step))
                written = step
        assert refusal.value.errno == errno.ENOSPC
        assert 100 < written < 999
        remount("size=1m")
        with MetricsFile(path, {PATH: written}) as metrics:
            metrics.write(line_of(written + 1))
        assert len(path.read_text().splitlines()) == written + 1
