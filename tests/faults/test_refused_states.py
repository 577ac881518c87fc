"""F16: clocks that jump decide nothing; what cannot be gone on from is refused, each by a status of its own and a mend.

A read-only store, a parent that has vanished, a reference to nothing, and files of versions to come.
"""

import json
import re
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from counts import record
from damages import rewrite
from small_runs import check_launch, launched, name_of
from test_full_disk import file_system
from tiny_job import command, launch, make_data, trained

from megalrps.checkpoint import garbage, leases
from megalrps.checkpoint.errors import HeldError
from megalrps.checkpoint.manifest import render
from megalrps.checkpoint.references import References
from megalrps.checkpoint.sealed import write_sealed
from megalrps.errors import (
    EXIT_HELD,
    EXIT_LOST,
    EXIT_NO_SPACE,
    EXIT_UNKNOWN_FORMAT,
    ToldError,
    exit_status_of,
)
from megalrps.fingerprint import fingerprint
from megalrps.paths.plan import Plan

CLOCKS = (0.0, 1e9, 1e11)
"""Seconds of the epoch that a broken clock may show: 1970, 2001, 5138."""
STEPS = 5
USED = {name_of(step) for step in (2, 3, 4, 5)}
"""A fork, and the head with those that --save-keep keeps."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("states") / "run"
    with launched(root) as launch:
        for step in range(1, STEPS + 1):
            launch.save(step)
            launch.prune()
    return root


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


def check_clock(run: Path, clock: float) -> None:
    """With a clock that shows ``clock``: one launch holds the run and lives, or is gone; nothing in use is garbage."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.fromtimestamp(clock, tz)

    with mock.patch.object(leases, "datetime", Clock), mock.patch("time.time", lambda: clock):
        with launched(run) as holder:
            with pytest.raises(HeldError) as refusal, launched(run):
                pass
            assert exit_status_of(refusal.value) == EXIT_HELD
            holder.save(STEPS + 1)
        with launched(run) as taker:  # given back: no waiting
            assert taker.seconds_to_open < leases.BEATS
    references = References(run / "lineage")
    for grace in (0.0, garbage.GRACE_DAYS * garbage.DAY):
        verdicts = garbage.collect(run, references, keep=2, grace=grace, now=clock, apply=True)
        going = {verdict.found.name for verdict in verdicts if verdict.goes}
        assert not going & (USED | {name_of(STEPS + 1)}) - {name_of(2), name_of(4)}, f"clock {clock}: {going}"


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_clock_that_jumps_decides_nothing(run: Path, clock: float):
    check_clock(run, clock)
    with launched(run) as launch:
        check_launch(launch, [3, 5, 6])
    record("F16", **{f"clock at {clock:g}": "nothing lost"})


# --- states that are refused ------------------------------------------------------------------------------------------


def sealed(path: Path, **changed: Any) -> None:
    """Change a sealed file as a version to come would write it: whole, with its seal."""
    value = json.loads(path.read_text())
    del value["seal"]
    write_sealed(path, value | changed)


def reforged(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest likewise."""
    value = json.loads(path.read_text())
    del value["digest"]
    change(value)
    rewrite(path, render(value | {"digest": fingerprint(value)}).encode())


def future_record(run: Path) -> None:
    """Of the head, whose reference follows it."""
    manifest = run / "checkpoints" / name_of(STEPS) / "manifest.json"
    reforged(manifest, lambda value: value["record"].update(record_version=3, shape_of_things="to come"))


FUTURE_FORK = f"checkpoints/{name_of(3)}/manifest.json"
STATES: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "reference to nothing": (
        lambda run: sealed(run / "lineage/heads/main.json", checkpoint=name_of(77)),
        EXIT_LOST,
        r"restore .*main-00000077 from a copy, or give it up by python tools/lineage\.py forget heads/main",
    ),
    "vanished parent": (
        lambda run: shutil.rmtree(run / "checkpoints" / name_of(3)),
        EXIT_LOST,
        r"restore .*main-00000003 from a copy, or give it up by .* forget forks/main-00000003",
    ),
    "vanished head": (
        lambda run: shutil.rmtree(run / "checkpoints" / name_of(STEPS)),
        EXIT_LOST,
        r"restore .*main-00000005 from a copy",
    ),
    "manifest to come": (
        lambda run: reforged(
            run / "checkpoints" / name_of(STEPS) / "manifest.json", lambda value: value.update(format=2)
        ),
        EXIT_UNKNOWN_FORMAT,
        r"main-00000005.*format 2, this version reads 1: use the megalrps that wrote it",
    ),
    "manifest of a fork to come": (
        lambda run: reforged(run / FUTURE_FORK, lambda value: value.update(format=2)),
        EXIT_UNKNOWN_FORMAT,
        r"main-00000003.*format 2, this version reads 1: use the megalrps that wrote it",
    ),
    "record to come": (
        future_record,
        EXIT_UNKNOWN_FORMAT,
        r"main-00000005.*record version 3, this version reads 2: use the megalrps that wrote it",
    ),
    "reference to come": (
        lambda run: sealed(run / "lineage/heads/main.json", format=2),
        EXIT_UNKNOWN_FORMAT,
        r"heads/main\.json: format 2, this version reads 1: use the megalrps that wrote it",
    ),
    "lease to come": (
        lambda run: sealed(run / "lineage/leases/main.json", format=2),
        EXIT_UNKNOWN_FORMAT,
        r"leases/main\.json: format 2, this version reads 1: use the megalrps that wrote it",
    ),
}
"""By name: what is done to a whole run, the status that a launch then ends with, and its remedy."""


@pytest.mark.parametrize("state", STATES)
def test_a_state_is_refused_with_its_status_and_remedy(run: Path, state: str):
    make, status, remedy = STATES[state]
    make(run)
    before = contents(run / "checkpoints")
    with pytest.raises(ToldError) as refusal, launched(run):
        pass
    assert exit_status_of(refusal.value) == status, refusal.value
    assert re.search(remedy, str(refusal.value)) and "\n" not in str(refusal.value), refusal.value
    assert contents(run / "checkpoints") == before, "a refused launch has changed the checkpoints"
    record("F16", **{state: status})


def contents(directory: Path) -> dict[str, bytes]:
    """Every file under ``directory``."""
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_plan_to_come_is_refused():
    with pytest.raises(ToldError, match="read it with the megalrps that wrote it, or plan again") as refusal:
        Plan.from_json({"format_version": 2})
    assert exit_status_of(refusal.value) == EXIT_UNKNOWN_FORMAT
    record("F16", **{"plan to come": exit_status_of(refusal.value)})


def test_a_read_only_store_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Also where there is nothing left to train."""
    data = make_data(tmp_path / "data", [2])
    with file_system(tmp_path / "disk", 16 << 10) as remount:
        run = tmp_path / "disk" / "run"
        trained(command(data, run, "--paradigm", "ptfs"))
        remount("ro")
        assert launch(command(data, run, "--paradigm", "ptfs")) == EXIT_NO_SPACE
        said = capfd.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("pretrain_gpt.py: error: ") and "Read-only file system" in said
    record("F16", **{"read-only store": EXIT_NO_SPACE})
