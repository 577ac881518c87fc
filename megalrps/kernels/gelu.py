"""The Gaussian error linear unit (Hendrycks and Gimpel 2016, arXiv 1606.08415), exact or by the paper's approximation.

Between the passes only the input is kept. Bytes for n elements of e bytes: 2 e n forwards, 3 e n backwards.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalrps.kernels.compile_case import VECTOR_LOAD, VECTOR_STORE, CompileCase, required_everywhere
from megalrps.kernels.language import tl, triton

_BLOCK = 2048
_ROOT_HALF = tl.constexpr(0.7071067811865476)  # sqrt(1/2)
_DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi), the normal density at 0
_TWICE_ROOT = tl.constexpr(1.5957691216057308)  # 2 sqrt(2/pi)
_CUBIC = tl.constexpr(0.044715)


def gelu(x: Tensor, approximate: bool = False) -> Tensor:
    """``x * Phi(x)``, element by element, Phi the normal distribution's function; the result has the shape of ``x``.

    ``approximate``: ``x / 2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))`` instead, as GPT-2 was trained with. On a
    CUDA device each element is computed in fp32 and rounded once.
    """
    output: Tensor = _forward(x, approximate)
    return output


def gelu_reference(x: Tensor, approximate: bool = False) -> Tensor:
    """:func:`gelu` by torch's operation, differentiable: the CPU's, and what the tests compare with."""
    return F.gelu(x, approximate=_approximation(approximate))


def gelu_backward_reference(gradient: Tensor, x: Tensor, approximate: bool = False) -> Tensor:
    """The gradient of ``x``: of the exact form ``Phi(x) + x phi(x)``, phi the normal density, times ``gradient``."""
    of_x: Tensor = torch.ops.aten.gelu_backward(gradient, x, approximate=_approximation(approximate))
    return of_x


def _approximation(approximate: bool) -> str:
    return "tanh" if approximate else "none"


def gelu_triton(x: Tensor, approximate: bool = False) -> Tensor:
    """:func:`gelu` by the Triton kernel."""
    x = x.contiguous()
    output = torch.empty_like(x)
    elements = x.numel()
    _gelu_kernel[(triton.cdiv(elements, _BLOCK),)](
        x, output, elements, APPROXIMATE=approximate, BLOCK=_BLOCK, num_warps=8
    )
    return output


def gelu_backward_triton(gradient: Tensor, x: Tensor, approximate: bool = False) -> Tensor:
    """:func:`gelu_backward_reference` by the Triton kernel."""
    gradient, x = gradient.contiguous(), x.contiguous()
    of_x = torch.empty_like(x)
    elements = x.numel()
    _gelu_backward_kernel[(triton.cdiv(elements, _BLOCK),)](
        gradient, x, of_x, elements, APPROXIMATE=approximate, BLOCK=_BLOCK, num_warps=8
    )
    return of_x


@triton.jit
def _portion(x, APPROXIMATE: tl.constexpr):
    # (1 + tanh(u)) / 2 is the sigmoid of 2 u, and Triton's language has no tanh.
    return tl.sigmoid(x * _TWICE_ROOT * (1 + x * x * _CUBIC)) if APPROXIMATE else 0.5 * (1 + tl.erf(x * _ROOT_HALF))


@triton.jit
def _gelu_kernel(x_pointer, output_pointer, elements, APPROXIMATE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    x = tl.load(x_pointer + at, mask=inside).to(tl.float32)
    tl.store(output_pointer + at, (x * _portion(x, APPROXIMATE)).to(output_pointer.dtype.element_ty), mask=inside)


@triton.jit
def _gelu_backward_kernel(
    gradient_pointer, x_pointer, of_x_pointer, elements, APPROXIMATE: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    gradient = tl.load(gradient_pointer + at, mask=inside).to(tl.float32)
    x = tl.load(x_pointer + at, mask=inside).to(tl.float32)
    portion = _portion(x, APPROXIMATE)
    if APPROXIMATE:
        slope = portion * (1 - portion) * _TWICE_ROOT * (1 + 3 * (x * x * _CUBIC))
    else:
        slope = tl.exp(-0.5 * x * x) * _DENSITY
    tl.store(of_x_pointer + at, (gradient * (portion + x * slope)).to(of_x_pointer.dtype.element_ty), mask=inside)


# Registration: one operation forwards, one backwards, as for swiglu.


@torch.library.custom_op("megalrps::gelu", mutates_args=(), device_types="cpu")
def _forward(x: Tensor, approximate: bool) -> Tensor:
    return gelu_reference(x.contiguous(), approximate)


@torch.library.custom_op("megalrps::gelu_backward", mutates_args=(), device_types="cpu")
def _backward(gradient: Tensor, x: Tensor, approximate: bool) -> Tensor:
    return gelu_backward_reference(gradient.contiguous(), x.contiguous(), approximate)


_forward.register_kernel("cuda")(gelu_triton)
_backward.register_kernel("cuda")(gelu_backward_triton)


@_forward.register_fake
def _(x: Tensor, approximate: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(gradient: Tensor, x: Tensor, approximate: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
    x, ctx.approximate = inputs
    ctx.save_for_backward(x)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return _backward(gradient, *ctx.saved_tensors, ctx.approximate), None


_forward.register_autograd(_gradients, setup_context=_keep)


def compile_cases() -> list[CompileCase]:
    """What ``python -m megalrps.kernels --check`` compiles of this file."""
    pointers = {_gelu_kernel: ("x", "output"), _gelu_backward_kernel: ("gradient", "x", "of_x")}
    return [
        CompileCase(
            name=f"{name}, {'tanh' if approximate else 'exact'}, {kind}",
            kernel=kernel,
            arguments={f"{each}_pointer": f"*{kind}" for each in pointers[kernel]} | {"elements": "i32"},
            constants={"APPROXIMATE": approximate, "BLOCK": _BLOCK},
            num_warps=8,
            divisible=("elements",),
            required=required_everywhere(VECTOR_LOAD, VECTOR_STORE),
        )
        for name, kernel in (("gelu", _gelu_kernel), ("gelu backward", _gelu_backward_kernel))
        for approximate, kind in ((False, "bf16"), (True, "bf16"), (False, "fp32"))
    ]
