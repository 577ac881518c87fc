"""The gated activation of LLaMA's feed-forward layer (Shazeer 2020, arXiv 2002.05202, equation 6, beta = 1).

Between the passes only ``gate`` and ``up`` are kept; the backward pass computes the sigmoid again. Bytes for n elements
of e bytes: 3 e n forwards (two read, one written), 5 e n backwards (three read, two written).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalrps.kernels.compile_case import VECTOR_LOAD, VECTOR_STORE, CompileCase, required_everywhere
from megalrps.kernels.language import tl, triton

_BLOCK = 2048


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``gate * sigmoid(gate) * up``, element by element; both [..., F] of one type.

    On a CUDA device each element is computed in fp32 and rounded once; on a CPU by :func:`swiglu_reference`.
    """
    output: Tensor = _forward(gate, up)
    return output


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The formula of :func:`swiglu` in torch operations, differentiable: the CPU's, and what the tests compare with."""
    return F.silu(gate).mul_(up)


def swiglu_backward_reference(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of ``gate`` and ``up``: d silu(g) / dg = sigmoid(g) (1 + g (1 - sigmoid(g))).

    With s = sigmoid(g) that is s + g s (1 - s): from g s to 1 by the part s. So one exponential serves both gradients.
    """
    wide_type = torch.promote_types(gate.dtype, torch.float32)
    wide_gradient, wide_gate, wide_up = (each.to(wide_type) for each in (gradient, gate, up))
    slope = torch.sigmoid(wide_gate)
    activated = wide_gate * slope
    torch.lerp(activated, slope.new_ones(()), slope, out=slope)
    of_gate, of_up = slope.mul_(wide_gradient).mul_(wide_up), activated.mul_(wide_gradient)
    return of_gate.to(gate.dtype), of_up.to(up.dtype)


def swiglu_triton(gate: Tensor, up: Tensor) -> Tensor:
    """:func:`swiglu` by the Triton kernel; tensors as it takes them."""
    gate, up = gate.contiguous(), up.contiguous()
    output = torch.empty_like(gate)
    elements = gate.numel()
    _swiglu_kernel[(triton.cdiv(elements, _BLOCK),)](gate, up, output, elements, BLOCK=_BLOCK, num_warps=8)
    return output


def swiglu_backward_triton(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`swiglu_backward_reference` by the Triton kernel."""
    gradient, gate, up = gradient.contiguous(), gate.contiguous(), up.contiguous()
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    elements = gate.numel()
    _swiglu_backward_kernel[(triton.cdiv(elements, _BLOCK),)](
        gradient, gate, up, of_gate, of_up, elements, BLOCK=_BLOCK, num_warps=8
    )
    return of_gate, of_up


@triton.jit
def _swiglu_kernel(gate_pointer, up_pointer, output_pointer, elements, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    gate = tl.load(gate_pointer + at, mask=inside).to(tl.float32)
    up = tl.load(up_pointer + at, mask=inside).to(tl.float32)
    tl.store(output_pointer + at, (gate * tl.sigmoid(gate) * up).to(output_pointer.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward_kernel(
    gradient_pointer,
    gate_pointer,
    up_pointer,
    of_gate_pointer,
    of_up_pointer,
    elements,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    gradient = tl.load(gradient_pointer + at, mask=inside).to(tl.float32)
    gate = tl.load(gate_pointer + at, mask=inside).to(tl.float32)
    up = tl.load(up_pointer + at, mask=inside).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    of_gate = gradient * up * sigmoid * (1 + gate * (1 - sigmoid))
    of_up = gradient * gate * sigmoid
    tl.store(of_gate_pointer + at, of_gate.to(of_gate_pointer.dtype.element_ty), mask=inside)
    tl.store(of_up_pointer + at, of_up.to(of_up_pointer.dtype.element_ty), mask=inside)


# Registration: one operation forwards, one backwards, so that torch.compile, fake tensors and recomputation see both.


@torch.library.custom_op("megalrps::swiglu", mutates_args=(), device_types="cpu")
def _forward(gate: Tensor, up: Tensor) -> Tensor:
    return swiglu_reference(gate.contiguous(), up.contiguous())


@torch.library.custom_op("megalrps::swiglu_backward", mutates_args=(), device_types="cpu")
def _backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return swiglu_backward_reference(gradient.contiguous(), gate.contiguous(), up.contiguous())


_forward.register_kernel("cuda")(swiglu_triton)
_backward.register_kernel("cuda")(swiglu_backward_triton)


@_forward.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(gate, memory_format=torch.contiguous_format),
        torch.empty_like(up, memory_format=torch.contiguous_format),
    )


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    return _backward(gradient, *ctx.saved_tensors)


_forward.register_autograd(_gradients, setup_context=_keep)


def compile_cases() -> list[CompileCase]:
    """What ``python -m megalrps.kernels --check`` compiles of this file."""
    pointers = {
        _swiglu_kernel: ("gate", "up", "output"),
        _swiglu_backward_kernel: ("gradient", "gate", "up", "of_gate", "of_up"),
    }
    return [
        CompileCase(
            name=f"{name}, {kind}",
            kernel=kernel,
            arguments={f"{each}_pointer": f"*{kind}" for each in pointers[kernel]} | {"elements": "i32"},
            constants={"BLOCK": _BLOCK},
            num_warps=8,
            divisible=("elements",),
            required=required_everywhere(VECTOR_LOAD, VECTOR_STORE),
        )
        for name, kernel in (("swiglu", _swiglu_kernel), ("swiglu backward", _swiglu_backward_kernel))
        for kind in ("bf16", "fp32")
    ]
