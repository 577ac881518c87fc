"""Opening, drawing and blending, ours beside Megatron-LM's: what benchmarks/data.py measures besides whole tools.

Ours runs in this file's own process too (``python benchmarks/data_streams.py fetch PREFIX ...``), started anew for each
figure as the peer is, so that neither has the other's memory or libraries.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from data_commands import ROOT, CommandFailedError, Megatron

from megalrps.data.apportionment import Apportionment
from megalrps.data.increment import open_increment
from megalrps.data.stream import Reading, SampleStream


def fetch(options: argparse.Namespace) -> dict[str, Any]:
    """Samples a CPU second in random order, a call for each batch: windows, with documents, packed."""
    found: dict[str, float] = {}
    increment = open_increment(options.prefix)
    for name, reading in (
        ("plain", Reading()),
        ("documents", Reading(documents=True)),
        ("packed", Reading(documents=True, pack=True)),
    ):
        stream = SampleStream([increment], options.sequence_length, 1234, reading)
        for size in options.batches:
            # The order of a stream is random in itself: consecutive samples lie anywhere.
            batches = [np.arange(start, start + size) for start in range(0, options.samples, size)]
            for batch in batches[: max(1, 50 // size)]:
                stream.batch(batch)
            started = time.process_time()
            for batch in batches:
                stream.batch(batch)
            found[f"{name}, {size}"] = size * len(batches) / (time.process_time() - started)
    return {"samples_per_cpu_second": found}


def opening(options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds and resident memory from a prefix to the first sample."""
    resident, started = _resident(), time.perf_counter()
    increment = open_increment(options.prefix)
    opened = time.perf_counter()
    stream = SampleStream([increment], options.sequence_length, 1234, Reading(documents=True))
    stream.batch(np.arange(options.batches[0]))
    return {
        "documents": increment.manifest.documents,
        "tokens": increment.manifest.tokens,
        "open_milliseconds": (opened - started) * 1e3,
        "first_batch_milliseconds": (time.perf_counter() - opened) * 1e3,
        "resident_megabytes": (_resident() - resident) / 1e6,
    }


def feed(options: argparse.Namespace) -> dict[str, Any]:
    """Microseconds that an update waits for its samples, by threads that read ahead.

    Updates are imitated: half of each holds the interpreter, as launching kernels does, and half waits without it, as
    for a device.
    """
    from megalrps.paths.plan import Window
    from megalrps.training.feed import Draw, Feed, Share

    stream = SampleStream([open_increment(options.prefix)], options.sequence_length, 1234, Reading(documents=True))
    window, size, updates = Window(0, 1 << 40, ("any",)), options.batches[-1], options.samples // options.batches[-1]

    def read(draw: Draw) -> Share:
        batch = stream.batch(draw.indices())
        return Share(batch.tokens_BS, batch.starts_BS, batch.counted_BS)

    waits: dict[str, float] = {}
    for threads in (0, 1, 2):
        draws = [Draw(window, update * size, size) for update in range(updates)]
        waited = []
        with Feed(read, threads=threads) as reading:
            reading.follow(draws)
            for draw in draws:
                started = time.perf_counter()
                reading.take(draw)
                waited.append(time.perf_counter() - started)
                until = time.thread_time() + options.update_seconds / 2
                while time.thread_time() < until:
                    pass
                time.sleep(options.update_seconds / 2)
        waits[str(threads)] = statistics.median(waited) * 1e6
    return {"samples_an_update": size, "update_seconds": options.update_seconds, "median_wait_microseconds": waits}


def blend(options: argparse.Namespace) -> dict[str, Any]:
    """Nanoseconds a sample to say whose it is, the largest error of a prefix, and the memory of the table."""
    weights = [Fraction(text) for text in options.weights]
    started = time.process_time()
    order = Apportionment(weights)
    table_seconds = time.process_time() - started
    indices = np.random.default_rng(options.seed).integers(0, 1 << 40, options.samples)
    started = time.process_time()
    order(indices)
    seconds = time.process_time() - started
    chosen, _ = order(np.arange(options.samples))
    counts = np.cumsum(chosen[:, None] == np.arange(len(weights)), axis=0)
    shares = np.array([float(weight / sum(weights)) for weight in weights])
    errors = np.abs(counts - np.arange(1, options.samples + 1)[:, None] * shares)
    return {
        "nanoseconds_a_sample": seconds / options.samples * 1e9,
        "largest_error_of_a_prefix": float(errors.max()),
        "table_milliseconds": table_seconds * 1e3,
    }


def in_turns(ours: Sequence[str], peer: Sequence[str] | None, megatron: Megatron, repetitions: int) -> dict[str, Any]:
    """Every result of both sides: a process each, in turns."""
    results: dict[str, list[dict[str, Any]]] = {"ours": [], "megatron": []}
    mine = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    sides: list[tuple[str, list[str], dict[str, str]]] = [
        ("ours", [sys.executable, str(ROOT / "benchmarks/data_streams.py"), *ours], mine)
    ]
    if peer is not None:
        command = [megatron.python, "-W", "ignore", str(ROOT / "benchmarks/data_peer.py"), *peer]
        sides.append(("megatron", command, megatron.environment()))
    for repetition in range(repetitions):
        for name, command, environment in sides if repetition % 2 == 0 else sides[::-1]:
            results[name].append(_result_of(command, environment))
    return results


def medians(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure of ``results``, which have the same ones."""
    first = results[0]
    return {
        key: medians([each[key] for each in results])
        if isinstance(first[key], dict)
        else statistics.median(each[key] for each in results)
        for key in first
    }


def _result_of(command: Sequence[str], environment: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise CommandFailedError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    value: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return value


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description="what our data classes take; prints one JSON object")
    parser.add_argument("what", choices=("fetch", "feed", "opening", "blend"))
    parser.add_argument("prefix", nargs="?", default="")
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--update-seconds", type=float, default=0.01)
    parser.add_argument("--weights", nargs="+", default=[])
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    measures: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "fetch": fetch,
        "feed": feed,
        "opening": opening,
        "blend": blend,
    }
    print("RESULT", json.dumps(measures[options.what](options)))


if __name__ == "__main__":
    main()
