"""The sum of squares of a flat tensor, which global gradient norms are made of: 4 bytes read an fp32 element.

A CUDA device makes it in two launches. The first leaves partial sums in fp32, as many as the length alone tells; the
second adds these up in fp64. Nothing is added in an order that depends on which program comes first: the same numbers
give the same bits.
"""

import torch
from torch import Tensor

from megalrps.kernels.compile_case import VECTOR_LOAD, CompileCase, required_everywhere
from megalrps.kernels.language import HAS_TRITON, tl, triton
from megalrps.kernels.native import cpu_missing, sum_of_squares_native

_BLOCK = 4096
_WARPS = 8
_MOST_PARTIALS = 1024  # about eight programs on each multiprocessor of the largest GPUs, and one block to add up


def sum_of_squares(x: Tensor) -> Tensor:
    """The sum of the squares of all elements, a scalar tensor on the device of ``x``: fp64 of fp64, else fp32.

    ``x`` is contiguous, of any shape, and of fp64, fp32, bf16 or fp16; the sum of no elements is 0. Where an element is
    no number, or a square or the sum is beyond the type's range, neither is the result one.

    On a CPU by the C++ code (csrc/norm.cpp) where it was built, else by torch; on a GPU by the Triton kernels, fp64 by
    torch. ValueError for other tensors.
    """
    if not x.is_floating_point() or not x.is_contiguous():
        raise ValueError(
            f"a sum of squares is taken of contiguous floating-point numbers, not of {x.dtype} as they lie"
        )
    return _sum_of_squares(x)


def chosen_norm(device_type: str) -> tuple[str, str]:
    """(name, why) of what adds squares of fp32 up on ``device_type``: for people and their logs."""
    if device_type == "cpu":
        missing = cpu_missing()
        return ("native", "one order of additions (csrc/norm.cpp)") if missing is None else ("reference", missing)
    if device_type != "cuda":
        return "reference", f"there is no kernel for {device_type}"
    if not HAS_TRITON:
        return "reference", "Triton is not installed: pip install 'megalrps[gpu]'"
    return "triton", "two launches, one order of additions"


def sum_of_squares_reference(x: Tensor) -> Tensor:
    """:func:`sum_of_squares` in torch operations."""
    return torch.linalg.vector_norm(x, dtype=_type_of_sum(x)).square()


def sum_of_squares_triton(x: Tensor) -> Tensor:
    """:func:`sum_of_squares` by the Triton kernels; of fp64 the squares are those of its numbers rounded to fp32."""
    elements = x.numel()
    if not elements:
        return torch.zeros((), dtype=torch.float32, device=x.device)
    blocks = triton.cdiv(elements, _BLOCK)
    count = min(blocks, _MOST_PARTIALS)
    partials = torch.empty(count, dtype=torch.float32, device=x.device)
    total = torch.empty((), dtype=torch.float32, device=x.device)
    _partial_sums_kernel[(count,)](x, partials, elements, triton.cdiv(blocks, count), BLOCK=_BLOCK, num_warps=_WARPS)
    _total_kernel[(1,)](partials, total, count, BLOCK=_MOST_PARTIALS, num_warps=4)
    return total


@triton.jit
def _partial_sums_kernel(x_pointer, partials_pointer, elements, rounds, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for _ in range(rounds):
        x = tl.load(x_pointer + at, mask=at < elements, other=0.0).to(tl.float32)
        sums += x * x
        at += stride
    tl.store(partials_pointer + tl.program_id(0), tl.sum(sums, axis=0))


@triton.jit
def _total_kernel(partials_pointer, total_pointer, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    partials = tl.load(partials_pointer + at, mask=at < count, other=0.0).to(tl.float64)
    tl.store(total_pointer, tl.sum(partials, axis=0).to(tl.float32))


def _type_of_sum(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@torch.library.custom_op("megalrps::sum_of_squares", mutates_args=(), device_types="cpu")
def _sum_of_squares(x: Tensor) -> Tensor:
    if cpu_missing() is not None or x.dtype == torch.float16:
        return sum_of_squares_reference(x)
    return sum_of_squares_native(x.view(-1)).to(_type_of_sum(x))


@_sum_of_squares.register_kernel("cuda")
def _sum_on_gpu(x: Tensor) -> Tensor:
    return sum_of_squares_triton(x) if HAS_TRITON and x.dtype != torch.float64 else sum_of_squares_reference(x)


@_sum_of_squares.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=_type_of_sum(x))


def compile_cases() -> list[CompileCase]:
    """What ``python -m megalrps.kernels --check`` compiles of this file: gradients are fp32."""
    return [
        CompileCase(
            name="sum of squares, partial sums",
            kernel=_partial_sums_kernel,
            arguments={"x_pointer": "*fp32", "partials_pointer": "*fp32", "elements": "i64", "rounds": "i32"},
            constants={"BLOCK": _BLOCK},
            num_warps=_WARPS,
            divisible=("elements",),
            required=required_everywhere(VECTOR_LOAD),
        ),
        CompileCase(
            name="sum of squares, total",
            kernel=_total_kernel,
            arguments={"partials_pointer": "*fp32", "total_pointer": "*fp32", "count": "i32"},
            constants={"BLOCK": _MOST_PARTIALS},
        ),
    ]
