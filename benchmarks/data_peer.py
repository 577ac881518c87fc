"""What Megatron-LM's own classes take, run by a Python that can import them: the other side of benchmarks/data.py.

    PYTHONPATH=MEGATRON python benchmarks/data_peer.py fetch PREFIX --sequence-length 2048 --samples 3000 --epochs 1

It prints one JSON object. ``fetch`` draws random samples from a ``GPTDataset``, ``build`` times its indices, ``blend``
those of ``BlendedDataset``. CPU seconds are of this process.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np


class _Tokenizer:
    """As much of a tokenizer as the dataset asks for."""

    unique_identifiers = {"class": "none"}  # noqa: RUF012  their attribute
    pad = -1
    vocab_size = 32000

    def __init__(self, eod: int) -> None:
        self.eod = eod


def dataset(prefix: str, length: int, epochs: float, eod: int, **choices: Any) -> Any:
    """A GPTDataset over all documents, its indices in memory."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    usual = {"reset_position_ids": False, "reset_attention_mask": False, "eod_mask_loss": False}
    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=length,
        split="100,0,0",
        create_attention_mask=False,
        tokenizer=_Tokenizer(eod),
        **{**usual, **choices},
    )
    low = IndexedDataset(prefix)
    samples = int(epochs * (int(low.sequence_lengths.sum(dtype=np.int64)) - 1)) // length
    return GPTDataset(low, prefix, np.arange(len(low), dtype=np.int32), samples, Split.train, config)


def fetch(options: argparse.Namespace) -> dict[str, Any]:
    """Samples a CPU second, one at a time, in random order: plain, and with the documents' boundaries."""
    kinds: dict[str, dict[str, bool]] = {
        "plain": {},
        "documents": {"inter_document_masking": True},
        "reset": {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True},
    }
    found = {}
    for name in options.kinds:
        data = dataset(options.prefix, options.sequence_length, options.epochs, options.eod, **kinds[name])
        drawn = np.random.default_rng(options.seed).integers(0, len(data), options.samples)
        for index in drawn[:50].tolist():
            data[index]
        started = time.process_time()
        for index in drawn.tolist():
            data[index]
        found[name] = options.samples / (time.process_time() - started)
    return {"samples_per_cpu_second": found}


def build(options: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds and resident memory that the indices of ``--epochs`` take."""
    before, started = _resident(), time.process_time()
    data = dataset(options.prefix, options.sequence_length, options.epochs, options.eod)
    seconds = time.process_time() - started
    return {
        "documents": len(data.dataset),
        "samples": len(data),
        "cpu_seconds": seconds,
        "resident_megabytes": (_resident() - before) / 1e6,
    }


def blend(options: argparse.Namespace) -> dict[str, Any]:
    """Nanoseconds a sample that the indices of a blend take, and the largest error of a prefix."""
    from megatron.core.datasets import helpers

    weights = np.array(options.weights, np.float64)
    weights /= weights.sum()
    chosen, places = np.zeros(options.samples, np.int16), np.zeros(options.samples, np.int64)
    started = time.process_time()
    helpers.build_blending_indices(chosen, places, weights, len(weights), options.samples, False)
    seconds = time.process_time() - started
    counts = np.cumsum(chosen[:, None] == np.arange(len(weights)), axis=0)
    errors = np.abs(counts - np.arange(1, options.samples + 1)[:, None] * weights)
    return {
        "nanoseconds_a_sample": seconds / options.samples * 1e9,
        "largest_error_of_a_prefix": float(errors.max()),
        "bytes_a_sample": chosen.itemsize + places.itemsize,
    }


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description="what Megatron-LM's own data classes take")
    parser.add_argument("what", choices=("fetch", "build", "blend"))
    parser.add_argument("prefix", nargs="?", default="")
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--kinds", nargs="+", default=["plain", "documents"])
    parser.add_argument("--weights", type=float, nargs="+", default=[])
    parser.add_argument("--eod", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print("RESULT", json.dumps({"fetch": fetch, "build": build, "blend": blend}[options.what](options)))


if __name__ == "__main__":
    main()
