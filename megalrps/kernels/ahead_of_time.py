"""Compiles kernels for GPUs that are not there, and judges the machine code: registers, shared memory, instructions.

Triton compiles for any target (``triton.compile`` of an ``ASTSource``); its wheel carries NVIDIA's assembler and
disassembler. So what a launch would only show on the GPU shows on any machine: that a kernel does not compile, spills
registers, takes more shared memory than a block can have, or lost the instructions that it was written for.

Every case is compiled in a process of its own: an assertion in the compiler ends the process, and that is a verdict on
one case, not the end of the check.
"""

import bisect
import itertools
import multiprocessing
import os
import re
import signal
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from megalrps.errors import InputError
from megalrps.kernels.check_cases import WARM_UP
from megalrps.kernels.compile_case import CompileCase
from megalrps.kernels.language import HAS_TRITON, triton

SHARED_MEMORY_LIMIT: Mapping[str, int] = {"sm_80": 166_912, "sm_90": 232_448}
"""Bytes that a block may ask for (CUDA C++ programming guide, table of compute capabilities: 163 and 227 KiB)."""

COUNTED = (
    *("LDG.E.128", "STG.E.128", "LDGSTS", "HMMA", "HGMMA", "UTMALDG", "UTMASTG", "UTMAREDG", "USETMAXREG"),
    *("RED", "REDG", "ATOM", "ATOMG", "LDL", "STL"),
)
"""What is reported where it is there: wide accesses, tensor cores, TMA, atomics, and accesses of spilled registers."""

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
_BINARY = {"sm_80": "SM80", "sm_90": "SM90a"}  # nvdisasm's names; Triton compiles for sm_90 with a: HGMMA, UTMALDG
_JOBS_AT_A_TIME = 16  # nvdisasm takes longer to start than to disassemble a kernel: it is started once for so many
_POINTER_DIVISIBILITY = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Verdict:
    """What a case compiled to at a target; ``faults``, in words, is empty where all is well.

    ``spill_bytes``: of a thread, its stack. ``shared_bytes``: of a block. ``instructions``: those of :data:`COUNTED`
    that are there. ``cpu_seconds``: user time of compiler and assembler.
    """

    operation: str
    case: str
    target: str
    faults: tuple[str, ...] = ()
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    warps: int = 0
    instructions: Mapping[str, int] | None = None
    cpu_seconds: float = 0.0


class Job(NamedTuple):
    """A case to be compiled for one of its targets; ``operation``: the file it comes from."""

    operation: str
    case: CompileCase
    target: str


class Compiled(NamedTuple):
    """What a process says of its job: a verdict still without instructions, and the machine code, empty of none."""

    verdict: Verdict
    code: bytes = b""


def require_compiler(jobs: Sequence[Job]) -> None:
    """InputError, with the mend, where kernels cannot be compiled in this process."""
    if not HAS_TRITON:
        raise InputError("--check compiles Triton kernels, and Triton is not installed: pip install 'megalrps[gpu]'")
    # Not done again in a process without the variable: whoever set it meant the interpreter, and a figure printed from
    # another environment than the one that was asked about is a surprise.
    if any(not isinstance(job.case.kernel, triton.runtime.JITFunction) for job in jobs):
        raise InputError("--check compiles kernels, but TRITON_INTERPRET hands them to an interpreter: unset it")
    try:
        _ = triton.knobs.nvidia.cuobjdump.path, triton.knobs.nvidia.nvdisasm.path
    except RuntimeError as error:
        raise InputError(f"--check needs cuobjdump and nvdisasm, which Triton's wheels carry: {error}") from error


