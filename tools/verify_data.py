#!/usr/bin/env python3
"""Read increments from end to end and compare them with the digests in their manifests.

tools/verify_data.py --data data/2023 s3://bucket/2024      status 2, and every bad file named, unless all are whole
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import tyro

from megalrps.commandline import run_tool
from megalrps.data.blend import dataset_prefixes
from megalrps.data.verify import bytes_to_read, verify_increment
from megalrps.errors import InputError

PROGRAM = "verify_data.py"


@dataclass(frozen=True)
class VerifyOptions:
    """Check that increments are, byte for byte, what their manifests describe; nothing is changed.

    Opening a large increment, as training does, reads samples of it; this reads all, with as many threads as there are
    cores. Every bad file is named, with the bytes that were changed, and the status is 2 unless there is none.
    """

    data: tuple[str, ...]
    """Increments: a prefix or URL (of PREFIX.bin, .idx, .json, .blocks) each, training and held-out parts alike; of a
    blend, its members."""


def verify(options: VerifyOptions) -> None:
    """Print what was found, an increment a line; InputError, naming every bad file, at the end."""
    if not options.data:
        raise InputError("--data is empty: name the PREFIX of at least one increment")
    bad_paths: list[str] = []
    for prefix in (each for given in options.data for each in dataset_prefixes(given)):
        with progress(prefix) as advance:
            found = verify_increment(prefix, advance)
        if found.bad_files or found.manifest is None:
            print(f"{prefix}: BAD", *(f"  {bad.complaint}" for bad in found.bad_files), sep="\n", flush=True)
            bad_paths += [bad.path for bad in found.bad_files]
        else:
            counts = f"{found.manifest.documents:,} documents, {found.manifest.tokens:,} tokens"
            print(f"{prefix}: whole, {counts}", flush=True)
    if bad_paths:
        raise InputError(
            f"--data: bad files: {', '.join(bad_paths)}; make these increments again (tools/preprocess_data.py)"
        )


@contextmanager
def progress(prefix: str) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal of standard error while the block runs, moved on by calls with the bytes that were read."""
    if not sys.stderr.isatty():
        yield lambda size: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(prefix.rpartition("/")[2], total=bytes_to_read(prefix))
        yield lambda size: bar.advance(task, size)


if __name__ == "__main__":
    run_tool(lambda: verify(tyro.cli(VerifyOptions, prog=PROGRAM, config=(tyro.conf.FlagCreatePairsOff,))), PROGRAM)
