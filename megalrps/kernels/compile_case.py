"""One configuration of a Triton kernel, as data: what ``python -m megalrps.kernels --check`` compiles ahead of time."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TARGETS = ("sm_80", "sm_90")
"""Compute capabilities that the kernels are shipped for: A100 and H100/H200."""

# What must be there in the machine code (SASS) of a kernel that does its work as it was written to.
VECTOR_LOAD, VECTOR_STORE = "LDG.E.128", "STG.E.128"
TENSOR_CORE: Mapping[str, str] = {"sm_80": "HMMA", "sm_90": "HGMMA"}
TMA_LOAD = "UTMALDG"


@dataclass(frozen=True)
class CompileCase:
    """A kernel with the types, constants and options of one launch that the package makes.

    Every argument of the kernel is in ``arguments`` (its Triton type: "*bf16", "i32", "fp32", ...) or in ``constants``
    (constexpr values; an optional pointer that is None is a constant too). Pointers are taken to be divisible by 16, as
    torch's allocations are, and so are the integers named in ``divisible``.

    ``required``: per target, instructions of which at least one each must be there, by the first parts of their SASS
    names: LDG.E.128 is LDG.E.EF.128.CONSTANT too (see :func:`megalrps.kernels.ahead_of_time.count`).
    ``targets``: where this configuration is launched.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    enable_fp_fusion: bool = True
    """Whether a product and a sum may become one operation, rounded once."""
    divisible: tuple[str, ...] = ()
    required: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    targets: tuple[str, ...] = TARGETS


def required_everywhere(*instructions: str) -> dict[str, tuple[str, ...]]:
    """``instructions`` at every target."""
    return dict.fromkeys(TARGETS, instructions)
