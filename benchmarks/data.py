"""The data room beside Megatron-LM's: making datasets, opening them, drawing samples, blending.

    python benchmarks/data.py --megatron CHECKOUT --megatron-python PYTHON --corpus FILE --large-corpus FILE \\
        --huggingface FOLDER --sentencepiece MODEL --directory SCRATCH --output benchmarks/results/data.json

The peer is a checkout of Megatron-LM and a Python that can import it, both outside this repository; both sides get the
same JSON lines and the same tokenizers, one thread a process, and take turns. CPU seconds are those of all processes of
a command (user and system); a ratio is the peer's over ours for seconds and ours over the peer's for samples per
second: above 1, ours is faster. ``--sections`` measures some and keeps the others of an existing ``--output``.

preprocess  whole tools on --corpus: CPU seconds, memory, and whether their files are the same bytes
workers     our tool on --large-corpus with 1 and 2 workers: wall seconds, memory of the largest process
startup     whole tools on a file of three lines
fetch       random samples of the dataset just made: windows, with documents, packed
feed        what an update of 10 ms waits for its 64 samples, by threads that read ahead
opening     from a prefix to its first sample, for --documents documents (see benchmarks/big_increment.py)
blend       which dataset a sample of a blend is of
verify      tools/verify_data.py on the increment that --large-corpus makes: bytes a CPU second
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from data_commands import ROOT, Megatron, Tool, compare_tools, compare_workers, run, tools
from data_streams import in_turns, medians
from machine import cpu

PACKAGES = ("gigatoken", "numpy", "orjson", "sentencepiece", "tokenizers")
PEER_PACKAGES = ("awkward", "gigatoken", "numpy", "sentencepiece", "tokenizers", "torch", "transformers")
WEIGHTS = ("0.5", "0.2", "0.15", "0.1", "0.05")
PEER_DOCUMENTS = 10_000_000
"""Documents of the dataset whose indices Megatron builds, to say what one document costs it."""


@dataclass(frozen=True)
class Work:
    """What is measured on."""

    options: argparse.Namespace
    megatron: Megatron
    models: Mapping[str, Path]
    scratch: Path

    @property
    def repetitions(self) -> int:
        """Runs of each side."""
        return int(self.options.repetitions)

    def ours(self, kind: str) -> Tool:
        """Our preprocessing tool with that kind of tokenizer."""
        return tools(self.megatron, self.models)[kind][0]


def preprocess(work: Work) -> dict[str, Any]:
    """Whole tools, for both kinds of tokenizer."""
    corpus: Path = work.options.corpus
    compared = tools(work.megatron, work.models)
    return {
        "corpus": {"bytes": corpus.stat().st_size, "documents": _lines_of(corpus)},
        **{kind: compare_tools(compared[kind], corpus, work.scratch / kind, work.repetitions) for kind in work.models},
    }


def workers(work: Work) -> dict[str, Any]:
    """One and two workers."""
    corpus: Path = work.options.large_corpus
    return {
        kind: compare_workers(work.ours(kind), corpus, work.scratch / f"workers-{kind}", work.repetitions)
        for kind in work.models
    }


def startup(work: Work) -> dict[str, Any]:
    """Whole tools on three lines."""
    three = work.scratch / "three.jsonl"
    with open(work.options.corpus, "rb") as file:
        three.write_bytes(b"".join(islice(file, 3)))
    compared = tools(work.megatron, work.models)
    found = {
        kind: compare_tools(compared[kind], three, work.scratch / f"startup-{kind}", work.repetitions)
        for kind in work.models
    }
    return {kind: {key: each[key] for key in ("median_cpu_seconds", "identical")} for kind, each in found.items()}


def fetch(work: Work) -> dict[str, Any]:
    """Random samples of the increment that our tool makes of the corpus."""
    prefix = _made(work, work.options.corpus)
    common = ["--samples", "3000", "--sequence-length", "2048"]
    results = in_turns(
        ["fetch", prefix, *common], ["fetch", prefix, *common, "--eod", "2"], work.megatron, work.repetitions
    )
    ours, peer = (medians(results[name])["samples_per_cpu_second"] for name in ("ours", "megatron"))
    return {
        "ours": {name: round(value) for name, value in ours.items()},
        "megatron": {name: round(value) for name, value in peer.items()},
        "ratio": {
            name: round(value / peer[name.partition(",")[0]], 2)
            for name, value in ours.items()
            if name.partition(",")[0] in peer
        },
    }


def feed(work: Work) -> dict[str, Any]:
    """How long updates wait for their samples."""
    prefix = _made(work, work.options.corpus)
    results = in_turns(["feed", prefix, "--samples", "6400", "--batches", "64"], None, work.megatron, work.repetitions)
    return medians(results["ours"])


def opening(work: Work) -> dict[str, Any]:
    """Our opening of a big increment, and what the peer's indices of a smaller one come to at that size."""
    documents = int(work.options.documents)
    big, small = work.scratch / "big", work.scratch / "small"
    for prefix, count in ((big, documents), (small, PEER_DOCUMENTS)):
        _big_increment(work, prefix, count)
    results = in_turns(["opening", str(big)], None, work.megatron, work.repetitions)
    peer = in_turns(["opening", str(small)], ["build", str(small)], work.megatron, min(work.repetitions, 3))
    built = medians(peer["megatron"])
    scale = documents / built["documents"]
    return {
        "ours": medians(results["ours"]),
        "ours_small": medians(peer["ours"]),
        "megatron_small": built,
        "megatron_extrapolated": {
            "documents": documents,
            "cpu_seconds": round(built["cpu_seconds"] * scale),
            "resident_megabytes": round(built["resident_megabytes"] * scale),
        },
    }


