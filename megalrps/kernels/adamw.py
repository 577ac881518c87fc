"""AdamW with decoupled weight decay (Loshchilov and Hutter 2017, arXiv 1711.05101, algorithm 2), over flat tensors.

On a CUDA device the Triton kernel makes one pass over memory in one launch: with fp32 moments it reads 16 bytes an
element (p, g, m, v) and writes 12 (p, m, v), and 2 for the narrow copy.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalrps.kernels.adamw_backends import (
    Operands,
    Settings,
    check_optimizer_backend,
    chosen_optimizer_backend,
    update_apex,
    update_fused,
)
from megalrps.kernels.compile_case import VECTOR_LOAD, VECTOR_STORE, CompileCase, required_everywhere
from megalrps.kernels.language import tl, triton
from megalrps.kernels.native import adamw_cuda_
from megalrps.kernels.options import OptimizerBackend

try:
    from megalrps._native import adamw as _native_adamw
except ImportError:  # not built: see setup.py
    _native_adamw = None

IMPLEMENTATION = "torch" if _native_adamw is None else "native"
"""What updates tensors on a CPU unless asked otherwise: ``native`` (csrc/adamw.cpp) where it was built, else ``torch``,
the formula in torch operations."""

_CPU_BLOCK_ELEMENTS = 1 << 17  # five blocks of 512 KB stay in cache over the passes of an update
_DEVICE_BLOCK_ELEMENTS = 1 << 25  # bounds the scratch; launches are rare beside the work of so many elements
_TRITON_BLOCK = 2048
_TRITON_WARPS = 8
_WIDE = (torch.float32, torch.float64)
_NARROW = (torch.bfloat16, torch.float16)


class _Factors(NamedTuple):
    """The scalars of one update, derived once for both implementations; csrc/adamw.h names them the same.

    The bias corrections are moved out of the loop (Kingma and Ba 2014, arXiv 1412.6980, end of section 2), and epsilon
    with them: m^ / (sqrt(v^) + epsilon) = m / (sqrt(v) + epsilon r) * r / (1 - beta1^step), r = sqrt(1 - beta2^step).
    """

    first_weight: float
    second_decay: float
    second_weight: float
    epsilon: float
    decay: float
    update_size: float


@torch.no_grad()
def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    step: int,
    gradient_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    narrow: Tensor | None = None,
    backend: OptimizerBackend = "auto",
) -> None:
    """Update ``param``, ``exp_avg`` and ``exp_avg_sq`` in place; ``grad`` is only read.

    ``step`` counts updates from 1 and corrects the bias of the moments; g is ``gradient_scale * grad``::

        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        p <- (1 - learning_rate weight_decay) p - learning_rate m^ / (sqrt(v^) + epsilon)

    with m^ = m / (1 - beta1^step) and v^ = v / (1 - beta2^step).

    All tensors are [n], contiguous, on one device and share no memory. ``param`` and ``grad`` are both fp32 or both
    fp64; all is computed in that type. Each moment has it too or is bf16: then it is widened, used unrounded, and
    rounded to nearest even where it is kept. (bf16 keeps 8 bits: a second moment with 1 - beta2 < 2^-9 rises, but no
    longer falls.) ``narrow``, bf16 or fp16, receives the new parameters rounded through fp32.

    ``gradient_scale``, the clip coefficient, has one element; so has ``found_inf``, fp32: where it is not 0 every
    tensor keeps its bits. On a GPU both are read there, and the host does not wait for them.

    ``backend`` "auto": on a CPU the native code, in one pass over memory with torch's number of threads, or the torch
    form of :func:`adamw_reference_` where that was not built; on a GPU the Triton kernel, or the torch form for fp64.
    With "auto" on a CPU an element's result does not depend on its place: shards of a buffer and the whole give the
    same bits. Others: "triton", "cuda" (csrc/adamw.cu), "apex", "torch" (its fused kernel); see
    :func:`megalrps.kernels.adamw_backends.check_optimizer_backend`. ValueError for tensors of other kinds, and for a
    backend that cannot update them.
    """
    operands = Operands(param, grad, exp_avg, exp_avg_sq, gradient_scale, found_inf, narrow)
    _check(operands)
    check_optimizer_backend(backend, param.device.type, exp_avg.dtype, exp_avg_sq.dtype, param.dtype)
    settings = Settings(learning_rate, beta1, beta2, epsilon, weight_decay, step)
    _update(*operands, *settings, backend)


@torch.no_grad()
def adamw_reference_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    step: int,
    gradient_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    narrow: Tensor | None = None,
) -> None:
    """The formula of :func:`adamw_` in torch operations, block by block; takes a block of scratch, three for bf16.

    On a GPU the host waits for nothing here either; with ``found_inf`` it takes four blocks more there.
    """
    operands = Operands(param, grad, exp_avg, exp_avg_sq, gradient_scale, found_inf, narrow)
    _check(operands)
    settings = Settings(learning_rate, beta1, beta2, epsilon, weight_decay, step)
    if param.device.type == "cpu":
        if not _stopped(found_inf):
            update_reference(operands._replace(found_inf=None), settings)
    else:
        update_reference(operands, settings)


def update_reference(operands: Operands, settings: Settings) -> None:
    """The update in torch operations; ``found_inf`` is read where it lies."""
    factors = _factors(settings)
    on_cpu, param, found_inf = operands.param.device.type == "cpu", operands.param, operands.found_inf
    length = _CPU_BLOCK_ELEMENTS if on_cpu else _DEVICE_BLOCK_ELEMENTS
    scratch = torch.empty_like(param[:length])
    for block in operands.blocks(length):
        stored = (block.param, block.exp_avg, block.exp_avg_sq)
        # What is narrower is widened; where the outcome may not count, nothing is written before that is known.
        p, m, v = (each.to(param.dtype, copy=found_inf is not None) for each in stored)
        g, scratch_block = block.grad, scratch[: p.numel()]
        if block.gradient_scale is not None:
            g = torch.mul(g, block.gradient_scale, out=scratch_block)
        m.lerp_(g, factors.first_weight)
        v.mul_(factors.second_decay).addcmul_(g, g, value=factors.second_weight)
        denominator = torch.sqrt(v, out=scratch_block).add_(factors.epsilon)
        p.mul_(factors.decay).addcdiv_(m, denominator, value=-factors.update_size)
        for old, new in zip(stored, (p, m, v), strict=True):
            if block.found_inf is not None:
                torch.where(block.found_inf == 0, new.to(old.dtype), old, out=old)
            elif new is not old:
                old.copy_(new)
        block.fill_narrow()


def update_triton(operands: Operands, settings: Settings) -> None:
    """The update by the Triton kernel, in one launch; the operations of an element are those of the native code.

    Nothing is contracted or approximated, so that in fp32 the bits are the same too.
    """
    elements = operands.param.numel()
    if elements:
        _adamw_kernel[(triton.cdiv(elements, _TRITON_BLOCK),)](
            *operands,
            *_factors(settings),
            elements,
            BLOCK=_TRITON_BLOCK,
            num_warps=_TRITON_WARPS,
            enable_fp_fusion=False,
        )


@triton.jit
def _adamw_kernel(
    param_pointer,
    grad_pointer,
    exp_avg_pointer,
    exp_avg_sq_pointer,
    gradient_scale_pointer,
    found_inf_pointer,
    narrow_pointer,
    first_weight,
    second_decay,
    second_weight,
    epsilon,
    decay,
    update_size,
    elements,
    BLOCK: tl.constexpr,
):
    # Four elements a thread: 128 bits of fp32. With eight, for 128 of bf16, what is fp32 goes through shared memory.
    at = tl.max_contiguous(tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), 4)
    inside = at < elements
    param = tl.load(param_pointer + at, mask=inside, other=0.0)
    gradient = tl.load(grad_pointer + at, mask=inside, other=0.0)
    old = tl.load(exp_avg_pointer + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(exp_avg_sq_pointer + at, mask=inside, other=0.0).to(tl.float32)
    if gradient_scale_pointer is not None:
        gradient = gradient * tl.load(gradient_scale_pointer).to(tl.float32)
    way = gradient - old  # the mean is reached from its nearer end: no cancellation
    first = tl.where(first_weight < 0.5, old + first_weight * way, gradient - way * (1.0 - first_weight))
    second = second * second_decay + second_weight * gradient * gradient
    denominator = tl.sqrt_rn(second) + epsilon
    param = param * decay - tl.div_rn(update_size * first, denominator)
    if found_inf_pointer is not None:  # only now: nothing that was read above had to wait for it
        inside = at < tl.where(tl.load(found_inf_pointer) == 0, elements, 0)
    tl.store(param_pointer + at, param, mask=inside)
    tl.store(exp_avg_pointer + at, first.to(exp_avg_pointer.dtype.element_ty), mask=inside)
    tl.store(exp_avg_sq_pointer + at, second.to(exp_avg_sq_pointer.dtype.element_ty), mask=inside)
    if narrow_pointer is not None:
        tl.store(narrow_pointer + at, param.to(narrow_pointer.dtype.element_ty), mask=inside)


def _factors(settings: Settings) -> _Factors:
    learning_rate, beta1, beta2, epsilon, weight_decay, step = settings
    root_correction = math.sqrt(1 - beta2**step)
    return _Factors(
        first_weight=1 - beta1,
        second_decay=beta2,
        second_weight=1 - beta2,
        epsilon=epsilon * root_correction,
        decay=1 - learning_rate * weight_decay,
        update_size=learning_rate * root_correction / (1 - beta1**step),
    )


def _check(operands: Operands) -> None:
    """Refuse what kernels that see addresses alone could not."""
    param = operands.param
    moment = (param.dtype, torch.bfloat16)
    types = {"param": _WIDE, "grad": (param.dtype,), "exp_avg": moment, "exp_avg_sq": moment, "narrow": _NARROW}
    for name, allowed in types.items():
        tensor = getattr(operands, name)
        if tensor is None and name == "narrow":
            continue
        if tensor.dtype not in allowed:
            raise ValueError(f"{name} cannot be {tensor.dtype} beside parameters of {param.dtype}")
        if tensor.shape != (param.numel(),) or not tensor.is_contiguous() or tensor.device != param.device:
            raise ValueError(f"{name} must be flat, contiguous, as long as the parameters and on their device")
    for name, tensor in (("gradient_scale", operands.gradient_scale), ("found_inf", operands.found_inf)):
        if tensor is not None and (tensor.numel() != 1 or tensor.device != param.device):
            raise ValueError(f"{name} must have one element, on the device of the parameters")
    if operands.found_inf is not None and operands.found_inf.dtype != torch.float32:
        raise ValueError(f"found_inf must be torch.float32, not {operands.found_inf.dtype}")


def _stopped(found_inf: Tensor | None) -> bool:
    """On a CPU, where there is nothing to wait for."""
    return found_inf is not None and found_inf.item() != 0


def _update_native(operands: Operands, settings: Settings) -> None:
    param, grad, exp_avg, exp_avg_sq, gradient_scale, _, narrow = operands
    _native_adamw(
        param=param.data_ptr(),
        grad=grad.data_ptr(),
        exp_avg=exp_avg.data_ptr(),
        exp_avg_sq=exp_avg_sq.data_ptr(),
        narrow=0 if narrow is None else narrow.data_ptr(),
        elements=param.numel(),
        type=_name(param),
        exp_avg_type=_name(exp_avg),
        exp_avg_sq_type=_name(exp_avg_sq),
        narrow_type="" if narrow is None else _name(narrow),
        gradient_scale=1.0 if gradient_scale is None else gradient_scale.item(),
        threads=torch.get_num_threads(),
        **_factors(settings)._asdict(),
    )


def _update_cuda(operands: Operands, settings: Settings) -> None:
    scale = operands.gradient_scale
    adamw_cuda_(
        *operands[:4],
        **_factors(settings)._asdict(),
        gradient_scale=None if scale is None else scale.float(),
        found_inf=operands.found_inf,
        narrow=operands.narrow,
    )


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# Registration: one operation for all backends; which one is data, so that compiled programs and fake tensors see one.


@torch.library.custom_op(
    "megalrps::adamw", mutates_args=("param", "exp_avg", "exp_avg_sq", "narrow"), device_types="cpu"
)
def _update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient_scale: Tensor | None,
    found_inf: Tensor | None,
    narrow: Tensor | None,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    step: int,
    backend: str,
) -> None:
    if _stopped(found_inf):
        return
    operands = Operands(param, grad, exp_avg, exp_avg_sq, gradient_scale, None, narrow)
    settings = Settings(learning_rate, beta1, beta2, epsilon, weight_decay, step)
    if backend == "torch":
        update_fused(operands, settings)
    elif _native_adamw is None:
        update_reference(operands, settings)
    else:
        _update_native(operands, settings)


@_update.register_kernel("cuda")
def _update_on_gpu(*arguments: Any) -> None:
    operands, settings, backend = Operands(*arguments[:7]), Settings(*arguments[7:13]), arguments[13]
    name, _ = chosen_optimizer_backend("cuda", backend, operands.param.dtype)
    updates = {
        "triton": update_triton,
        "cuda": _update_cuda,
        "apex": update_apex,
        "torch": update_fused,
        "reference": update_reference,
    }
    updates[name](operands, settings)


@_update.register_fake
def _(*arguments: Any) -> None:
    return None


def compile_cases() -> list[CompileCase]:
    """What ``python -m megalrps.kernels --check`` compiles of this file: the types of moments and of the copy."""
    scalars = ("first_weight", "second_decay", "second_weight", "epsilon", "decay", "update_size")
    always = dict.fromkeys(("param_pointer", "grad_pointer", "gradient_scale_pointer", "found_inf_pointer"), "*fp32")
    always |= dict.fromkeys(scalars, "fp32") | {"elements": "i64"}
    kinds = (("fp32", "fp32", None), ("fp32", "fp32", "bf16"), ("fp32", "fp32", "fp16"), ("bf16", "bf16", "bf16"))
    return [
        CompileCase(
            name=f"adamw, moments {first} and {second}, copy {narrow}",
            kernel=_adamw_kernel,
            arguments=always
            | {"exp_avg_pointer": f"*{first}", "exp_avg_sq_pointer": f"*{second}"}
            | ({} if narrow is None else {"narrow_pointer": f"*{narrow}"}),
            constants={"BLOCK": _TRITON_BLOCK} | ({"narrow_pointer": None} if narrow is None else {}),
            num_warps=_TRITON_WARPS,
            enable_fp_fusion=False,
            divisible=("elements",),
            required=required_everywhere(VECTOR_LOAD, VECTOR_STORE),
        )
        for first, second, narrow in kinds
    ]
