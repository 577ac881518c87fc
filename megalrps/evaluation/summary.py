"""``RUN/summary.json``: what a finished run released, how good it is and what it cost. Imports no torch.

The file is an interface others script against::

    {"paradigm": "lrps",
     "releases": [{"name": "v1", "path": "v1", "step": 100, "tokens": 409600, "checkpoint": "checkpoints/...",
                   "perplexity": {"increment-1": 21.3}, "bits_per_byte": {"increment-1": 1.71}}],
     "cost_steps": 580, "wall_seconds": 212.4, "report": "runs/quickstart/report.html"}

and, where they are known, ``"device"`` (a text) and ``"parameters"`` (of the model). Perplexity and bits per byte are
of each increment's held-out part.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalrps.errors import InputError
from megalrps.evaluation.json_fields import Fields, read_fields
from megalrps.files import write_json

if TYPE_CHECKING:
    from megalrps.evaluation.perplexity import HeldOutLoss

SUMMARY_FILE = "summary.json"
_REQUIRED = ("paradigm", "releases", "cost_steps", "wall_seconds", "report")
_OPTIONAL = ("device", "parameters")
_RELEASE = ("name", "path", "step", "tokens", "checkpoint", "perplexity", "bits_per_byte")
_MEND = "let the run that owns the file write it again (start it with the same command), or hand another run"


@dataclass(frozen=True)
class Release:
    """A released version: where its weights are and what they are worth.

    ``step`` and ``tokens`` count from step 0 of the version's trajectory, what it inherited from its parent included.
    """

    name: str
    path: str
    step: int
    tokens: int
    checkpoint: str
    perplexity: Mapping[str, float]
    bits_per_byte: Mapping[str, float]

    @classmethod
    def measured(
        cls, name: str, path: str, step: int, tokens: int, checkpoint: str, held_out: "Mapping[str, HeldOutLoss]"
    ) -> "Release":
        """A release whose perplexities are those of ``held_out``, by the name of the increment."""
        return cls(
            name=name,
            path=path,
            step=step,
            tokens=tokens,
            checkpoint=checkpoint,
            perplexity={increment: loss.perplexity for increment, loss in held_out.items()},
            bits_per_byte={increment: loss.bits_per_byte for increment, loss in held_out.items()},
        )

    @classmethod
    def from_fields(cls, fields: Fields) -> "Release":
        """The release of one object of ``releases``; InputError for anything but the format above."""
        fields.only(_RELEASE)
        perplexity, bits_per_byte = fields.sizes("perplexity"), fields.sizes("bits_per_byte")
        if list(perplexity) != list(bits_per_byte):
            fields.refuse("'perplexity' and 'bits_per_byte' must name the same increments in the same order")
        if low := [name for name, value in perplexity.items() if value < 1]:
            fields.refuse(f"a perplexity below 1 ({low[0]!r}) cannot be")
        return cls(
            name=fields.text("name"),
            path=fields.text("path"),
            step=fields.count("step"),
            tokens=fields.count("tokens"),
            checkpoint=fields.text("checkpoint"),
            perplexity=perplexity,
            bits_per_byte=bits_per_byte,
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "path": self.path,
            "step": self.step,
            "tokens": self.tokens,
            "checkpoint": self.checkpoint,
            "perplexity": dict(self.perplexity),
            "bits_per_byte": dict(self.bits_per_byte),
        }

    def mean_perplexity(self, increments: Sequence[str]) -> float | None:
        """The arithmetic mean of the perplexities on ``increments``; None where one, or all, were not measured."""
        if not increments or any(name not in self.perplexity for name in increments):
            return None
        return math.fsum(self.perplexity[name] for name in increments) / len(increments)


@dataclass(frozen=True)
class Summary:
    """The content of ``summary.json``; ``cost_steps`` counts the updates of all paths, ``report`` is a page's path."""

    paradigm: str
    releases: tuple[Release, ...]
    cost_steps: int
    wall_seconds: float
    report: str
    device: str | None = None
    parameters: int | None = None

    def to_json(self) -> dict[str, Any]:
        value = {
            "paradigm": self.paradigm,
            "releases": [release.to_json() for release in self.releases],
            "cost_steps": self.cost_steps,
            "wall_seconds": self.wall_seconds,
            "report": self.report,
        }
        known = {"device": self.device, "parameters": self.parameters}
        return value | {name: fact for name, fact in known.items() if fact is not None}

    @classmethod
    def from_fields(cls, fields: Fields) -> "Summary":
        """The summary of a file's object; InputError names the file, the place in it and the mend."""
        fields.only(_REQUIRED, _OPTIONAL)
        releases = tuple(Release.from_fields(inner) for inner in fields.list_of("releases"))
        names = [release.name for release in releases]
        if len(set(names)) < len(names):
            fields.refuse(f"a version is released twice in {', '.join(names)}")
        return cls(
            paradigm=fields.text("paradigm"),
            releases=releases,
            cost_steps=fields.count("cost_steps"),
            wall_seconds=fields.size("wall_seconds"),
            report=fields.text("report"),
            device=fields.text("device") if "device" in fields else None,
            parameters=fields.count("parameters") if "parameters" in fields else None,
        )


def write_summary(path: Path | str, summary: Summary) -> None:
    """Write ``summary`` to ``path`` atomically, after reading it back in memory: what is written can be read.

    Raises InputError for a summary no reader would accept, a diverged model's infinite perplexity for one.
    """
    value = summary.to_json()
    Summary.from_fields(Fields(value, path, "", "the run's result cannot be summed up"))
    write_json(path, value)


def read_summary(path: Path | str) -> Summary:
    """The summary in the file ``path``; InputError when it is missing, is of another format or has unknown keys."""
    fields = read_fields(Path(path), _MEND)
    inner = fields.members().values()
    if inner and "releases" not in fields and all(isinstance(value, dict) and "releases" in value for value in inner):
        raise InputError(
            f"{path}: a comparison of runs ({', '.join(fields.names())}), not one run; hand one run's directory"
        )
    return Summary.from_fields(fields)


def write_comparison_summary(path: Path | str, summaries: Mapping[str, Summary]) -> None:
    """Write the summaries of several runs, by paradigm, as one object: the format of ``runs/compare/summary.json``."""
    write_json(path, {paradigm: summary.to_json() for paradigm, summary in summaries.items()})
