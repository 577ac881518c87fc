#!/usr/bin/env python3
"""Make an increment of several datasets, each with a weight: write the blend's manifest, PREFIX.json.

tools/blend_increments.py --output data/2024 --name 2024 --data data/web data/code data/books --weights 0.7 0.2 0.1
"""

from dataclasses import dataclass

import tyro

from megalrps.commandline import run_tool
from megalrps.data.blend import blend
from megalrps.exact import percent

PROGRAM = "blend_increments.py"


@dataclass(frozen=True)
class BlendOptions:
    """Blend datasets by weights, exact to less than a sample over every prefix. The datasets stay where they are.

    The result is named wherever an increment is: pretrain_gpt.py --increments PREFIX.
    """

    output: str
    """PREFIX of the blend: PREFIX.json is written, and nothing else."""

    name: str
    """Name of the increment that the blend is."""

    data: tuple[str, ...]
    """Datasets: a prefix (of PREFIX.bin, .idx, .json) each."""

    weights: tuple[str, ...]
    """Of the samples of each, relative to one another and exact: 0.7, 137.2 or 1/3."""


def run(options: BlendOptions) -> str:
    """Write the blend, say what it holds; InputError for what cannot be blended."""
    manifest = blend(options.output, options.name, options.data, options.weights)
    total = sum(manifest.weights)
    lines = [f"{options.output}: increment {manifest.name}, a blend of {len(manifest.members)}"]
    for member, weight in zip(manifest.members, manifest.weights, strict=True):
        lines.append(f"  {percent(weight / total)} {member.name}, {member.tokens:,} tokens")
    return "\n".join(lines)


if __name__ == "__main__":
    run_tool(lambda: print(run(tyro.cli(BlendOptions, prog=PROGRAM))), PROGRAM)
