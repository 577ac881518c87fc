"""The run directory: what lies where."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megalrps.errors import InputError
from megalrps.files import sync_directory

_MARK = "plan.json"


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run; documented in docs/run_directory.md."""

    root: Path

    @property
    def plan(self) -> Path:
        """The plan as last resolved: the tree of paths and the order of its segments."""
        return self.root / _MARK

    @property
    def config(self) -> Path:
        """The resolved options as YAML; ``--config`` reads it back."""
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.root / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """One JSON object for each step whose numbers were none or leapt."""
        return self.root / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        """One directory a committed checkpoint."""
        return self.root / "checkpoints"

    @property
    def lineage(self) -> Path:
        """References and leases: what is acknowledged, and who trains which path."""
        return self.root / "lineage"

    def run_state(self, paths: Sequence[str] = ()) -> Path:
        """How the launch that trains ``paths`` (none: all) stands, or how it ended."""
        return self.root / ("run_state.json" if not paths else f"run_state.{'+'.join(paths)}.json")

    @property
    def evaluations(self) -> Path:
        """One JSON file a release: its loss on every held-out part."""
        return self.root / "evaluations"

    @property
    def summary(self) -> Path:
        """What the run came to."""
        return self.root / "summary.json"

    @property
    def report(self) -> Path:
        """The page a person reads."""
        return self.root / "report.html"

    def create(self) -> None:
        """Make the directory, or accept an existing run's.

        Raises InputError for a place that cannot be written or that holds something else than a run.
        """
        try:
            made_above = [place for place in (self.root, *self.root.parents) if not place.exists()]
            self.root.mkdir(parents=True, exist_ok=True)
            for place in made_above:
                sync_directory(place.parent)  # or the whole run may be gone after a loss of power
            self.check()
            for made in (self.checkpoints, self.lineage, self.evaluations):
                made.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--save {self.root} cannot be written ({error.strerror}): name a directory that can"
            ) from error

    def check(self) -> None:
        """Raise InputError where there is something else than a run; makes nothing."""
        if not self.root.exists():
            return
        if not self.root.is_dir():
            raise InputError(f"--save {self.root} is a file: name a directory")
        strangers = [entry.name for entry in self.root.iterdir() if not self._may_precede_a_plan(entry)]
        if strangers and not self._holds_a_run():
            raise InputError(
                f"--save {self.root} is not empty and not a run directory (it holds {strangers[0]}): "
                "name a new directory"
            )

    def _holds_a_run(self) -> bool:
        return self.plan.exists() or any(self.checkpoints.glob("*/manifest.json"))

    def _may_precede_a_plan(self, entry: Path) -> bool:
        """Whether ``entry`` is hidden, or something that a launch made and died before it wrote its plan."""
        made_by_us = entry in (self.checkpoints, self.evaluations) and entry.is_dir()
        told_by_us = entry == self.lineage or entry.match("run_state*.json")
        return entry.name.startswith(".") or told_by_us or (made_by_us and not any(entry.iterdir()))
