"""Whole commands, ours and Megatron's, on the same text: their CPU seconds, wall seconds and memory."""

import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KINDS = {"huggingface": "HuggingFaceTokenizer", "sentencepiece": "SentencePieceTokenizer"}


class CommandFailedError(Exception):
    """A command that is measured ended with an error: there is nothing to compare."""


@dataclass(frozen=True)
class Spent:
    """What a command took: all its processes for the CPU, the largest of them for the memory."""

    cpu_seconds: float
    wall_seconds: float
    largest_megabytes: float
    """Resident memory at its peak, in 10^6 bytes."""


@dataclass(frozen=True)
class Megatron:
    """A checkout of Megatron-LM, the Python that can import it, and folders to put before that in its path."""

    checkout: Path
    python: str
    path: str

    def environment(self) -> dict[str, str]:
        """What its tools are run with: no network, one thread a process, as ours."""
        own = {"PYTHONPATH": f"{self.path}:{self.checkout}" if self.path else str(self.checkout)}
        return {**os.environ, **own, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

    @property
    def commit(self) -> str:
        """Which one it is."""
        command = ["git", "-C", str(self.checkout), "rev-parse", "--short=10", "HEAD"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@dataclass(frozen=True)
class Tool:
    """A way to make a dataset of JSON lines: the command up to its input, output and number of workers."""

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    shown: str
    """The command as a reader may type it."""
    has_workers: bool = True

    def run(self, corpus: Path, folder: Path, workers: int = 1) -> Spent:
        """Make ``folder/P_text_document`` of ``corpus``; CommandFailedError, with what it said, where that fails."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        arguments = [*self.arguments, "--input", str(corpus), "--output-prefix", str(folder / "P"), "--append-eod"]
        if self.has_workers:
            arguments += ["--workers", str(workers)]
        return run(arguments, self.environment, folder / "log.txt")


def run(arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Spent:
    """Run one command to its end."""
    started = time.perf_counter()
    with open(log, "wb") as output:
        process = subprocess.Popen(arguments, env=dict(environment), stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise CommandFailedError(f"{shlex.join(arguments)}: {log.read_text(errors='replace')[-2000:]}")
    return Spent(usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss * 1024 / 1e6)


def tools(megatron: Megatron, models: Mapping[str, Path]) -> dict[str, list[Tool]]:
    """For each kind of tokenizer ours first, then Megatron's."""
    own = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    found: dict[str, list[Tool]] = {}
    for kind, model in models.items():
        choice = ("--tokenizer-type", KINDS[kind], "--tokenizer-model")
        call = (*choice, str(model))
        shown = f"--input CORPUS --output-prefix P --append-eod --workers 1 {' '.join(choice)} MODEL"
        mine = (sys.executable, str(ROOT / "tools/preprocess_data.py"), *call)
        theirs = _peer_command(megatron, "preprocess_data.py", *call)
        found[kind] = [
            Tool("ours", mine, own, f"python tools/preprocess_data.py {shown}"),
            Tool("megatron", theirs, megatron.environment(), f"python tools/preprocess_data.py {shown}"),
        ]
        if kind == "huggingface":
            fast = _peer_command(megatron, "preprocess_data_fast.py", *call, "--use-gigatoken")
            shown = f"{shown.replace(' --workers 1', '')} --use-gigatoken"
            command = f"python tools/preprocess_data_fast.py {shown}"
            found[kind].append(Tool("megatron fast", fast, megatron.environment(), command, has_workers=False))
    return found


def _peer_command(megatron: Megatron, tool: str, *arguments: str) -> tuple[str, ...]:
    return (megatron.python, "-W", "ignore", str(megatron.checkout / "tools" / tool), *arguments)


def compare_tools(compared: Sequence[Tool], corpus: Path, scratch: Path, repetitions: int) -> dict[str, Any]:
    """All of ``compared`` on ``corpus``, in turns; the first one is ours."""
    spent: dict[str, list[Spent]] = {tool.name: [] for tool in compared}
    digests: dict[str, dict[str, str]] = {}
    for repetition in range(repetitions):
        for tool in compared if repetition % 2 == 0 else compared[::-1]:
            spent[tool.name].append(tool.run(corpus, scratch / tool.name))
            digests[tool.name] = digests_of(scratch / tool.name / "P_text_document")
    medians = {name: statistics.median(each.cpu_seconds for each in runs) for name, runs in spent.items()}
    least = {name: min(each.cpu_seconds for each in runs) for name, runs in spent.items()}
    ours = compared[0].name
    return {
        "commands": {tool.name: tool.shown for tool in compared},
        "cpu_seconds": {name: [round(each.cpu_seconds, 2) for each in runs] for name, runs in spent.items()},
        "median_cpu_seconds": {name: round(value, 2) for name, value in medians.items()},
        "median_wall_seconds": {
            name: round(statistics.median(each.wall_seconds for each in runs), 2) for name, runs in spent.items()
        },
        "largest_megabytes": {
            name: round(max(each.largest_megabytes for each in runs)) for name, runs in spent.items()
        },
        "ratio": {name: round(value / medians[ours], 2) for name, value in medians.items() if name != ours},
        "ratio_of_minima": {name: round(value / least[ours], 2) for name, value in least.items() if name != ours},
        "identical": {name: found == digests[ours] for name, found in digests.items() if name != ours},
        "sha256": digests[ours],
        "tokens": tokens_of(scratch / ours / "P_text_document"),
    }


def compare_workers(
    tool: Tool, corpus: Path, scratch: Path, repetitions: int, workers: Sequence[int] = (1, 2)
) -> dict[str, Any]:
    """One of our tools with different numbers of workers, in turns."""
    spent: dict[int, list[Spent]] = {count: [] for count in workers}
    digests = set()
    for repetition in range(repetitions):
        for count in workers if repetition % 2 == 0 else workers[::-1]:
            spent[count].append(tool.run(corpus, scratch / "workers", count))
            digests.add(tuple(digests_of(scratch / "workers" / "P_text_document").values()))
    wall = {count: statistics.median(each.wall_seconds for each in runs) for count, runs in spent.items()}
    return {
        "corpus_bytes": corpus.stat().st_size,
        "wall_seconds": {count: [round(each.wall_seconds, 2) for each in runs] for count, runs in spent.items()},
        "median_wall_seconds": {count: round(value, 2) for count, value in wall.items()},
        "median_cpu_seconds": {
            count: round(statistics.median(each.cpu_seconds for each in runs), 2) for count, runs in spent.items()
        },
        "speed_up": round(wall[workers[0]] / wall[workers[-1]], 2),
        "speed_up_of_minima": round(
            min(each.wall_seconds for each in spent[workers[0]])
            / min(each.wall_seconds for each in spent[workers[-1]]),
            2,
        ),
        "largest_megabytes": round(max(each.largest_megabytes for runs in spent.values() for each in runs)),
        "one_output": len(digests) == 1,
    }


def digests_of(prefix: Path) -> dict[str, str]:
    """SHA-256 of a dataset's two files."""
    found = {}
    for suffix in (".bin", ".idx"):
        with open(f"{prefix}{suffix}", "rb") as file:
            found[suffix] = file_digest(file, "sha256").hexdigest()
    return found


def tokens_of(prefix: Path) -> int:
    """How many tokens a dataset holds."""
    from megalrps.data.indexed import IndexedDataset

    return IndexedDataset(prefix).tokens.size
