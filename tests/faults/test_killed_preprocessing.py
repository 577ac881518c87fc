"""kill -9 at every file operation of the tools that make data: nothing is seen by halves, and run again, all is made.

A killed run leaves what stood there before, whole, or part of what it was to make, none of it readable as a dataset;
the same command then makes the very bytes that a run that was left alone makes.
"""

import builtins
import io
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tyro
from counts import count, record, seed

from megalrps.data import parts
from megalrps.data.increment import open_increment
from megalrps.data.indexed import IndexedDataset, bin_path, idx_path, manifest_path
from megalrps.data.preprocess import preprocess
from megalrps.data.preprocess_options import InputOptions, OutputOptions, PreprocessOptions, TokenizerOptions
from megalrps.data.split import SplitOptions, split_increments
from megalrps.data.text_increments import INDEX_NAME, read_increments
from megalrps.data.tokenizer import load_tokenizer
from megalrps.data.tokenizer_training import TokenizerTrainingOptions, train_tokenizer
from megalrps.errors import InputError

TOOLS = Path(__file__).resolve().parents[2] / "tools"
KILLS_OF_A_JOB = count("F17", small=22, full=10_000)
"""At most so many of a job's; the full number is every one there is."""
OPERATIONS = ("mkdir", "open", "write", "fsync", "replace", "rename", "unlink", "rmdir", "truncate")
PART_BYTES = 128
"""Two documents or so: the work of a run is several parts."""
FLAGS = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
Contents = dict[str, bytes]


