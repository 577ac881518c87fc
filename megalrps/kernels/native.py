"""The compiled twins (csrc/) of AdamW and of the sum of squares: what was built, and launches of it over flat tensors.

The update on a CPU is :func:`megalrps.kernels.adamw.adamw_`; here are its CUDA twin, which writes the same bits, and
the sum of squares that a gradient's norm is made of, on a CPU and on a GPU, of the same bits again. None of these waits
for a GPU.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

try:
    import megalrps._native as _native
except ImportError as error:  # not built: see setup.py
    _native = None
    _CPU_MISSING: str | None = f"megalrps._native cannot be imported ({error}): python setup.py build_ext --inplace"
else:
    _CPU_MISSING = None

CUDA_ALIGNMENT = 16
"""Bytes: tensors on a GPU start at a multiple of it, as csrc/cuda.h says; a slice of a buffer may not."""

_SUMMED_ON_CPU = (torch.float32, torch.float64, torch.bfloat16)
_SUMMED_ON_CUDA = (torch.float32, torch.bfloat16)


def cpu_missing() -> str | None:
    """Why the compiled extension is not there; None where it is."""
    return _CPU_MISSING


def cuda_missing() -> str | None:
    """Why the CUDA launches of this module cannot be used here; None where they can.

    No extension, one built without nvcc, no driver, no device, or one that :func:`cuda_targets` does not serve. It asks
    the driver about the current device, and so loads it in this process, but takes no memory on a device.
    """
    if _native is None:
        return _CPU_MISSING
    if not hasattr(_native, "cuda_available"):
        return "megalrps._native was built from older sources: python setup.py build_ext --inplace"
    available, reason = _native.cuda_available()
    return None if available else str(reason)


def check_cuda() -> None:
    """Raise ValueError, with the reason, where the CUDA launches of this module cannot be used here."""
    missing = cuda_missing()
    if missing is not None:
        raise ValueError(f"the CUDA code of megalrps._native cannot be used here: {missing}")


def cuda_targets() -> tuple[str, ...]:
    """What the CUDA part was compiled for, as ``("sm_80", "sm_90a", "compute_80")``; empty where it was not built."""
    return tuple(_native.cuda_targets()) if hasattr(_native, "cuda_targets") else ()


@torch.no_grad()
def adamw_cuda_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    first_weight: float,
    second_decay: float,
    second_weight: float,
    epsilon: float,
    decay: float,
    update_size: float,
    gradient_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    narrow: Tensor | None = None,
) -> None:
    """Launch the update of :func:`megalrps.kernels.adamw.adamw_` by csrc/adamw.cu on the current stream.

    The scalars are those that function derives from its settings; csrc/adamw.h says how. All tensors are [n],
    contiguous, on one CUDA device, start at a multiple of 16 bytes and share no memory: ``param`` and ``grad`` fp32,
    each moment fp32 or bf16, ``narrow`` bf16 or fp16. ``gradient_scale`` and ``found_inf`` are fp32 of one element,
    read by the device: where ``found_inf`` is not zero, every tensor keeps its bits.

    Writes the bits of the CPU code (of a NaN only that it is one), wherever an element lies. ValueError for other
    tensors, RuntimeError where nothing can be launched (see :func:`cuda_missing`).
    """
    tensors = {"param": param, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    scalars = {"gradient_scale": gradient_scale, "found_inf": found_inf}
    if narrow is not None:
        tensors["narrow"] = narrow
    _check_update(tensors, {name: scalar for name, scalar in scalars.items() if scalar is not None})
    native = _required()
    with torch.cuda.device(param.device):
        native.adamw_cuda(
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
            **{name: 0 if scalar is None else scalar.data_ptr() for name, scalar in scalars.items()},
            elements=param.numel(),
            exp_avg_type=_name(exp_avg),
            exp_avg_sq_type=_name(exp_avg_sq),
            narrow_type="" if narrow is None else _name(narrow),
            first_weight=first_weight,
            second_decay=second_decay,
            second_weight=second_weight,
            epsilon=epsilon,
            decay=decay,
            update_size=update_size,
            stream=torch.cuda.current_stream().cuda_stream,
        )
    # Autograd learns, as from any in-place operation, that values it may have saved are gone.
    increment_version([tensor for name, tensor in tensors.items() if name != "grad"])


@torch.no_grad()
def sum_of_squares_native(x: Tensor) -> Tensor:
    """The sum of squares of ``x``, [n], contiguous, on a CPU, fp32, bf16 or fp64: a scalar, fp64.

    Added up in fp32 (fp64 in fp64) by pieces of 2^15 elements and in fp64 over these, in an order that n alone decides:
    the number of threads changes no bit, nor does it matter whether bf16 was widened before. Infinite where a piece's
    sum exceeds the type it is added up in, NaN where an element is. ValueError for other tensors, RuntimeError where
    the extension was not built.
    """
    _check_flat("x", x, _SUMMED_ON_CPU, "cpu")
    total = _required().sum_of_squares(
        values=x.data_ptr(), elements=x.numel(), type=_name(x), threads=torch.get_num_threads()
    )
    return torch.tensor(total, dtype=torch.float64)


@torch.no_grad()
def sum_of_squares_cuda(x: Tensor) -> Tensor:
    """The bits of :func:`sum_of_squares_native` for ``x`` on a CUDA device, fp32 or bf16: a scalar there, fp64.

    Two kernels on the current stream; ``x`` starts at a multiple of 16 bytes. ValueError for other tensors,
    RuntimeError where nothing can be launched (see :func:`cuda_missing`).
    """
    _check_flat("x", x, _SUMMED_ON_CUDA, "cuda")
    native = _required()
    with torch.cuda.device(x.device):
        partials = torch.empty(native.pieces_of(x.numel()), dtype=torch.float32, device=x.device)
        total = torch.empty((), dtype=torch.float64, device=x.device)
        native.sum_of_squares_cuda(
            values=x.data_ptr(),
            elements=x.numel(),
            type=_name(x),
            partials=partials.data_ptr(),
            result=total.data_ptr(),
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return total


def _required() -> Any:
    if _native is None:
        raise RuntimeError(_CPU_MISSING)
    return _native


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check_flat(name: str, tensor: Tensor, types: tuple[torch.dtype, ...], device: str) -> None:
    if tensor.dtype not in types or tensor.device.type != device:
        wanted = " or ".join(str(each).removeprefix("torch.") for each in types)
        raise ValueError(f"{name} must be {wanted} on {device}, not {_name(tensor)} on {tensor.device}")
    if tensor.dim() != 1 or not tensor.is_contiguous():
        raise ValueError(f"{name} must be flat and contiguous")
    if device == "cuda" and tensor.data_ptr() % CUDA_ALIGNMENT != 0:
        raise ValueError(f"{name} must start at a multiple of {CUDA_ALIGNMENT} bytes")


def _check_update(tensors: Mapping[str, Tensor], scalars: Mapping[str, Tensor]) -> None:
    moment = (torch.float32, torch.bfloat16)
    types = {"exp_avg": moment, "exp_avg_sq": moment, "narrow": (torch.bfloat16, torch.float16)}
    param = tensors["param"]
    for name, tensor in tensors.items():
        _check_flat(name, tensor, types.get(name, (torch.float32,)), "cuda")
        if tensor.shape != param.shape or tensor.device != param.device:
            raise ValueError(f"{name} must be as long as the parameters and on their device")
    for name, scalar in scalars.items():
        if scalar.dtype != torch.float32 or scalar.numel() != 1 or scalar.device != param.device:
            raise ValueError(f"{name} must be one float32, on the device of the parameters")
