"""Whether a run may go on with the options it is given, and whether its ranks were given the same ones.

Whatever would change the result is refused by name, unless it may be allowed and is. What is on the disk stays as it
was trained; what is trained from then on, is trained with the new options and records why.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megalrps import __version__
from megalrps.checkpoint.lineage import Lineage
from megalrps.checkpoint.record import CheckpointRecord
from megalrps.errors import InputError
from megalrps.paths.options import PlanOptions
from megalrps.paths.paradigms import build_plan
from megalrps.paths.plan import Plan, Segment
from megalrps.training.allowed import (
    OF_DATA,
    Change,
    Decisions,
    decision,
    decisions_of,
    flag,
    reasons_given,
    text_of,
)
from megalrps.training.decisive import CHANGEABLE, DECISIVE_IN_ORDER, FIXED, OF_THE_CURVES, ONLY_WITH_FP16, ROUNDING
from megalrps.training.prepare import Job


def check_continuation(lineage: Lineage, job: Job, run: Path) -> Decisions:
    """What was allowed to change in ``run``, by this launch or before it: every checkpoint of ``job`` records it.

    Raises InputError where ``job`` is not the one that ``run`` was trained with, or does not extend it, and nobody has
    allowed that; the message names each differing flag with the old and the new value. A plan may gain increments; what
    has been trained must be in it, unchanged. What --allow names, and nothing needs, is refused too.
    """
    reasons = reasons_given(job.config.checkpoint.allow, job.data_fingerprints())
    before, present = decisions_of(lineage), _Present(job)
    made: dict[str, Change] = {}
    for name in lineage.all():
        record = lineage.records[name]
        fixed, changes = _fixed(record, present), _changes(record, present)
        open_ones = [each for each in changes if before.get(each.name, {}).get("is", _NOTHING) != each.now]
        refused = [each for each in open_ones if each.name not in reasons]
        if fixed or refused:
            raise _other_options(run, name, fixed, refused)
        made.update({each.name: each for each in open_ones})
    for change in reasons.keys() - made.keys():
        # A launch that is repeated word for word, as a batch system does, has been taken note of already.
        if change not in before:
            raise InputError(f"--allow {change}: nothing that {run} holds was trained with another value: leave it out")
    now = present.values
    kept = {name: each for name, each in before.items() if name not in made and each["is"] == now.get(name, _NOTHING)}
    return kept | {name: decision(each, reasons[name], before.get(name)) for name, each in made.items()}


def as_planned(lineage: Lineage, job: Job) -> Lineage:
    """``lineage`` with every checkpoint under the fingerprint that the present plan gives its segment.

    They differ where a learning rate was allowed to change: what was trained with the old ones has finished its segment
    all the same.
    """
    present = _Present(job)
    segments = {name: present.segment(record) for name, record in lineage.records.items()}
    known = {name: job.plan.segment_fingerprint(segment) for name, segment in segments.items() if segment is not None}
    records = {
        name: replace(record, segment_fingerprint=known[name]) if name in known else record
        for name, record in lineage.records.items()
    }
    return Lineage(records, lineage.refused)


def differences_in_rounding(
    record: CheckpointRecord, versions: Mapping[str, str], job: Job, now: Mapping[str, str]
) -> list[str]:
    """What is other than when ``record`` was made and changes the last bits at most: options, and packages' versions.

    ``versions`` are those of its manifest, ``now`` the present ones.
    """
    present = _Present(job)
    options = [str(each) for section in present.sections for each in present.differing(record, section, ROUNDING)]
    packages = [
        f"{name} was {versions[name][:_DIGITS]} and is {version[:_DIGITS]}"
        for name, version in now.items()
        if versions.get(name, version) != version
    ]
    return options + packages


def identity(job: Job) -> dict[str, Any]:
    """What must be the same on every rank of a launch, by the name that a message gives it."""
    options = {
        f"--{flag(option)}": value
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
            told = "; ".join(f"{name}: {text_of(first.get(name))} and {text_of(other.get(name))}" for name in names[:4])
            return InputError(
                f"ranks 0 and {rank} were not started with the same job: {told}. Give every rank the same command, "
                "files and installation"
            )
    return None


class _Present:
    """The job that is to go on, beside which a record is held."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.contents = job.data_fingerprints()
        self._drawn: dict[tuple[Any, ...], Mapping[str, Segment]] = {}

    @cached_property
    def sections(self) -> dict[str, Any]:
        """The present options by section."""
        return self.job.resolved()

    @property
    def values(self) -> dict[str, Any]:
        """The present value of all that --allow may name."""
        options = {flag(name): value for body in self.sections.values() for name, value in body.items()}
        contents = {OF_DATA + name: content for name, content in self.contents.items()}
        return {name: options[name] for name in map(flag, CHANGEABLE)} | contents

    def was(self, record: CheckpointRecord, section: str) -> dict[str, Any]:
        """The options that ``record`` was trained with; one that is younger than it had its default's effect."""
        options = getattr(self.job.config, section)
        defaults = {each.name: each.default for each in fields(options) if each.default is not MISSING}
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
        return {**lists, **record.config.get(section, {})}

    def differing(self, record: CheckpointRecord, section: str, names: Collection[str]) -> Iterator[Change]:
        """Those of the named options of ``section`` that ``record`` was trained with other values of."""
        body = self.sections[section]
        asked = [name for name in body if name in names]
        was = self.was(record, section) if asked else {}
        for name in asked:
            if was.get(name) != body[name]:
                yield Change(flag(name), was.get(name), body[name])

    def segment(self, record: CheckpointRecord) -> Segment | None:
        """The segment of the present plan that ``record`` was trained for; None where the plan does not have it.

        The plan as the learning rates of the past drew it has the same paths, steps and samples: where the record's
        fingerprint is found in that one, nothing but the learning rates differs.
        """
        present = self._segments(self.job.config.plan)
        if record.segment_fingerprint in present:
            return present[record.segment_fingerprint]
        was = self.was(record, "plan")
        options = replace(self.job.config.plan, **{name: was[name] for name in OF_THE_CURVES})
        return self._segments(options).get(record.segment_fingerprint)

    def is_as_planned(self, record: CheckpointRecord) -> bool:
        """Whether the present plan would train the record's segment with the very same learning rates."""
        return record.segment_fingerprint in self._segments(self.job.config.plan)

    def _segments(self, options: PlanOptions) -> Mapping[str, Segment]:
        """The segments of the present plan by the fingerprints that ``options`` give them."""
        key = tuple(getattr(options, name) for name in OF_THE_CURVES)
        if key not in self._drawn:
            self._drawn[key] = {}
            with suppress(InputError):  # an old warm-up, say, that does not fit into the present increments
                plan = self.job.plan if options == self.job.config.plan else self._plan(options)
                self._drawn[key] = {plan.segment_fingerprint(each): each for each in plan.segments}
        return self._drawn[key]

    def _plan(self, options: PlanOptions) -> Plan:
        return build_plan(self.job.plan.increments, options)