def verdicts(jobs: Sequence[Job], workers: int = 2, cache: Path | None = None) -> Iterator[Verdict]:
    """The verdict on each job, in their order; some at a time.

    ``workers`` cases are compiled at a time. ``cache``: Triton's cache of compiled kernels [None: a temporary one].
    InputError where nothing can be compiled.
    """
    require_compiler(jobs)
    with tempfile.TemporaryDirectory(prefix="megalrps-kernels-") as scratch, triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(cache or Path(scratch) / "cache")
        _compile(WARM_UP, "sm_80")  # what the compiler loads at its first use is then there in every process
        for start in range(0, len(jobs), _JOBS_AT_A_TIME):
            part = jobs[start : start + _JOBS_AT_A_TIME]
            results = dict(_as_completed(part, workers, Path(scratch)))
            yield from _judged(part, [results[index] for index in range(len(part))], Path(scratch) / "code")


def faults_of(case: CompileCase, verdict: Verdict, instructions: Mapping[str, int]) -> tuple[str, ...]:
    """What is wrong with the machine code of ``case`` that ``verdict`` describes."""
    faults = []
    if verdict.spill_bytes:
        faults.append(f"spills registers: {verdict.spill_bytes} bytes of a thread's stack")
    limit = SHARED_MEMORY_LIMIT[verdict.target]
    if verdict.shared_bytes > limit:
        faults.append(f"takes {verdict.shared_bytes:,} bytes of shared memory, a block has at most {limit:,}")
    faults += [f"lacks {name}" for name in case.required.get(verdict.target, ()) if not count(instructions, name)]
    return tuple(faults)


def count(instructions: Mapping[str, int], name: str) -> int:
    """How many instructions are called ``name``: of its parts between dots the first is theirs, the others follow.

    Other parts may stand between them: LDG.E.128 is also LDG.E.EF.128, a load whose line is evicted first.
    """
    first, *rest = name.split(".")

    def is_named(parts: Sequence[str]) -> bool:
        following = iter(parts[1:])
        return parts[0] == first and all(part in following for part in rest)

    return sum(number for found, number in instructions.items() if is_named(found.split(".")))


def _judged(jobs: Sequence[Job], results: Sequence[Compiled], scratch: Path) -> Iterator[Verdict]:
    """The verdicts with instructions and faults."""
    instructions: list[Counter[str]] = [Counter() for _ in results]
    for target in {job.target for job in jobs}:
        there = [index for index, result in enumerate(results) if result.code and jobs[index].target == target]
        if there:
            counted = instructions_of([results[index].code for index in there], target, scratch)
            for index, counter in zip(there, counted, strict=True):
                instructions[index] = counter
    for job, result, counter in zip(jobs, results, instructions, strict=True):
        if result.verdict.faults:
            yield result.verdict
        else:
            there_are = {name: number for name in COUNTED if (number := count(counter, name))}
            faults = faults_of(job.case, result.verdict, counter)
            yield replace(result.verdict, instructions=there_are, faults=faults)


def instructions_of(codes: Sequence[bytes], target: str, scratch: Path) -> list[Counter[str]]:
    """How many there are of each instruction in each of ``codes``, code of ``target``; ``scratch``: a file to write."""
    scratch.write_bytes(b"".join(codes))
    listing = _output(triton.knobs.nvidia.nvdisasm.path, "--binary", _BINARY[target], str(scratch))
    ends = list(itertools.accumulate(map(len, codes)))
    counted: list[Counter[str]] = [Counter() for _ in codes]
    for address, name in _INSTRUCTION.findall(listing):
        counted[bisect.bisect_right(ends, int(address, 16))][name] += 1
    assert all(counted), "nvdisasm prints in another form"
    return counted


