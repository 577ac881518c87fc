"""Whether a run may go on with the options it is given, and whether its ranks were given the same ones.

Whatever would change the result is refused by name.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from megalrps import __version__
from megalrps.checkpoint.lineage import Lineage
from megalrps.checkpoint.record import CheckpointRecord
from megalrps.errors import InputError
from megalrps.training.prepare import Job

# Sections and options that decide the numbers of a step. What is not here (device, save interval, micro-batch, log)
# may change from launch to launch; the plan is compared segment by segment, so that it may grow.
_DECISIVE_SECTIONS = ("model", "optimizer")
_DECISIVE_OPTIONS = (
    ("data", "seq_length"),
    ("training", "global_batch_size"),
    ("training", "bf16"),
    ("training", "fp16"),
    ("training", "seed"),
)


def check_continuation(lineage: Lineage, job: Job, run: Path) -> None:
    """Raise InputError where ``job`` is not the one that ``run`` was trained with, or does not extend it.

    The message names each differing flag with the old and the new value. A plan may gain increments; what has been
    trained must be in it, unchanged.
    """
    known = {job.plan.segment_fingerprint(segment) for segment in job.plan.segments}
    for name in lineage.all():
        record = lineage.records[name]
        differences = [*_settings(record, job), *_data(record, job)]
        if record.segment_fingerprint not in known:
            differences += _plan(record, job)
            differences = differences or [*_order(record, job)] or [f"path {record.path} is not in the plan any more"]
        if differences:
            raise InputError(
                f"--save {run} holds {name}, trained with other options: {'; '.join(differences)}. "
                "Give the old options to go on, or name another directory"
            )


def identity(job: Job) -> dict[str, Any]:
    """What must be the same on every rank of a launch, by the name that a message gives it."""
    options = {
        f"--{option.replace('_', '-')}": value
        for section, body in job.resolved().items()
        if section != "runtime"
        for option, value in body.items()
    }
    contents = {f"the content of {each.dataset.prefix}": each.manifest.fingerprint for each in job.held_out}
    data = {f"the content of increment {name}": content for name, content in job.data_fingerprints().items()}
    return {**options, **data, **contents, "the plan": job.plan.fingerprint, "the version of megalrps": __version__}


def difference_between_ranks(identities: Sequence[Mapping[str, Any]]) -> InputError | None:
    """The error of a launch whose ranks would not train one job (one node's files are old); None where all would."""
    first = identities[0]
    for rank, other in enumerate(identities):
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if names:
            told = "; ".join(f"{name}: {_text(first.get(name))} and {_text(other.get(name))}" for name in names[:4])
            return InputError(
                f"ranks 0 and {rank} were not started with the same job: {told}. Give every rank the same command, "
                "files and installation"
            )
    return None


def _settings(record: CheckpointRecord, job: Job) -> Iterator[str]:
    now = job.resolved()
    for section in _DECISIVE_SECTIONS:
        yield from _differing(_recorded(record, job, section), now[section], sorted(now[section]))
    for section, option in _DECISIVE_OPTIONS:
        yield from _differing(_recorded(record, job, section), now[section], [option])


def _recorded(record: CheckpointRecord, job: Job, section: str) -> dict[str, Any]:
    """The options that ``record`` was trained with; one that is younger than it had its default's effect."""
    options = getattr(job.config, section)
    defaults = {each.name: each.default for each in fields(options) if each.default is not MISSING}
    return {**defaults, **record.config.get(section, {})}


def _plan(record: CheckpointRecord, job: Job) -> Iterator[str]:
    now = job.resolved()["plan"]
    yield from _differing(record.config.get("plan", {}), now, sorted(now))


def _order(record: CheckpointRecord, job: Job) -> Iterator[str]:
    """What is left to differ where all options and contents agree: the order, told by the prefixes."""
    was, now = record.config.get("data", {}), job.resolved()["data"]
    if now["increments"][: len(was.get("increments", []))] != was.get("increments"):
        yield from _differing(was, now, ["increments"])


def _data(record: CheckpointRecord, job: Job) -> Iterator[str]:
    now = job.data_fingerprints()
    for name, content in record.data.items():
        if name not in now:
            yield f"increment {name} is missing from --increments"
        elif now[name] != content:
            yield f"increment {name} has other content than the one trained on"


def _differing(old: Mapping[str, Any], new: Mapping[str, Any], options: list[str]) -> Iterator[str]:
    for option in options:
        if old.get(option) != new[option]:
            yield f"--{option.replace('_', '-')} was {_text(old.get(option))} and is {_text(new[option])}"


def _text(value: Any) -> str:
    if value is None or value == []:
        return "unset"
    return " ".join(str(item) for item in value) if isinstance(value, list) else str(value)
