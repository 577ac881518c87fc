"""Kernels that a check must find fault with: what ``python -m megalrps.kernels --self-test`` compiles.

A check that finds no fault in them would find none anywhere.
"""

from typing import NamedTuple

from megalrps.kernels.compile_case import VECTOR_LOAD, CompileCase, required_everywhere
from megalrps.kernels.language import tl, triton


@triton.jit
def _scale_kernel(values_pointer, sum_pointer, stride, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK) * stride
    values = tl.load(values_pointer + at)
    tl.store(values_pointer + at, values / tl.sum(values, 0) + tl.load(sum_pointer))


@triton.jit
def _product_kernel(
    left_pointer, right_pointer, product_pointer, inner, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr
):
    rows, columns, depth = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, inner, DEPTH):
        left = tl.load(left_pointer + rows[:, None] * inner + start + depth[None, :])
        right = tl.load(right_pointer + (start + depth)[:, None] * COLUMNS + columns[None, :])
        total = tl.dot(left, right, total)
    tl.store(product_pointer + rows[:, None] * COLUMNS + columns[None, :], total)


class MustBeFlagged(NamedTuple):
    """A case, and how its one fault begins in words."""

    case: CompileCase
    fault: str


def _scale_case(name: str, stride: int, block: int, num_warps: int) -> CompileCase:
    return CompileCase(
        name=name,
        kernel=_scale_kernel,
        arguments={"values_pointer": "*fp32", "sum_pointer": "*fp32"},
        constants={"stride": stride, "BLOCK": block},
        num_warps=num_warps,
        required=required_everywhere(VECTOR_LOAD) if stride > 1 else {},
    )


WARM_UP = _scale_case("a row of 256", stride=1, block=256, num_warps=1)
"""A case without fault."""


def must_be_flagged() -> list[MustBeFlagged]:
    """A kernel that spills, one that takes too much shared memory, one without an instruction that it must have."""
    return [
        # Each of 32 threads keeps 256 numbers over the sum, and has at most 255 registers.
        MustBeFlagged(_scale_case("spilling", stride=1, block=8192, num_warps=1), "spills registers"),
        # Two tiles of 128 x 64 in bf16 a stage, 32,768 bytes: of seven stages at sm_80, of eight at sm_90.
        MustBeFlagged(
            CompileCase(
                name="oversized",
                kernel=_product_kernel,
                arguments=dict.fromkeys(("left_pointer", "right_pointer"), "*bf16")
                | {"product_pointer": "*fp32", "inner": "i32"},
                constants={"ROWS": 128, "COLUMNS": 128, "DEPTH": 64},
                num_warps=8,
                num_stages=8,
                divisible=("inner",),
            ),
            "takes",
        ),
        # Every third number: no two are neighbours.
        MustBeFlagged(_scale_case("scattered", stride=3, block=1024, num_warps=4), "lacks LDG.E.128"),
    ]
