"""The tables of docs/benchmarks.md that benchmarks/results/data.json fills; a test fails while they differ.

python benchmarks/data_tables.py
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
RESULT = ROOT / "benchmarks" / "results" / "data.json"
BLOCK = re.compile(r"(<!-- (\w+): from benchmarks/results/data\.json -->\n).*?(<!-- end -->)", re.DOTALL)

KINDS = {"huggingface": "Hugging Face BPE 32k", "sentencepiece": "SentencePiece BPE 32k"}

Result = Mapping[str, Any]


def table(header: tuple[str, ...], *rows: tuple[str, ...]) -> str:
    """A Markdown table."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, ("---",) * len(header), *rows))


def data_conditions(result: Result) -> str:
    """What was measured, on what."""
    own = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if name != "peer")
    peer = ", ".join(f"{name} {version}" for name, version in result["versions"]["peer"].items())
    corpus = result["preprocess"]["corpus"]
    return (
        f"{result['date']}, {result['device']['cores']} cores ({result['device']['processor']}), one thread a process; "
        f"medians of {result['options']['repetitions']} runs in turns. Ours: {own}. "
        f"Peer: {result['compares']['peer']}; {peer}. "
        f"The text: {corpus['documents']:,} documents, {corpus['bytes'] / 2**20:.1f} MiB of JSON lines.\n"
    )


def data_preprocess(result: Result) -> str:
    """Whole tools."""
    rows = []
    for kind, label in KINDS.items():
        each = result["preprocess"][kind]
        for name, seconds in each["median_cpu_seconds"].items():
            ours = name == "ours"
            rows.append(
                (
                    label if ours else "",
                    name,
                    f"{seconds:.2f}",
                    f"{result['startup'][kind]['median_cpu_seconds'][name]:.2f}",
                    f"{each['largest_megabytes'][name]:,}",
                    "" if ours else f"{each['ratio'][name]:.1f}",
                    "" if ours else _yes(each["identical"][name]),
                )
            )
    header = ("tokenizer", "tool", "CPU s", "of them on three lines", "memory, MB", "ours is faster by", "same bytes")
    return table(header, *rows)


def data_workers(result: Result) -> str:
    """One worker and two."""
    rows = []
    for kind, label in KINDS.items():
        each = result["workers"][kind]
        seconds = [f"{value:.2f}" for value in each["median_wall_seconds"].values()]
        cpu = [f"{value:.2f}" for value in each["median_cpu_seconds"].values()]
        speed = f"{each['speed_up']:.2f}"
        size = f"{each['corpus_bytes'] / 2**20:,.0f}"
        rows.append((label, size, *seconds, speed, *cpu, f"{each['largest_megabytes']:,}", _yes(each["one_output"])))
    header = ("tokenizer", "MiB", "wall s, 1 worker", "2 workers", "speed-up", "CPU s, 1 worker", "2 workers")
    return table((*header, "largest process, MB", "same bytes"), *rows)


def data_fetch(result: Result) -> str:
    """Random samples."""
    labels = {
        "plain": "windows",
        "documents": "windows, with the documents in them",
        "packed": "whole documents, packed",
    }
    fetch = result["fetch"]
    rows = []
    for name, label in labels.items():
        one, eight = (f"{name}, {size}" for size in (1, 8))
        peer = f"{fetch['megatron'][name]:,}" if name in fetch["megatron"] else ""
        ratios = tuple(f"{fetch['ratio'][each]:.1f}" if each in fetch["ratio"] else "" for each in (one, eight))
        rows.append((label, f"{fetch['ours'][one]:,}", f"{fetch['ours'][eight]:,}", peer, *ratios))
    header = ("samples a CPU second", "ours, one at a time", "ours, 8 at a time", "GPTDataset", "ratio", "ratio of 8")
    feed = result["feed"]
    waits = ", ".join(f"{value:,.0f} us with {name}" for name, value in feed["median_wait_microseconds"].items())
    return (
        f"{table(header, *rows)}\n"
        f"What an update of {feed['update_seconds'] * 1e3:.0f} ms, half of it spent in Python, waits for its "
        f"{feed['samples_an_update']:.0f} samples with documents, by `--num-workers`: {waits}.\n"
    )


def data_opening(result: Result) -> str:
    """Opening, blends and verification."""
    opening, blend, verify = (result[name] for name in ("opening", "blend", "verify"))
    big, small, peer = opening["ours"], opening["ours_small"], opening["megatron_small"]
    far = opening["megatron_extrapolated"]
    opened = table(
        ("documents", "tokens", "ours: open, ms", "first 8 samples, ms", "resident, MB", "Megatron's indices"),
        *(
            (
                f"{each['documents']:,}",
                f"{each['tokens']:.1e}",
                f"{each['open_milliseconds']:.1f}",
                f"{each['first_batch_milliseconds']:.1f}",
                f"{each['resident_megabytes']:.1f}",
                told,
            )
            for each, told in (
                (small, f"{peer['cpu_seconds']:.2f} CPU s, {peer['resident_megabytes']:,.0f} MB"),
                (big, f"{far['cpu_seconds']:,} CPU s, {far['resident_megabytes']:,} MB (extrapolated)"),
            )
        ),
    )
    ours, theirs = blend["ours"], blend["megatron"]
    return (
        f"{opened}\nWhose a sample of a blend of {len(blend['weights'])} datasets is: "
        f"{ours['nanoseconds_a_sample']:.0f} ns, computed when it is asked for, no prefix off by more than "
        f"{ours['largest_error_of_a_prefix']:.2f} samples; Megatron-LM builds {theirs['bytes_a_sample']:.0f} bytes a "
        f"sample beforehand, at {theirs['nanoseconds_a_sample']:.0f} ns, off by at most "
        f"{theirs['largest_error_of_a_prefix']:.2f}. `tools/verify_data.py` reads {verify['bytes'] / 1e6:,.0f} MB in "
        f"{verify['median_cpu_seconds']:.2f} CPU s, start-up included.\n"
    )


def _yes(true: bool) -> str:
    return "yes" if true else "NO"


def rendered(text: str, result: Result) -> str:
    """``text`` with every marked block made anew from ``result``."""
    render = {
        each.__name__: each for each in (data_conditions, data_preprocess, data_workers, data_fetch, data_opening)
    }
    return BLOCK.sub(lambda found: f"{found[1]}{render[found[2]](result)}{found[3]}", text)


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(rendered(page, json.loads(RESULT.read_text(encoding="utf-8"))), encoding="utf-8")
