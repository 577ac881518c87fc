"""``python -m megalrps.kernels``: what computes each operation here and why; checks the kernels without a GPU.

python -m megalrps.kernels
python -m megalrps.kernels --check sm_80 sm_90
"""

import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from megalrps.commandline import run_tool
from megalrps.errors import InputError
from megalrps.kernels.ahead_of_time import Job, Verdict, verdicts
from megalrps.kernels.check_cases import must_be_flagged
from megalrps.kernels.compile_case import TARGETS
from megalrps.kernels.table import description, has_cuda_code, jobs, label, native

PROGRAM = "python -m megalrps.kernels"
_WIDTH = 120


@dataclass(frozen=True)
class Arguments:
    """Say what computes each operation on this machine and why, or compile the kernels for GPUs and judge the machine
    code: registers that spill, too much shared memory, instructions that are missing. Needs no GPU."""

    check: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="[TARGET [TARGET ...]]")] = None
    """Compile every kernel for these targets, sm_80 and sm_90 where none is named: status 1 where one has a fault."""

    filter: str = ""
    """Check only the cases with this text in their name, such as "swiglu backward, bf16"."""

    self_test: tyro.conf.FlagCreatePairsOff[bool] = False
    """Compile kernels that the check must find fault with: status 1 where it does not. --check begins with it."""

    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object instead of text."""

    cache: Path | None = None
    """Triton's cache of compiled kernels [unset: a temporary one]."""

    jobs: int = 2
    """Cases compiled at a time."""


def run(arguments: Arguments) -> int:
    """Print what is asked for; the status. InputError for arguments that ask for nothing there is."""
    if arguments.jobs < 1:
        raise InputError(f"--jobs {arguments.jobs}: give at least 1")
    if unknown := [target for target in arguments.check or () if target not in TARGETS]:
        raise InputError(f"--check {unknown[0]} is no target: choose from {', '.join(TARGETS)}")
    if arguments.check is None and arguments.filter:
        raise InputError("--filter chooses cases of --check: give --check and its targets")
    if arguments.check is None and not arguments.self_test:
        found = description()
        _print(json.dumps(found, indent=2) if arguments.json else text_view(found))
        return 0
    return _check(arguments)


def _check(arguments: Arguments) -> int:
    """The self-test, then the cases of ``--check``, each told as soon as it is known."""
    report = _silent if arguments.json else _print
    targets = tuple(dict.fromkeys(arguments.check or TARGETS))
    chosen = [] if arguments.check is None else jobs(targets, arguments.filter)
    if arguments.check is not None and not chosen:
        raise InputError(f"--filter {arguments.filter} is in no case's name: see --check without it")
    complaints, tested = self_test(targets, arguments.jobs, arguments.cache)
    report("\n".join(complaints) or f"self-test: what is wrong with {len(tested)} faulty kernels was found")
    found: list[Verdict] = []
    if chosen:
        report(_cuda_part(targets))
        width = max(len(label(job.operation, job.case.name)) for job in chosen)
        for verdict in verdicts(chosen, arguments.jobs, arguments.cache):
            found.append(verdict)
            report(verdict_line(verdict, width))
        report(summary_line(found))
    if arguments.json:
        tests = {"complaints": complaints, "verdicts": [asdict(verdict) for verdict in tested]}
        checked = [asdict(verdict) for verdict in found]
        _print(json.dumps({"self_test": tests, "native": native(), "verdicts": checked}, indent=2))
    return 1 if complaints or any(verdict.faults for verdict in found) else 0


def self_test(targets: Sequence[str], workers: int, cache: Path | None) -> tuple[list[str], list[Verdict]]:
    """What the check failed to find in the kernels it must find fault with, and its verdicts on them."""
    cases = must_be_flagged()
    tested = [*verdicts([Job("self-test", case, target) for case, _ in cases for target in targets], workers, cache)]
    faults = {case.name: fault for case, fault in cases}
    complaints = [
        f"self-test: {verdict.case} at {verdict.target} must be said to have one fault, '{faults[verdict.case]} ...'; "
        f"found: {'; '.join(verdict.faults) or 'none'}"
        for verdict in tested
        if len(verdict.faults) != 1 or not verdict.faults[0].startswith(faults[verdict.case])
    ]
    return complaints, tested


def verdict_line(verdict: Verdict, width: int) -> str:
    """A verdict in one line: the target, the case in ``width`` columns, ok or FAULT, the figures, the faults."""
    name = label(verdict.operation, verdict.case).ljust(width)
    parts = [verdict.target, name, "FAULT" if verdict.faults else "ok   "]
    if verdict.instructions is not None:
        parts.append(f"{verdict.registers:>3} registers")
        parts.append(f"{verdict.spill_bytes:>4} spilled")
        parts.append(f"{verdict.shared_bytes:>7,} shared")
        parts.append(f"{verdict.warps:>2} warps")
        parts.append(f"{verdict.cpu_seconds:>5.2f} s")
        parts += [f"{name} {number}" for name, number in verdict.instructions.items()]
    return "  ".join([*parts, *verdict.faults])


def summary_line(found: Sequence[Verdict]) -> str:
    """How many cases were compiled, how many have a fault, and what it took."""
    faulty = sum(bool(verdict.faults) for verdict in found)
    seconds = sum(verdict.cpu_seconds for verdict in found)
    return f"{len(found)} cases compiled in {seconds:.0f} seconds of CPU, {faulty or 'none'} with a fault"


def text_view(found: dict[str, Any]) -> str:
    """:func:`megalrps.kernels.table.description` as text."""
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in found["versions"].items())
    devices = ", ".join(found["devices"]) or "no CUDA device: a CPU computes"
    lines = [versions, f"devices: {devices}", _native_line(found["native"]), ""]
    operations = found["operations"]
    widths = [max(len(each[key]) for each in operations) for key in ("name", "implementation", "computes")]
    left = sum(widths) + 6
    for each in operations:
        name, implementation, computes = (
            each[key].ljust(width) for key, width in zip(("name", "implementation", "computes"), widths, strict=True)
        )
        first, *others = textwrap.wrap(each["why"], max(_WIDTH - left, 30)) or [""]
        lines.append(f"{name}  {implementation}  {computes}  {first}".rstrip())
        lines += [" " * left + other for other in others]
    return "\n".join(lines)


def _native_line(native: dict[str, Any]) -> str:
    if native["missing"]:
        return f"megalrps._native: not built: {native['missing']}"
    targets = ", ".join(native["cuda_targets"])
    cuda = f"CUDA for {targets}" if targets else "no CUDA part"
    unusable = native["cuda_missing"] and f"not usable here: {native['cuda_missing']}"
    return "; ".join(filter(None, (f"megalrps._native: C++ built, {cuda}", unusable)))


def _cuda_part(targets: Sequence[str]) -> str:
    """Whether csrc's CUDA kernels were built for ``targets``: nvcc has judged them, so this is no fault."""
    there = native()["cuda_targets"]
    said = (f"{target} {'built' if has_cuda_code(target, there) else 'not built'}" for target in targets)
    return f"CUDA part of megalrps._native: {', '.join(said)}"


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _silent(text: str) -> None:
    """Where ``--json`` prints one object, nothing else is told."""


def _main() -> None:
    if status := run(tyro.cli(Arguments, prog=PROGRAM)):
        sys.exit(status)


if __name__ == "__main__":
    run_tool(_main, PROGRAM)
