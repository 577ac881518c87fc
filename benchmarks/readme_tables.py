"""Write the measured tables of README.md from benchmarks/results/; tests/test_readme.py fails while they differ.

python benchmarks/readme_tables.py
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- (\w+): from benchmarks/results/([\w.]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *rows))


def quickstart(result: Mapping[str, Any]) -> str:
    """What `make quickstart` printed, in short, and how long it took."""
    summary = result["summary"]
    increments = list(summary["releases"][0]["perplexity"])
    rows = [
        [release["name"], f"{release['step']:,}", *(f"{release['perplexity'][name]:.1f}" for name in increments)]
        for release in summary["releases"]
    ]
    return (
        f"{result['device']}, Python {result['versions']['python']}, torch {result['versions']['torch']}: "
        f"{result['seconds_first_run_with_set_up']:.0f} s from an empty clone to the report, set-up included; "
        f"{result['seconds_second_run']:.0f} s when run again. {summary['cost_steps']:,} steps; the training loss "
        f"falls from {result['loss_first_step']:.2f} to {result['loss_last_step']:.2f} nats per token. Perplexity of "
        "each version on the held-out part of each increment:\n\n"
        + table(["version", "step", *increments], rows)
        + f"\nKilled after {result['killed_after_steps']:,} lines of metrics and started again, it released the same "
        "bytes.\n"
    )


def compare(result: Mapping[str, Any]) -> str:
    """The table of `make compare`: mean perplexity over a version's own increments, and cost."""
    summaries = result["summaries"]
    reference = summaries["ptfs"]["cost_steps"]
    versions = [release["name"] for release in summaries["ptfs"]["releases"]]
    rows = []
    for paradigm, summary in summaries.items():
        means = []
        for place, release in enumerate(summary["releases"]):
            own = list(release["perplexity"].values())[: place + 1]
            means.append(f"{sum(own) / len(own):.1f}")
        cost = summary["cost_steps"]
        rows.append([f"`{paradigm}`", *means, f"{cost:,}", f"{100 * cost / reference:.1f} %"])
    return (
        "Mean held-out perplexity over the increments a version was trained on "
        f"({result['seconds_with_set_up']:.0f} s, set-up included):\n\n"
        + table(["paradigm", *versions, "steps", "of `ptfs`"], rows)
    )


def rendered(text: str) -> str:
    """``text`` with every marked block made anew from its results file."""
    render = {"quickstart": quickstart, "compare": compare}

    def block(found: re.Match[str]) -> str:
        result = json.loads((RESULTS / found[3]).read_text())
        return f"{found[1]}{render[found[2]](result)}{found[4]}"

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    README.write_text(rendered(README.read_text()))
