"""An increment larger than any test can hold: a real index, and a sparse file of tokens that takes no room.

    python benchmarks/big_increment.py --prefix SCRATCH/big --documents 1000000000 [--openings 5 [--remove]]

writes ``SCRATCH/big.{bin,idx,blocks,json}``: documents of 1000 tokens, all 0, as uint16. The index is written in full
(20 bytes a document) and digested on the way; ``.bin`` is a hole of the right size, of whose blocks all but the last
have one digest, so that none is read. With ``--openings`` that many new processes open it, one after the other:
medians of seconds, CPU seconds and what stays resident, beside the seconds of mapping the two files alone, as JSON.
Refuses where the disk has no room for the index. 10^9 documents take 20 GB and minutes.

One thing about it is made up: the SHA-256 of the whole ``.bin``, which would take minutes. Files of this size are
compared with the digests of their blocks, never with that one.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from megalrps.data.block_digests import (
    BLOCK_BYTES,
    GROUP_BLOCKS,
    BlockDigests,
    DatasetDigests,
    DigestingFile,
    LeafWriter,
    block_count,
)
from megalrps.data.index_format import bin_path, blocks_path, idx_path, index_bytes, index_header
from megalrps.data.manifest import IncrementManifest, TokenizerIdentity, digest_fields, write_manifest

DTYPE = np.dtype(np.uint16)
TOKENIZER = TokenizerIdentity("SentencePieceTokenizer", 32_000, 2, "0" * 64)
AT_ONCE = 1 << 18
ROOM_LEFT = 1 << 30
"""Bytes that must stay free on the disk."""

OPENING = """
import json, resource, sys, time
from megalrps.data.increment import open_increment
from megalrps.data.indexed import _map_file, bin_path, idx_path
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
prefix = sys.argv[1]
started = time.perf_counter()
maps = [_map_file(path_of(prefix)) for path_of in (bin_path, idx_path)]
mapping = time.perf_counter() - started
del maps
before, cpu_before, started = resident(), cpu(), time.perf_counter()
increment = open_increment(prefix)
seconds, used = time.perf_counter() - started, cpu() - cpu_before
print(json.dumps({"seconds": seconds, "cpu_seconds": used, "mapping_seconds": mapping,
                  "resident_bytes": resident() - before, "process_bytes": resident(),
                  "documents": increment.dataset.document_count, "tokens": increment.dataset.tokens_count}))
"""


def write_big_increment(prefix: Path, documents: int, tokens_each: int = 1000) -> IncrementManifest:
    """Write the increment; OSError, before anything is written, where its index does not fit on the disk."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    needed = index_bytes(documents, documents) + ROOM_LEFT
    if (free := shutil.disk_usage(prefix.parent).free) < needed:
        raise OSError(f"{prefix.parent}: {free:,} bytes are free where {needed:,} are needed")
    tokens = documents * tokens_each
    with open(blocks_path(prefix), "wb", buffering=0) as blocks_file, open(idx_path(prefix), "wb", buffering=0) as file:
        leaves = LeafWriter(blocks_file.fileno())
        add_zero_leaves(leaves, tokens * DTYPE.itemsize)
        bin_groups = leaves.end_file()
        index = DigestingFile(file.fileno(), leaves)
        index.write(index_header(DTYPE, documents, documents))
        steps = [range(start, min(start + AT_ONCE, documents)) for start in range(0, documents, AT_ONCE)]
        for step in steps:
            index.write(np.full(len(step), tokens_each, "<i4").data)
        for scale in (tokens_each * DTYPE.itemsize, 1):
            for step in steps:
                index.write((np.arange(step.start, step.stop, dtype="<i8") * scale).data)
        index.write(np.array([documents], "<i8").data)
        idx_digest, idx_groups = index.finish()
        leaves.finish()
    with open(bin_path(prefix), "wb") as file:
        file.truncate(tokens * DTYPE.itemsize)
    digests = DatasetDigests(
        hashlib.sha256(f"{tokens} zeros".encode()).hexdigest(),
        idx_digest,
        BlockDigests(BLOCK_BYTES, GROUP_BLOCKS, bin_groups, idx_groups),
    )
    manifest = IncrementManifest(
        name="big",
        tokens=tokens,
        documents=documents,
        sequences=documents,
        text_bytes=4 * tokens,
        dtype=DTYPE.name,
        append_eod=False,
        tokenizer=TOKENIZER,
        sources=(),
        **digest_fields(digests),
    )
    write_manifest(prefix, manifest)
    return manifest


def add_zero_leaves(leaves: LeafWriter, size: int) -> None:
    """The leaves of a file of ``size`` zeros: those of whole blocks are all the same."""
    leaf = hashlib.sha256(bytes(BLOCK_BYTES)).digest()
    group = leaf * GROUP_BLOCKS
    whole, rest = divmod(size, BLOCK_BYTES)
    for start in range(0, whole, GROUP_BLOCKS):
        leaves.add(group[: len(leaf) * min(GROUP_BLOCKS, whole - start)])
    if rest:
        leaves.add(hashlib.sha256(bytes(rest)).digest())
    assert whole + (rest > 0) == block_count(size, BLOCK_BYTES)


def measure_opening(prefix: Path, repetitions: int) -> dict[str, Any]:
    """Medians over new processes; the blocks that each one draws are others."""
    runs = []
    for _ in range(repetitions):
        done = subprocess.run(
            [sys.executable, "-c", OPENING, str(prefix)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        runs.append(json.loads(done.stdout))
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def remove(prefix: Path) -> None:
    """Remove what :func:`write_big_increment` wrote."""
    for suffix in ("bin", "idx", "blocks", "json"):
        Path(f"{prefix}.{suffix}").unlink(missing_ok=True)


def main() -> None:
    """Write; measure, print and remove as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=1_000_000_000)
    parser.add_argument("--openings", type=int, default=0, help="open it in so many new processes, and print figures")
    parser.add_argument("--remove", action="store_true", help="remove the files at the end")
    options = parser.parse_args()
    try:
        started = time.monotonic()
        manifest = write_big_increment(options.prefix, options.documents)
        figures = {"writing_seconds": time.monotonic() - started, "index_bytes": manifest.idx_bytes}
        if options.openings:
            print(json.dumps(figures | measure_opening(options.prefix, options.openings), indent=2))
    finally:
        if options.remove:
            remove(options.prefix)


if __name__ == "__main__":
    main()
