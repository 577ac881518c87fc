"""A run read back from its directory: plan, metrics and, once it has finished, summary. Imports no torch."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import yaml

from megalrps.errors import InputError
from megalrps.evaluation.metrics_file import Metrics, Trace, read_metrics, smoothed
from megalrps.evaluation.summary import Release, Summary, read_summary
from megalrps.paths.plan import Plan
from megalrps.training.run_directory import RunDirectory

_SMOOTHING = 0.02


@dataclass(frozen=True)
class Run:
    """What a run's files say.

    ``summary`` is None while the run has not finished; ``alpha`` is the option of that name in ``config.yaml``, None
    without one.
    """

    name: str
    plan: Plan
    metrics: Metrics
    summary: Summary | None
    alpha: tuple[float, ...] | None = None

    @cached_property
    def traces(self) -> dict[str, Trace]:
        """The trained part of each path of the plan, by its name; an empty trace for a path not begun."""
        return {path.name: self.metrics.of(path.name) for path in self.plan.paths}

    def inherited(self, path: str) -> Trace:
        """What the trajectory of ``path`` was before its own first step: its ancestors' records up to the forks."""
        fork = self.plan.path(path).parent
        if fork is None:
            return self.traces[path].until(-1)
        return self.inherited(fork.path).then(self.traces[fork.path]).until(fork.step)

    @cached_property
    def smoothing_steps(self) -> int:
        """The memory, in steps, of the moving average of the loss: a part of the longest trajectory."""
        return max(1, round(_SMOOTHING * max(self.reached.values())))

    @cached_property
    def smoothed_traces(self) -> dict[str, Trace]:
        """The begun paths with their loss averaged along the whole trajectory.

        A branch's average thus goes on from its parent's at the fork, which is its first point.
        """
        return {name: self._smoothed(name) for name, trace in self.traces.items() if len(trace)}

    def _smoothed(self, path: str) -> Trace:
        before = self.inherited(path)
        whole = before.then(self.traces[path])
        averaged = replace(whole, loss=smoothed(whole.loss, self.smoothing_steps))
        return averaged.after(int(before.steps[-1]) - 1) if len(before) else averaged

    @cached_property
    def reached(self) -> dict[str, int]:
        """The last trained step of each path; its start where it has not begun."""
        return {
            path.name: int(self.traces[path.name].steps[-1]) if len(self.traces[path.name]) else path.start
            for path in self.plan.paths
        }

    @cached_property
    def tokens_per_step(self) -> int:
        """Tokens one update trains on: the same at every step of a trajectory, so any record tells it."""
        record = self.metrics.records[0]
        return record.tokens // record.step

    @property
    def planned_steps(self) -> int:
        return sum(segment.steps for segment in self.plan.segments)

    @property
    def trained_steps(self) -> int:
        return len(self.metrics.records)

    @property
    def releases(self) -> tuple[Release, ...]:
        return self.summary.releases if self.summary else ()

    @cached_property
    def held_out(self) -> tuple[str, ...]:
        """The increments whose held-out part was measured: those of the plan in its order, then any others."""
        measured = dict.fromkeys(name for release in self.releases for name in release.perplexity)
        planned = [increment.name for increment in self.plan.increments if increment.name in measured]
        return tuple(dict.fromkeys([*planned, *measured]))

    @cached_property
    def trained_on(self) -> dict[str, tuple[str, ...]]:
        """By version, the increments its trajectory drew samples from, in the plan's order."""
        seen = {path.release: self._increments_of(path.name, path.end) for path in self.plan.releases if path.release}
        names = [increment.name for increment in self.plan.increments]
        return {version: tuple(name for name in names if name in increments) for version, increments in seen.items()}

    def _increments_of(self, name: str, end: int) -> set[str]:
        path = self.plan.path(name)
        own = {each for w in path.windows if w.end > path.start and w.start < end for each in w.increments}
        return own | self._increments_of(path.parent.path, path.parent.step) if path.parent and path.start else own

    @cached_property
    def median_speed(self) -> float | None:
        """Median tokens per second over the steps that tell it."""
        return _median(record.tokens_per_second for record in self.metrics.records)

    @cached_property
    def median_mfu(self) -> float | None:
        """Median model FLOPs utilisation, a fraction, over the steps that tell it."""
        return _median(record.mfu for record in self.metrics.records)

    def largest_lr_difference(self) -> float:
        """The largest |logged lr - the plan's lr| over all records, relative to the plan's largest lr."""
        differences = [
            abs(record.lr - self.plan.path(record.path).curve(record.step)) for record in self.metrics.records
        ]
        peak = max((piece.start_lr for path in self.plan.paths for piece in path.curve.pieces), default=0.0)
        return float(np.max(differences)) / peak if peak else float(np.max(differences))


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def read_run(directory: Path | str) -> Run:
    """The run in ``directory``.

    Raises InputError, naming the file and the mend, for a directory that holds no run, for files that cannot be read,
    and for files that do not belong together.
    """
    files = RunDirectory(Path(directory))
    if not files.root.is_dir():
        raise InputError(f"{files.root}: no such directory; hand the directory of a run (the --save of its training)")
    summary = read_summary(files.summary) if files.summary.exists() else None
    run = Run(
        files.root.resolve().name,
        _read_plan(files.plan),
        read_metrics(files.metrics),
        summary,
        _read_alpha(files.config),
    )
    _check_metrics(run, files.metrics)
    if summary:
        _check_summary(run, summary, files.summary)
    return run