class KillAt:
    """Ends the process before its file operation number ``operation``, or half-way through it, if it is a write.

    Only what changes files counts. Writes to a file that Python buffers count when they are handed over; half of one
    is flushed. With -1 nothing is killed, and ``kinds`` ends as the list of the operations. Nothing waits for the disk:
    of what the system has taken over, a killed process loses nothing.
    """

    def __init__(self, operation: int, halfway: bool) -> None:
        self.operation, self.halfway = operation, halfway
        self.kinds: list[str] = []
        self._open = builtins.open
        for name in OPERATIONS:
            setattr(os, name, self._wrapped(name, getattr(os, name)))
        builtins.open = io.open = self._open_counted  # type: ignore[assignment]

    def before(self, kind: str, write_half: Callable[[], Any] | None = None) -> None:
        """An operation is about to happen; ``write_half`` does half of it, if that can be."""
        if len(self.kinds) == self.operation:
            if self.halfway:
                assert write_half is not None
                write_half()
            os.kill(os.getpid(), signal.SIGKILL)
        self.kinds.append(kind)

    def _wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operate(*args: Any, **kwargs: Any) -> Any:
            if name == "write":
                self.before(name, lambda: original(args[0], args[1][: len(args[1]) // 2]))
            elif name != "open" or args[1] & (os.O_WRONLY | os.O_RDWR):
                self.before(name)
            return None if name == "fsync" else original(*args, **kwargs)

        return operate

    def _open_counted(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        opened = self._open
        if not set(mode) & set("wax+"):
            return opened(file, mode, *args, **kwargs)
        self.before("open")
        return CountedFile(self, opened(file, mode, *args, **kwargs))


class CountedFile:
    """A file whose writes, flushes and closing are operations of ``kill``."""

    def __init__(self, kill: KillAt, file: Any) -> None:
        self._kill, self._file = kill, file

    def write(self, content: Any) -> int:
        self._kill.before("write", lambda: (self._file.write(content[: len(content) // 2]), self._file.flush()))
        return int(self._file.write(content))

    def flush(self) -> None:
        self._kill.before("flush")
        self._file.flush()

    def close(self) -> None:
        self._kill.before("close")
        self._file.close()

    def __enter__(self) -> "CountedFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def contents(folder: Path) -> Contents:
    """What a reader may see; partial files are hidden ones, and unfinished work is a folder."""
    paths = folder.iterdir() if folder.exists() else ()
    return {path.name: path.read_bytes() for path in paths if path.is_file() and not path.name.startswith(".")}


def check_datasets(folder: Path, states: list[Contents]) -> None:
    """What opens is one of the whole datasets, and a manifest describes the files beside it."""
    for prefix in (folder / "v_text_document", folder / "v_title_document"):
        names = [path_of(prefix).name for path_of in (bin_path, idx_path)]
        if _opens(lambda prefix=prefix: IndexedDataset(prefix)):
            found = contents(folder)
            assert any(all(found[name] == state[name] for name in names) for state in states), "half a dataset opens"
        if manifest_path(prefix).exists():
            open_increment(prefix, verify=True)


def check_text(folder: Path, states: list[Contents]) -> None:
    """Where the index is readable, the whole folder is one that was made."""
    if _opens(lambda: read_increments(folder)):
        found = contents(folder)
        parts = [name for name in found if name.endswith(".jsonl") or name == INDEX_NAME]
        assert any(all(found[name] == state.get(name) for name in parts) for state in states), "mixed increments"


def check_tokenizer(folder: Path, states: list[Contents]) -> None:
    """Where there is a model, it loads."""
    if (folder / "tok.model").exists():
        load_tokenizer("SentencePieceTokenizer", folder / "tok.model")


def _opens(open_it: Callable[[], object]) -> bool:
    try:
        open_it()
    except InputError:
        return False
    return True


@dataclass(frozen=True)
class Job:
    """A tool, how it is called and, for the second run, what it calls; ``check`` looks at what a killed run left."""

    tool: str
    options: type
    make: Callable[[Any], Any]
    check: Callable[[Path, list[Contents]], None]
    arguments: Callable[[Path, Path], list[str]]
    """Of the folder of the inputs and that of the outputs."""

    def command(self, inputs: Path, folder: Path, replaces: bool) -> list[str]:
        return [*self.arguments(inputs, folder), *(["--overwrite"] if replaces else [])]

    def run(self, inputs: Path, folder: Path, replaces: bool = False) -> Any:
        return self.make(tyro.cli(self.options, args=self.command(inputs, folder, replaces), config=FLAGS))


JOBS = {
    "preprocess_data": Job(
        "preprocess_data.py",
        PreprocessOptions,
        preprocess,
        check_datasets,
        lambda inputs, folder: [
            *("--input", str(inputs / "text.jsonl"), "--json-keys", "text", "title", "--append-eod"),
            *("--tokenizer-model", str(inputs.parent / "tok.model"), "--output-prefix", str(folder / "v")),
        ],
    ),
    "split_increments": Job(
        "split_increments.py",
        SplitOptions,
        split_increments,
        check_text,
        lambda inputs, folder: [
            *("--input", str(inputs / "text.jsonl"), "--parts", "2", "--held-out-modulo", "2"),
            *("--output", str(folder)),
        ],
    ),
    "train_tokenizer": Job(
        "train_tokenizer.py",
        TokenizerTrainingOptions,
        train_tokenizer,
        check_tokenizer,
        lambda inputs, folder: [
            *("--input", str(inputs / "text.jsonl"), "--vocab-size", "275", "--output", str(folder / "tok.model")),
        ],
    ),
}


def run_and_die(job: Job, command: list[str], operation: int, halfway: bool, kinds_file: Path) -> int:
    """Fork a process that runs the tool's own main and is killed in it; its exit status, negative for a signal."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            sys.argv = [job.tool, *command]
            sys.stdout = sys.stderr = io.StringIO()
            main = runpy.run_path(str(TOOLS / job.tool))["main"]
            kill = KillAt(operation, halfway)
            main()
            kinds = json.dumps(kill.kinds)
            kinds_file.write_text(kinds)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def cases_of(kinds: list[str], most: int, chance: random.Random) -> list[tuple[int, bool]]:
    """Kills before each operation and half-way through each write; after an operation is before the next one.

    Of more than ``most``, those before names change come first, the others are drawn.
    """
    cases = [(operation, False) for operation in range(len(kinds))]
    cases += [(operation, True) for operation, kind in enumerate(kinds) if kind == "write"]
    chance.shuffle(cases)
    cases.sort(key=lambda case: kinds[case[0]] not in ("replace", "unlink"))  # stable: the rest stays shuffled
    return sorted(cases[:most])


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders of inputs; the texts of the second have as many tokens as those of the first, in other places."""
    folder = tmp_path_factory.mktemp("sources")
    made = folder / "one", folder / "two"
    for number, inputs in enumerate(made):
        inputs.mkdir()
        lines = [
            {"text": f"text {number} {year}" + " x" * more, "title": f"{number}{year}", "date": f"{year}-01-01"}
            for year, more in zip(range(2000, 2008), (range(8), range(7, -1, -1))[number], strict=True)
        ]
        (inputs / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = TokenizerTrainingOptions((str(made[0] / "text.jsonl"),), folder / "tok.model", vocab_size=280)
    train_tokenizer(options)
    return made


def kill_everywhere(
    name: str, replaces: bool, sources: tuple[Path, Path], folder: Path, chosen_seed: int, most: int
) -> tuple[list[str], int, list[str]]:
    """Make one job's runs, killed and whole: the job's operations, how many were killed at, and what went wrong.

    In a process of its own that has no threads and so can fork: the tools are imported once for all the kills.
    """
    os.fsync = lambda descriptor: None  # as in KillAt
    parts.plan_parts.__defaults__ = (PART_BYTES,)
    job, (first, second) = JOBS[name], sources
    old, new = folder / "old", folder / "new"
    job.run(first, old)
    job.run(second, new)
    states = [contents(new), *([contents(old)] if replaces else [])]
    if name == "preprocess_data":  # what mixes old and new must not be noticed by its sizes
        sizes = [{each: len(content) for each, content in contents(side).items()} for side in (old, new)]
        assert sizes[0]["v_text_document.bin"] == sizes[1]["v_text_document.bin"]
        assert contents(old)["v_text_document.idx"] != contents(new)["v_text_document.idx"]

    def attempt(place: Path, operation: int, halfway: bool) -> int:
        if replaces:
            shutil.copytree(old, place)
        return run_and_die(job, job.command(second, place, replaces), operation, halfway, folder / "kinds")

    assert attempt(folder / "whole", -1, False) == 0 and contents(folder / "whole") == states[0]
    kinds = json.loads((folder / "kinds").read_text())
    cases, failures = cases_of(kinds, most, random.Random(chosen_seed)), []
    resumed: list[int] = []
    for operation, halfway in cases:
        place = folder / f"{operation}-{halfway}"
        try:
            status = attempt(place, operation, halfway)
            assert status == -signal.SIGKILL, f"ended with {status}"
            check_survivors(job, place, states)
            finished = finished_parts(place)
            result = job.run(second, place, replaces)
            assert contents(place) == states[0], "made again, the files are others"
            assert not list(place.glob("*.work")), "work that is done is left behind"
            if name == "preprocess_data" and not result.up_to_date:
                assert result.parts_resumed == finished, f"{result.parts_resumed} of {finished} parts are reused"
                resumed.append(finished)
        except Exception as error:
            failures.append(f"killed {'in' if halfway else 'before'} operation {operation}: {error!r:.500}")
        shutil.rmtree(place)
    if name == "preprocess_data" and not len(set(resumed)) > 2:
        failures.append(f"hardly ever was there anything to reuse: {resumed}")
    return kinds, len(cases), failures


def finished_parts(folder: Path) -> int:
    """Whole lines of the journal that a killed run left, but the first."""
    journals = list(folder.glob("*.work/journal"))
    return max(0, journals[0].read_bytes().count(b"\n") - 1) if journals else 0


def check_survivors(job: Job, folder: Path, states: list[Contents]) -> None:
    for name, content in contents(folder).items():
        assert any(content == state.get(name) for state in states), f"part of {name} is there"
    job.check(folder, states)


@pytest.fixture(scope="module")
def killer() -> Iterator[ProcessPoolExecutor]:
    """The process that kills. It is spawned and imports little: to fork a process that holds torch takes ten times."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("replaces", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("name", JOBS)
def test_kill_at_every_file_operation(
    tmp_path: Path, sources: tuple[Path, Path], killer: ProcessPoolExecutor, name: str, replaces: bool
) -> None:
    result = killer.submit(kill_everywhere, name, replaces, sources, tmp_path, seed(), KILLS_OF_A_JOB)
    operations, kills, failures = result.result(timeout=1700)
    figures = {"operations": len(operations), "kills": kills, "failures": len(failures)}
    record("F17", **{f"{name} {'replacing' if replaces else 'new'}": figures})
    assert operations.count("replace") >= 2 and operations.count("write") >= 2, f"what is seen: {operations}"
    assert not failures, f"seed {seed()}, operations {operations}: " + "; ".join(failures[:5])


KILLED_PROGRAM = """
import multiprocessing, os, signal, sys
from megalrps.data import parts
from megalrps.data.journal import Work
from megalrps.data.preprocess import preprocess
from megalrps.data.preprocess_options import *

def dying(work, part, accept=Work.accept):
    if len(work._places) == 3:
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    accept(work, part)

if __name__ == "__main__":
    Work.accept = dying
    parts.plan_parts.__defaults__ = (128,)
    text, model, prefix = sys.argv[1:]
    options = InputOptions((text,)), TokenizerOptions(Path(model)), OutputOptions(Path(prefix))
    preprocess(PreprocessOptions(*options, WorkOptions(workers=2)))
"""


def test_workers_end_with_a_killed_run_and_their_parts_are_kept(
    tmp_path: Path, sources: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "program.py").write_text(KILLED_PROGRAM)
    text, model = sources[0] / "text.jsonl", sources[0].parent / "tok.model"
    command = [sys.executable, str(tmp_path / "program.py"), str(text), str(model), str(tmp_path / "out" / "v")]
    killed = subprocess.run(command, cwd=TOOLS.parent, env={"PYTHONPATH": str(TOOLS.parent)}, stdout=-1, check=False)
    assert killed.returncode == -signal.SIGKILL
    workers = [int(number) for number in killed.stdout.split()]
    assert len(workers) == 2
    until = time.monotonic() + 60
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < until, "a worker outlives the run that it worked for"
        time.sleep(0.05)
    assert finished_parts(tmp_path / "out") == 3
    monkeypatch.setattr("megalrps.data.parts.plan_parts.__defaults__", (PART_BYTES,))

    def options(prefix: Path) -> PreprocessOptions:
        return PreprocessOptions(InputOptions((str(text),)), TokenizerOptions(model), OutputOptions(prefix))

    result = preprocess(options(tmp_path / "out" / "v"))
    assert result.parts_resumed == 3 and result.parts > 4
    preprocess(options(tmp_path / "whole" / "v"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def is_running(process: int) -> bool:
    """Whether the process is there, and not just not yet waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
