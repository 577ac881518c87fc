"""F14: two launches on one path, two branches of one lineage at once, and a collector of garbage among them.

Nothing of two launches is ever mixed: who comes second to a path leaves without having written a byte, and launches of
different paths end together in the bits of the one launch that trains them all. tests/faults/test_random_trees.py has
the collector on random trees.
"""

import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import counts
import pytest
import torch
from distributed_harness import processes
from tiny_job import TinyData, command, files_of, make_data, metrics, opened

from megalrps.checkpoint.garbage import collect
from megalrps.checkpoint.lineage import read_lineage
from megalrps.checkpoint.manifest import read_manifest
from megalrps.checkpoint.references import References
from megalrps.checkpoint.scrub import scrub
from megalrps.errors import EXIT_HELD, EXIT_PREEMPTED, ToldError, exit_status_of
from megalrps.training import loop

SMALL = ("--num-layers", "1", "--hidden-size", "16", "--ffn-hidden-size", "32", "--save-interval", "3")
PATIENT = ("--lease-seconds", "600")
"""No beat falls into a test, so that files may be compared to the byte."""
STEPS = (6, 5)
"""Main to 2, v1 to 6, main to 8, v2 to 11: 15 updates."""
LOSERS = counts.count("losers", 1, 20)
PAIRS = counts.count("two branches at once", 1, 20)
SECONDS = 120.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """Two increments; not to be written to."""
    return make_data(tmp_path_factory.mktemp("data"), STEPS)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: TinyData) -> Path:
    """The directory of the one launch that trains all paths; not to be written to."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert ended(started(arguments(data, run))) == 0
    return run


def arguments(data: TinyData, run: Path, *flags: str) -> list[str]:
    return command(data, run, *SMALL, *PATIENT, *flags)


def started(flags: Sequence[str], at: int = 0, reached: Path | None = None, until: Path | None = None) -> BaseProcess:
    """A launch in a process of its own; before its ``at``-th update it makes ``reached`` and waits for ``until``."""
    process = processes().Process(target=_launch, args=(flags, at, reached, until))
    process.start()
    return process


def ended(process: BaseProcess) -> int | None:
    process.join(SECONDS)
    return process.exitcode


def _launch(flags: Sequence[str], at: int, reached: Path | None, until: Path | None) -> None:
    torch.set_num_threads(1)
    step, calls = loop.Loop.step, [0]

    def waiting(self: loop.Loop, *args: object) -> None:
        calls[0] += 1
        if calls[0] == at and reached is not None and until is not None:
            reached.touch()
            wait_for(until.exists)
        step(self, *args)  # type: ignore[arg-type]

    with mock.patch.object(loop.Loop, "step", waiting):
        try:
            with opened(flags) as run:
                loop.train(run)
        except ToldError as error:
            sys.stderr.write(f"{error}\n")
            sys.exit(exit_status_of(error))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the other launch does not come"
        time.sleep(0.005)


def bits(run: Path) -> dict[str, list[str]]:
    """The SHA-256 of every shard of every checkpoint."""
    names = read_lineage(run / "checkpoints").records
    return {name: [shard.sha256 for shard in read_manifest(run / "checkpoints" / name).shards] for name in names}


def told(run: Path) -> list[tuple[object, ...]]:
    """The lines of metrics without what the clock says, in the order of paths and steps."""
    return sorted((line["path"], line["step"], line["loss"], line["lr"], line["grad_norm"]) for line in metrics(run))


def check_undisturbed(run: Path, undisturbed: Path, *, collected: bool = False) -> None:
    """``collected``: periodic checkpoints may be missing, and nothing else."""
    records, found = read_lineage(undisturbed / "checkpoints").records, bits(run)
    wanted = {name: of for name, of in bits(undisturbed).items() if name in found or not collected}
    assert found == wanted and all(name in found or not record.permanent for name, record in records.items())
    assert told(run) == told(undisturbed), "a step is missing, or was written twice, or came out otherwise"
    assert scrub(run, References(run / "lineage")).complaints == ()


def test_who_comes_second_leaves_without_having_written_a_byte(data: TinyData, undisturbed: Path, tmp_path: Path):
    run, reached, go = tmp_path / "run", tmp_path / "reached", tmp_path / "go"
    winner = started(arguments(data, run), at=5, reached=reached, until=go)
    wait_for(reached.exists)
    before, written = files_of(run), 0
    for number in range(LOSERS):
        flags = [(), ("--paths", "main"), ("--paths", "v1", "v2"), ("--load", "required")][number % 4]
        assert ended(started(arguments(data, run, *flags))) == EXIT_HELD
        written += len(dict(files_of(run).items() ^ before.items()))
        assert written == 0, "the second launch has written"
    go.touch()
    assert ended(winner) == 0
    check_undisturbed(run, undisturbed)
    counts.record("F14", launches_refused=LOSERS, files_the_refused_have_written=written)


def test_two_branches_at_once_end_as_one_launch_does(data: TinyData, undisturbed: Path, tmp_path: Path):
    collections = 0
    for pair in range(PAIRS):
        run = tmp_path / str(pair)
        assert ended(started(arguments(data, run, "--paths", "main", "--exit-interval", "2"))) == EXIT_PREEMPTED
        here, there = run / ".v1", run / ".main"
        branch = started(arguments(data, run, "--paths", "v1"), at=1 + pair % 4, reached=here, until=there)
        main = started(arguments(data, run, "--paths", "main"), at=1 + pair % 6, reached=there, until=here)
        while branch.is_alive() or main.is_alive():
            collect(run, References(run / "lineage"), keep=0, grace=0, now=time.time(), apply=True)
            collections += 1
            time.sleep(0.02)
        assert (ended(branch), ended(main)) == (0, 0)
        assert ended(started(arguments(data, run))) == 0  # what is left: v2
        check_undisturbed(run, undisturbed, collected=True)
    assert collections > PAIRS
    counts.record("F14", pairs_of_branches_at_once=PAIRS, collections_meanwhile=collections)


def test_a_branch_whose_fork_another_launch_has_not_reached_waits_for_nothing(data: TinyData, tmp_path: Path):
    run = tmp_path / "run"
    assert ended(started(arguments(data, run, "--paths", "v1"))) == 2
    assert not read_lineage(run / "checkpoints").records
