"""What the ranks of the example configurations hold, by the dry run: the figures of docs/parallel.md and examples/.

    python benchmarks/memory.py --output benchmarks/results/memory.json     # run every dry run, then write the pages
    python benchmarks/memory.py --pages-only                                # write the pages from the JSON as it is

It needs no GPU and no data: the increments are made up, and a dry run reads no more of them than their size. The pages
are the tables of docs/parallel.md between their marks, and the comment at the head of each examples/llama_*.yaml.
tests/test_benchmark_docs.py fails where a page and the JSON differ, tests/test_examples.py where a head and a run do.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalrps.config import parse_config
from megalrps.data.indexed import IndexedDatasetWriter
from megalrps.data.manifest import TokenizerIdentity, describe_dataset, write_manifest
from megalrps.training.describe import describe_job, job_as_json
from megalrps.training.prepare import prepare

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "memory.json"
PAGE = ROOT / "docs" / "parallel.md"
EXAMPLES = ROOT / "examples"
STEPS = ("--increment-steps", "10000", "10000", "10000", "10000")
GIB = 1 << 30

_TP2, _TP4 = ("--tensor-model-parallel-size 2", "--tensor-model-parallel-size 4")
_PP2, _SP = "--pipeline-model-parallel-size 2", "--sequence-parallel"
CHOICES = {
    "`dp` alone": "",
    "`--data-parallel-sharding-strategy no_shard`": "--data-parallel-sharding-strategy no_shard",
    "`--data-parallel-sharding-strategy optim_grads`": "--data-parallel-sharding-strategy optim_grads",
    "recomputed, `full`, `uniform`": "--recompute-granularity full --recompute-method uniform",
    "`--cross-entropy-fusion-impl linear`": "--cross-entropy-fusion-impl linear",
    "tp 2": _TP2,
    "tp 2, `--sequence-parallel`": f"{_TP2} {_SP}",
    "tp 4, `--sequence-parallel`": f"{_TP4} {_SP}",
    "pp 2, `1f1b`": _PP2,
    "pp 2, `zbv`": f"{_PP2} --pipeline-schedule zbv",
    "tp 2, `--sequence-parallel`, pp 2, `1f1b`": f"{_TP2} {_SP} {_PP2}",
}
"""A row of the table of choices: how it is called, and its flags."""
MODELS = {"LLaMA 1.2B": "llama_1.2b", "LLaMA 3.1B": "llama_3.1b"}
THOUSAND = f"--tensor-model-parallel-size 8 {_SP} --pipeline-model-parallel-size 8"
LONG = (
    "--seq-length 131072 --global-batch-size 8 --micro-batch-size 1 --rotary-base 500000 "
    f"{_TP4} {_SP} --context-parallel-size 8"
)
LAUNCH = re.compile(r"(\d+ ranks?), [\d.]+ GiB, (a GPU of \d+ GB: (--.*))")
_PARTS = ("parameters", "gradients", "optimizer", "activations", "exchange", "transient")


def made_up_increments(folder: Path) -> list[str]:
    """Prefixes of four increments of a tokenizer of 32,000 ids."""
    tokenizer = TokenizerIdentity("SentencePieceTokenizer", 32_000, 2, "0" * 64)
    prefixes = []
    for year in range(2021, 2025):
        prefix = folder / str(year)
        with IndexedDatasetWriter(prefix, np.uint16) as writer:
            writer.add_document(np.arange(262_144) % 32_000)
        manifest = describe_dataset(
            prefix, name=str(year), tokenizer=tokenizer, text_bytes=8400, append_eod=False, sources=("a.jsonl",)
        )
        write_manifest(prefix, manifest)
        prefixes.append(str(prefix))
    return prefixes


def job(name: str, ranks: int, flags: Sequence[str], increments: Sequence[str]) -> Any:
    """The checked job of examples/NAME.yaml on so many ranks."""
    said = ["--config", str(EXAMPLES / f"{name}.yaml"), "--increments", *increments, *STEPS, *flags]
    config = parse_config([*said, "--dry-run", "--world-size", str(ranks)])
    return prepare(config, ranks)


def fullest(checked: Any) -> dict[str, int]:
    """The bytes of the rank that holds the most, by what they are, and their total."""
    rank = max(job_as_json(checked)["ranks"], key=lambda each: each["bytes_total"])
    return {"total": rank["bytes_total"], **{part: rank["bytes"][part] for part in _PARTS}}


def measure(increments: Sequence[str]) -> dict[str, Any]:
    """Every dry run."""
    choices = {
        label: {row: fullest(job(name, 8, f"{flags} --micro-batch-size 2".split(), increments))
                for row, flags in CHOICES.items()}
        for label, name in MODELS.items()
    }  # fmt: skip
    heads: dict[str, Any] = {}
    for yaml in sorted(EXAMPLES.glob("llama_*.yaml")):
        launches = [(found[1], found[3]) for found in LAUNCH.finditer(yaml.read_text(encoding="utf-8"))]
        heads[yaml.stem] = {
            "alone": fullest(job(yaml.stem, 1, (), increments)),
            "launches": {
                f"{ranks}: {flags}": fullest(job(yaml.stem, int(ranks.split()[0]), flags.split(), increments))
                for ranks, flags in launches
            },
        }
        print(yaml.stem, "done", flush=True)
    thousand = describe_job(job("llama_3.1b", 1024, THOUSAND.split(), increments)).splitlines()
    start = next(at for at, line in enumerate(thousand) if line.startswith("memory at"))
    shown = [line for line in thousand[:start] if line.startswith(("layout", "schedule", "bubble"))]
    return {
        "command": "python benchmarks/memory.py --output benchmarks/results/memory.json",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"torch": torch.__version__},
        "convention": "bytes of the fullest rank at the fullest moment of a step, by --dry-run; no GPU was asked",
        "choices": choices,
        "heads": heads,
        "thousand_ranks": "\n".join((*shown, "", *(line for line in thousand[start:] if "warning" not in line))),
        "long": fullest(job("llama_3.1b", 32, LONG.split(), increments)),
    }


def choices_table(result: Mapping[str, Any]) -> str:
    """The table of choices; a model is named in its first row."""
    rows = [f"| | {' | '.join(('total', *_PARTS))} |", "| --- |" + " ---: |" * (1 + len(_PARTS))]
    for model, figures in result["choices"].items():
        for at, (label, sizes) in enumerate(figures.items()):
            cells = (f"{sizes[part] / GIB:.2f}" if sizes[part] else "" for part in ("total", *_PARTS))
            rows.append(f"| {f'{model}, {label}' if at == 0 else label} | {' | '.join(cells)} |")
    return "\n".join(rows)


def pages(result: Mapping[str, Any]) -> dict[Path, str]:
    """Every page that quotes ``result``, as it ought to be."""
    long = result["long"]
    blocks = {
        "choices": choices_table(result),
        "thousand_ranks": f"```text\n{result['thousand_ranks']}\n```",
        "long": f"By the dry run a rank of it holds {long['total'] / GIB:.2f} GiB, of which activations "
        f"{long['activations'] / GIB:.2f}.",
    }
    page = PAGE.read_text(encoding="utf-8")
    for name, text in blocks.items():
        block = re.compile(rf"(<!-- {name}: from benchmarks/results/memory.json -->\n).*?(\n<!-- end -->)", re.DOTALL)
        page, count = block.subn(lambda found, text=text: f"{found[1]}{text}{found[2]}", page)
        assert count == 1, f"docs/parallel.md has no block {name}"
    written = {PAGE: page}
    for name, head in result["heads"].items():
        path = EXAMPLES / f"{name}.yaml"
        written[path] = _with_head(path.read_text(encoding="utf-8"), head)
    return written


def _with_head(text: str, head: Mapping[str, Any]) -> str:
    parts = ", ".join(f"{part} {head['alone'][part] / GIB:.2f}" for part in _PARTS if head["alone"][part])
    alone = f"memory: {head['alone']['total'] / GIB:.2f} GiB ({parts})"
    text = re.sub(r"memory: [\d.]+ GiB +\(.*\)", alone, text)
    return LAUNCH.sub(
        lambda found: f"{found[1]}, {head['launches'][f'{found[1]}: {found[3]}']['total'] / GIB:.2f} GiB, {found[2]}",
        text,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="memory of the example configurations by the dry run")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--pages-only", action="store_true", help="run nothing: write the pages from the JSON")
    options = parser.parse_args()
    if not options.pages_only:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(made_up_increments(Path(folder)))
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for path, text in pages(json.loads(options.output.read_text(encoding="utf-8"))).items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