def _as_completed(jobs: Sequence[Job], workers: int, scratch: Path) -> Iterator[tuple[int, Compiled]]:
    """Run every job in a process forked for it; each result with its job's index."""
    context = multiprocessing.get_context("fork")  # a fresh interpreter would import torch and Triton for every case
    waiting = list(enumerate(jobs))[::-1]
    running: dict[Connection, tuple[int, BaseProcess]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                index, job = waiting.pop()
                receiving, sending = context.Pipe(duplex=False)
                process: BaseProcess = context.Process(target=_answer, args=(sending, job, scratch / f"{index}.log"))
                process.start()
                sending.close()
                running[receiving] = index, process
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                index, process = running.pop(ready)
                yield index, _received(ready, process, jobs[index], scratch / f"{index}.log")
    finally:
        for _, process in running.values():
            process.kill()
            process.join()


def _received(connection: Connection, process: BaseProcess, job: Job, log: Path) -> Compiled:
    try:
        result: Compiled = connection.recv()
    except EOFError:
        process.join()
        status = process.exitcode or 0
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        fault = f"the compiler died of {how}: {_last_line(log.read_text(errors='replace'))}"
        result = Compiled(Verdict(job.operation, job.case.name, job.target, (fault,)))
    connection.close()
    process.join()
    return result


def _answer(connection: Connection, job: Job, log: Path) -> None:
    """In the process of one job: what the compiler prints goes to ``log``, the result to ``connection``."""
    with log.open("w") as file:
        for descriptor in (1, 2):  # not those of sys.stdout: the compiler is no Python, and does not know it
            os.dup2(file.fileno(), descriptor)
    connection.send(examine(job))


def examine(job: Job) -> Compiled:
    """Compile ``job`` here and now."""
    start = os.times()
    code = b""
    verdict = Verdict(job.operation, job.case.name, job.target)
    try:
        compiled = _compile(job.case, job.target)
        registers, spill_bytes = _resources(compiled.asm["cubin"])
        code = machine_code(compiled.asm["cubin"])
    except Exception as error:  # whatever the compiler raises is the verdict
        verdict = replace(verdict, faults=(f"does not compile: {type(error).__name__}: {_last_line(str(error))}",))
    else:
        metadata = compiled.metadata
        figures = {"shared_bytes": metadata.shared, "warps": metadata.num_warps}
        verdict = replace(verdict, registers=registers, spill_bytes=spill_bytes, **figures)
    end = os.times()
    seconds = end.user - start.user + end.children_user - start.children_user
    return Compiled(replace(verdict, cpu_seconds=round(seconds, 2)), code)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _compile(case: CompileCase, target: str) -> Any:
    """Triton's compiled kernel; ValueError where the case does not name exactly the kernel's arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    both = [*case.arguments, *case.constants]
    if sorted(both) != sorted(names):
        raise ValueError(f"the case says {', '.join(sorted(both))}; the kernel takes {', '.join(sorted(names))}")
    if unknown := set(case.divisible) - set(case.arguments):
        raise ValueError(f"divisible, but no argument: {', '.join(sorted(unknown))}")
    divisible = {*case.divisible, *(name for name, kind in case.arguments.items() if kind.startswith("*"))}
    source = ASTSource(
        fn=case.kernel,
        signature={name: case.arguments.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={(names.index(name),): _POINTER_DIVISIBILITY for name in divisible},
    )
    return triton.compile(
        source,
        target=GPUTarget("cuda", int(target.removeprefix("sm_")), 32),
        options={name: getattr(case, name) for name in ("num_warps", "num_stages", "enable_fp_fusion")},
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
    functions = [tuple(map(int, found)) for found in _RESOURCES.findall(usage)]
    assert functions, "cuobjdump prints in another form"
    registers, stack, local = (max(column) for column in zip(*functions, strict=True))
    return registers, stack + local


def machine_code(cubin: bytes) -> bytes:
    """The sections of ``cubin``, an ELF file of 64 bits, whose names begin with .text: its functions' instructions."""
    table, entries, names = (*struct.unpack_from("<Q", cubin, 0x28), *struct.unpack_from("<HH", cubin, 0x3C))
    sections = [struct.unpack_from("<I20xQQ", cubin, table + 64 * entry) for entry in range(entries)]
    strings = sections[names][1]
    return b"".join(
        cubin[offset : offset + size]
        for name, offset, size in sections
        if cubin[strings + name :].startswith(b".text.")
    )


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
