"""The check of compiled kernels finds the faults it is there for, whatever the compiler does."""

import os
import signal
from collections import Counter
from types import SimpleNamespace

import pytest
from oracle import needs_triton

from megalrps.errors import InputError
from megalrps.kernels import ahead_of_time
from megalrps.kernels.ahead_of_time import SHARED_MEMORY_LIMIT, Job, Verdict, count, examine, faults_of, verdicts
from megalrps.kernels.check_cases import WARM_UP, must_be_flagged
from megalrps.kernels.compile_case import TARGETS, TENSOR_CORE, CompileCase

CASE = CompileCase("a case", kernel=None, arguments={}, constants={}, required={"sm_90": ("LDG.E.128", "HGMMA")})
INSTRUCTIONS = {"LDG.E.EF.128.CONSTANT": 2, "HGMMA.64x128x16.F32.BF16": 4}


def verdict_of(**figures) -> Verdict:
    return Verdict("operation", CASE.name, **{"target": "sm_90", **figures})


def test_a_sound_kernel_has_no_fault():
    assert faults_of(CASE, verdict_of(shared_bytes=SHARED_MEMORY_LIMIT["sm_90"]), INSTRUCTIONS) == ()


@pytest.mark.parametrize("target", TARGETS)
def test_each_fault_is_said_in_words(target):
    limit = SHARED_MEMORY_LIMIT[target]
    case = CompileCase("", None, {}, {}, required={target: ("UTMALDG", TENSOR_CORE[target])})
    assert faults_of(case, verdict_of(target=target, spill_bytes=8, shared_bytes=limit + 1), {"LDG": 1}) == (
        "spills registers: 8 bytes of a thread's stack",
        f"takes {limit + 1:,} bytes of shared memory, a block has at most {limit:,}",
        "lacks UTMALDG",
        f"lacks {TENSOR_CORE[target]}",
    )


def test_what_another_target_requires_is_not_asked_for():
    assert faults_of(CASE, verdict_of(target="sm_80"), {}) == ()


@pytest.mark.parametrize(
    ("name", "found", "expected"),
    [
        ("LDG.E.128", "LDG.E.128", True),
        ("LDG.E.128", "LDG.E.EF.128.CONSTANT", True),
        ("LDG.E.128", "LDG.E.64", False),
        ("LDG.E.128", "LDG.128.E", False),
        ("LDG.E.128", "LDGSTS.E.BYPASS.128", False),
        ("HMMA", "HGMMA.64x128x16.F32", False),
        ("RED", "REDUX.SUM.S32", False),  # within a warp: no access of memory
    ],
)
def test_instructions_are_known_by_their_parts(name, found, expected):
    assert count({found: 3, "EXIT": 1}, name) == (3 if expected else 0)


LISTING = """
        /*0000*/                   HFMA2.MMA R16, -RZ, RZ, 1.625, 0 ;     /* 0x00000a00ff017b82 */
                                                                          /* 0x000e220000000800 */
        /*0010*/              @!P0 LDG.E.128 R8, desc[UR4][R12.64] ;
        /*0020*/              @UP1 UTMALDG.2D [UR8], [UR4] ;
.L_x_0:
        /*0030*/                   BRA `(.L_x_0);
"""


@needs_triton
def test_instructions_are_read_with_and_without_predicates_and_told_apart_by_kernel(monkeypatch, tmp_path):
    monkeypatch.setattr(ahead_of_time, "_output", lambda *command: LISTING)
    first, second = ahead_of_time.instructions_of([bytes(32), bytes(32)], "sm_90", tmp_path / "code")
    assert first == Counter(["HFMA2.MMA", "LDG.E.128"])
    assert second == Counter(["UTMALDG.2D", "BRA"])
    assert (tmp_path / "code").stat().st_size == 64


def compiler_that_fails(case: CompileCase, target: str) -> SimpleNamespace:
    if case.name == "dies":
        os.write(2, b"loading\nAssertion `dominates' failed.\n")
        os.kill(os.getpid(), signal.SIGKILL)
    if case.name == "raises":
        raise RuntimeError("at 3:4:\n    x = y\nundefined y\n")
    return SimpleNamespace(asm={"cubin": b""}, metadata=SimpleNamespace(shared=1, num_warps=4))


@needs_triton
def test_a_compiler_that_dies_or_raises_is_a_verdict_on_one_case(monkeypatch):
    monkeypatch.setattr(ahead_of_time, "require_compiler", lambda jobs: None)
    monkeypatch.setattr(ahead_of_time, "_compile", compiler_that_fails)
    monkeypatch.setattr(ahead_of_time, "_resources", lambda cubin: (7, 0))
    monkeypatch.setattr(ahead_of_time, "machine_code", lambda cubin: b"code")
    monkeypatch.setattr(ahead_of_time, "instructions_of", lambda codes, *_: [Counter({"STL.64": 1}) for _ in codes])
    names = ["dies", "sound", "raises", "sound", "dies"]
    monkeypatch.setattr(ahead_of_time, "_JOBS_AT_A_TIME", 3)
    found = list(verdicts([Job("x", CompileCase(name, None, {}, {}), "sm_80") for name in names], workers=2))
    assert [verdict.case for verdict in found] == names
    died = ("the compiler died of SIGKILL: Assertion `dominates' failed.",)
    assert [verdict.faults for verdict in found] == [
        died, (), ("does not compile: RuntimeError: undefined y",), (), died,
    ]  # fmt: skip
    assert (found[1].registers, found[1].shared_bytes, found[1].instructions) == (7, 1, {"STL": 1})


@needs_triton
@pytest.mark.parametrize("wrong", [{"constants": {"stride": 1}}, {"divisible": ("stride",)}])
def test_a_case_that_does_not_name_the_kernels_arguments_is_at_fault(wrong):
    case = CompileCase(**{**vars(WARM_UP), **wrong})
    (fault,) = examine(Job("x", case, "sm_80")).verdict.faults
    assert fault.startswith("does not compile: ValueError: ") and ("BLOCK" in fault or "stride" in fault)


@needs_triton
def test_interpreted_kernels_are_refused_not_compiled_in_another_environment():
    interpreted = CompileCase("", kernel=lambda: None, arguments={}, constants={})
    with pytest.raises(InputError, match="TRITON_INTERPRET hands them to an interpreter: unset it"):
        next(verdicts([Job("x", interpreted, "sm_80")]))


def test_the_faulty_kernels_each_have_another_fault():
    assert len({fault for _, fault in must_be_flagged()}) == 3
