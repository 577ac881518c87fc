"""A job small enough for a test: seeded synthetic increments, and the command line that trains a micro model."""

import itertools
import json
import os
import pkgutil
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from distributed_harness import processes

from megalrps.checkpoint.store import Store
from megalrps.config import parse_config
from megalrps.data.indexed import IndexedDatasetWriter
from megalrps.data.manifest import TokenizerIdentity, describe_dataset, write_manifest
from megalrps.evaluation.releases import evaluate_releases, finish_run
from megalrps.parallel.world import World
from megalrps.training.loop import train
from megalrps.training.opening import open_run
from megalrps.training.run import Run

ENTRY = Path(__file__).parents[1] / "pretrain_gpt.py"
ALONE = World(0, 1, torch.device("cpu"), None)
SEQUENCE_LENGTH, BATCH = 16, 8
TOKENIZER = TokenizerIdentity("SentencePieceTokenizer", 64, 2, "0" * 64)
MODEL = ("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "2", "--ffn-hidden-size", "64")


@dataclass(frozen=True)
class TinyData:
    """Prefixes of increments and of their held-out parts, oldest first."""

    increments: tuple[str, ...]
    held_out: tuple[str, ...]

    def first(self, count: int) -> "TinyData":
        """The data as it was when only ``count`` increments had arrived."""
        return TinyData(self.increments[:count], self.held_out[:count])


def make_data(directory: Path, steps: Sequence[int]) -> TinyData:
    """Increments a, b, c, ... of so many steps each, one pass over the data, with a held-out part of 40 tokens each."""
    names = [chr(ord("a") + place) for place in range(len(steps))]
    return TinyData(
        tuple(
            write_increment(directory / f"{name}.train", name, tokens_of(count))
            for name, count in zip(names, steps, strict=True)
        ),
        tuple(write_increment(directory / f"{name}.valid", name, 40) for name in names),
    )


def tokens_of(steps: int) -> int:
    """As many tokens as hold exactly ``steps`` batches of samples."""
    return steps * BATCH * SEQUENCE_LENGTH + 1


def write_increment(
    prefix: Path, name: str, tokens: int, *, content: str | None = None, tokenizer: TokenizerIdentity = TOKENIZER
) -> str:
    """Write an increment of tokens that a model can learn to predict, a function of ``content`` (default: its name)."""
    generator = np.random.default_rng(list(f"{prefix.name} {content or name}".encode()))
    steps = generator.integers(1, 4, size=tokens)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedDatasetWriter(prefix, np.uint16, overwrite=True) as writer:
        for document in np.array_split(np.cumsum(steps) % tokenizer.vocab_size, 3):
            writer.add_document(document)
    manifest = describe_dataset(
        prefix, name=name, tokenizer=tokenizer, text_bytes=3 * tokens, append_eod=False, sources=("text.jsonl",)
    )
    write_manifest(prefix, manifest)
    return str(prefix)


def command(data: TinyData, run: Path, *flags: str) -> list[str]:
    """The command line that trains the micro model on ``data`` in the directory ``run``; later flags win."""
    held_out = ("--valid-data-path", *data.held_out) if data.held_out else ()
    return [
        *MODEL,
        *("--seq-length", str(SEQUENCE_LENGTH), "--global-batch-size", str(BATCH), "--lr", "1e-2", "--min-lr", "1e-3"),
        *("--device", "cpu", "--save", str(run), "--increments", *data.increments, *held_out, *flags),
    ]


def launch(arguments: Iterable[str]) -> int:
    """Run the entry in this process, as ``python pretrain_gpt.py ARGUMENTS`` would; returns the exit status."""
    torch.set_num_threads(1)
    with mock.patch.object(sys, "argv", [ENTRY.name, *arguments]):
        try:
            runpy.run_path(str(ENTRY), run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
    raise AssertionError("run_tool always ends the process")


def entry_process(arguments: list[str], place: Path, *launcher: str) -> subprocess.CompletedProcess[str]:
    """Run the entry as a program of its own, from the directory ``place``."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*(launcher or (sys.executable,)), str(ENTRY), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=place,
        env=environment,
        timeout=120,
    )


@dataclass(frozen=True)
class Death:
    """``kill -9`` of a launch, before or after its ``call``-th call of the function or method ``where``."""

    where: str
    call: int = 1
    after: bool = False

    @contextmanager
    def waits(self) -> Iterator[None]:
        """Let this process die so while the block runs."""
        original, calls = pkgutil.resolve_name(self.where), itertools.count(1)

        def reach(*args: Any, **kwargs: Any) -> Any:
            if next(calls) < self.call:
                return original(*args, **kwargs)
            if self.after:
                original(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError("unreachable")

        with mock.patch(self.where, reach):
            yield


def launch_and_die(arguments: Sequence[str], death: Death) -> None:
    """Launch the entry in a process of its own that dies as ``death`` says."""
    process = processes().Process(target=_launch_under, args=(arguments, death))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, f"the launch lived through {death}: exit code {process.exitcode}"


def _launch_under(arguments: Sequence[str], death: Death) -> None:
    with death.waits():
        launch(arguments)


def world_of_harness() -> World:
    """The world of a rank that the distributed harness has started."""
    return World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), dist.group.WORLD)


@contextmanager
def opened(arguments: Sequence[str], world: World = ALONE) -> Iterator[Run]:
    """The run of a command line, open and not trained."""
    torch.set_num_threads(1)
    with open_run(parse_config(arguments), world) as run:
        yield run


def trained(arguments: Sequence[str], world: World = ALONE) -> Path:
    """Do what the entry does between parsing and exit, without a process of its own; returns the run directory."""
    with opened(arguments, world) as run:
        train(run)
        evaluate_releases(run)
        if world.is_first:
            finish_run(run)
        return run.directory.root


def checkpoints(run: Path) -> tuple[str, ...]:
    """The names of the committed checkpoints of a run directory."""
    return Store(run / "checkpoints").names()


def tensors(run: Path, checkpoint: str) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    store = Store(run / "checkpoints")
    entries = store.manifest(checkpoint).tensors
    held = {name: torch.empty(entry.shape, dtype=getattr(torch, entry.dtype)) for name, entry in entries.items()}
    store.load(checkpoint, held)
    return held


def differing(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of the tensors that are not equal bit for bit, or only on one side."""
    shared = left.keys() & right.keys()
    return sorted((left.keys() ^ right.keys()) | {name for name in shared if not torch.equal(left[name], right[name])})


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def summary(run: Path) -> dict[str, Any]:
    """The content of summary.json."""
    return json.loads((run / "summary.json").read_text())


def results(run: Path) -> dict[str, Any]:
    """All that a run leaves behind but its tensors, without what depends on the clock and on the place."""
    clocks = {"seconds", "data_seconds", "tokens_per_second", "mfu", "wall_seconds"}
    told = json.loads(json.dumps(summary(run)).replace(str(run), "RUN"))
    return {
        "metrics": [{key: value for key, value in line.items() if key not in clocks} for line in metrics(run)],
        "summary": {key: value for key, value in told.items() if key not in clocks},
        "evaluations": {file.name: file.read_text() for file in (run / "evaluations").iterdir()},
        "plan": (run / "plan.json").read_text(),
        "checkpoints": sorted(entry.name for entry in (run / "checkpoints").iterdir()),
    }


def files_of(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Every file under ``directory`` with its time of change and content; a directory with its own time alone."""
    return {
        str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(directory.rglob("*"))
    }