_NOTHING = object()
_DIGITS = 32  # of a version, or of a digest that stands for one


def _other_options(run: Path, name: str, fixed: Sequence[str], refused: Sequence[Change]) -> InputError:
    told = "; ".join([*fixed, *map(str, refused)])
    mend = "Give the old options to go on, or name another directory"
    if not fixed:
        allow = " ".join(f"{each.name}=REASON" for each in refused)
        mend = f"Give the old options to go on, name another directory, or say why: --allow {allow}"
    return InputError(f"--save {run} holds {name}, trained with other options: {told}. {mend}")


def _changes(record: CheckpointRecord, present: _Present) -> Iterator[Change]:
    """What differs, changes results, and may be allowed to."""
    names = CHANGEABLE - set(OF_THE_CURVES) - _idle(record, present) - _fixed_now(present)
    for section in present.sections:
        yield from present.differing(record, section, names)
    if not present.is_as_planned(record):
        yield from present.differing(record, "plan", OF_THE_CURVES)
    for name, content in record.data.items():
        if present.contents.get(name, content) != content:
            yield Change(OF_DATA + name, content, present.contents[name])


def _fixed(record: CheckpointRecord, present: _Present) -> list[str]:
    """What differs and may not; of the plan, where it does not have the record's segment any more."""
    names = (FIXED.keys() | _fixed_now(present) | _in_order(record, present)) - {"increments"} - _idle(record, present)
    found = [
        str(each)
        for section in present.sections
        if section != "plan"
        for each in present.differing(record, section, names)
    ]
    found += [f"increment {name} is missing from --increments" for name in record.data if name not in present.contents]
    if present.segment(record) is not None:
        return found
    found += map(str, present.differing(record, "plan", FIXED.keys()))
    return found or [*_order(record, present)] or [f"path {record.path} to step {record.step} is not in the plan"]


def _order(record: CheckpointRecord, present: _Present) -> Iterator[str]:
    """What is left to differ where all options and contents agree: the order, told by the prefixes."""
    was, now = record.config.get("data", {}).get("increments", []), present.sections["data"]["increments"]
    if now[: len(was)] != was:
        yield str(Change("increments", was, now))


def _fixed_now(present: _Present) -> set[str]:
    """``fp16`` may be given up, but not taken up: no checkpoint without it holds a loss scale."""
    return {"fp16"} if present.job.config.training.fp16 else set()


def _in_order(record: CheckpointRecord, present: _Present) -> frozenset[str]:
    """What decides the last bits of a run that promises them."""
    both = present.was(record, "parallel")["deterministic_reduction"]
    return DECISIVE_IN_ORDER if both and present.job.config.parallel.deterministic_reduction else frozenset()


def _idle(record: CheckpointRecord, present: _Present) -> frozenset[str]:
    """Options that had no effect, or have none."""
    both = present.was(record, "training")["fp16"] and present.job.config.training.fp16
    return frozenset() if both else ONLY_WITH_FP16