def _read_plan(path: Path) -> Plan:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; hand the directory of a run (the --save of its training)") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); make it readable") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); start the run again, which writes its plan") from None
    return Plan.from_json(value, str(path))


def _read_alpha(path: Path) -> tuple[float, ...] | None:
    """``alpha`` of the options stored with the run, which the cost of path switching depends on."""
    if not path.exists():
        return None
    mend = "restore the file the run wrote, or remove it"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())}); {mend}") from None
    plan = content.get("plan") if isinstance(content, dict) else None
    alpha = plan.get("alpha") if isinstance(plan, dict) else None
    if alpha is None:
        return None
    values = alpha if isinstance(alpha, list) else [alpha]
    if not values or not all(isinstance(value, int | float) and 0 < value <= 1 for value in values):
        raise InputError(f"{path}: alpha {alpha!r} must be numbers in (0, 1]; {mend}")
    return tuple(float(value) for value in values)


def _check_metrics(run: Run, file: Path) -> None:
    planned = {path.name: path for path in run.plan.paths}
    mend = "plan.json and metrics.jsonl must be of one run"
    for record in run.metrics.records:
        path = planned.get(record.path)
        if path is None:
            raise InputError(f"{file}: a step of path {record.path!r}, which plan.json does not have; {mend}")
        if not path.start < record.step <= path.end:
            raise InputError(
                f"{file}: step {record.step} of path {record.path!r}, which trains steps {path.start + 1} to "
                f"{path.end}; {mend}"
            )
        if record.tokens != record.step * run.tokens_per_step:
            raise InputError(
                f"{file}: {record.tokens} tokens at step {record.step} of path {record.path!r}, where "
                f"{run.tokens_per_step} a step make {record.step * run.tokens_per_step}; give one run's metrics"
            )


def _check_summary(run: Run, summary: Summary, file: Path) -> None:
    mend = "plan.json and summary.json must be of one run"
    if summary.paradigm != run.plan.paradigm:
        raise InputError(f"{file}: paradigm {summary.paradigm!r}, where plan.json says {run.plan.paradigm!r}; {mend}")
    planned = {path.release: path for path in run.plan.releases}
    for release in summary.releases:
        path = planned.get(release.name)
        if path is None or (path.name, path.end) != (release.path, release.step):
            raise InputError(
                f"{file}: release {release.name!r} at step {release.step} of path {release.path!r} is not in "
                f"plan.json; {mend}"
            )