def blend(work: Work) -> dict[str, Any]:
    """Five datasets, a million samples."""
    arguments = ["blend", "--samples", "1000000", "--weights", *WEIGHTS]
    results = in_turns(arguments, arguments, work.megatron, work.repetitions)
    return {"weights": list(WEIGHTS), **{name: medians(each) for name, each in results.items()}}


def verify(work: Work) -> dict[str, Any]:
    """All digests of an increment, read once."""
    prefix = _made(work, work.options.large_corpus)
    size = sum(Path(f"{prefix}{suffix}").stat().st_size for suffix in (".bin", ".idx"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools/verify_data.py"), "--data", prefix]
    spent = [run(command, environment, work.scratch / "verify.txt") for _ in range(work.repetitions)]
    seconds = sorted(each.cpu_seconds for each in spent)[len(spent) // 2]
    return {"bytes": size, "median_cpu_seconds": round(seconds, 3), "start_up_included": True}


SECTIONS: Mapping[str, Callable[[Work], dict[str, Any]]] = {
    "preprocess": preprocess,
    "workers": workers,
    "startup": startup,
    "fetch": fetch,
    "feed": feed,
    "opening": opening,
    "blend": blend,
    "verify": verify,
}


def _made(work: Work, corpus: Path) -> str:
    """The prefix of the increment that our tool makes of ``corpus``, made once."""
    folder = work.scratch / f"made-{corpus.stem}"
    prefix = folder / "P_text_document"
    if not Path(f"{prefix}.json").exists():
        work.ours("sentencepiece").run(corpus, folder)
    return str(prefix)


def _big_increment(work: Work, prefix: Path, documents: int) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/big_increment.py"), "--prefix", str(prefix)]
    command += ["--documents", str(documents)]
    run(command, {**os.environ, "PYTHONPATH": str(ROOT)}, work.scratch / "big_increment.txt")


def _lines_of(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def describe(work: Work) -> dict[str, Any]:
    """What was compared, on what."""
    code = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {PEER_PACKAGES!r}}}))"
    peer = subprocess.run([work.megatron.python, "-c", code], check=True, capture_output=True, text=True).stdout
    shown = {option: value.name if isinstance(value, Path) else value for option, value in vars(work.options).items()}
    hidden = ("megatron_python", "megatron_path", "directory", "output")
    return {
        "compares": {
            "ours": "tools/preprocess_data.py, SampleStream.batch (numpy arrays)",
            "peer": f"Megatron-LM at {work.megatron.commit}: tools/preprocess_data.py, tools/preprocess_data_fast.py, "
            "GPTDataset (torch tensors), helpers.build_blending_indices",
        },
        "convention": "medians; CPU seconds of all processes of a command; ratios above 1: ours is faster; "
        "megabytes are 10^6 bytes",
        "options": {name: value for name, value in shown.items() if name not in hidden},
        "date": datetime.now(UTC).date().isoformat(),
        "device": cpu(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
            "peer": json.loads(peer),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="making, opening and drawing data beside Megatron-LM")
    parser.add_argument("--megatron", type=Path, required=True, help="a checkout of Megatron-LM")
    parser.add_argument("--megatron-python", required=True, help="a Python that can import it")
    parser.add_argument("--megatron-path", default="", help="folders to put before the checkout in its PYTHONPATH")
    parser.add_argument("--corpus", type=Path, required=True, help="JSON lines with a text under 'text'")
    parser.add_argument("--large-corpus", type=Path, required=True, help="more of the kind")
    parser.add_argument("--huggingface", type=Path, required=True, help="folder of a tokenizer.json")
    parser.add_argument("--sentencepiece", type=Path, required=True, help="a SentencePiece model")
    parser.add_argument("--documents", type=int, default=1_000_000_000, help="of the increment that is opened")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--sections", nargs="+", choices=sorted(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--directory", type=Path, help="where to write (default: the system's temporary directory)")
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    options = parser.parse_args()
    megatron = Megatron(options.megatron, options.megatron_python, options.megatron_path)
    models = {"huggingface": options.huggingface, "sentencepiece": options.sentencepiece}
    kept = options.output is not None and options.output.exists() and set(options.sections) != set(SECTIONS)
    result: dict[str, Any] = json.loads(options.output.read_text(encoding="utf-8")) if kept else {"load_average": {}}
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        work = Work(options, megatron, models, Path(scratch))
        result.update(describe(work))
        for name in options.sections:
            before = os.getloadavg()[0]
            result[name] = SECTIONS[name](work)
            result["load_average"][name] = {"before": round(before, 2), "after": round(os.getloadavg()[0], 2)}
            print(f"{name}: {json.dumps(result[name])}", file=sys.stderr, flush=True)
            if options.output:
                options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
