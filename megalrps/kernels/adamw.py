"""AdamW with decoupled weight decay (Loshchilov and Hutter 2017, arXiv 1711.05101, algorithm 2), over flat tensors."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

try:
    from megalrps._native import adamw as _native_adamw
except ImportError:  # not built: see setup.py
    _native_adamw = None

IMPLEMENTATION = "torch" if _native_adamw is None else "native"
"""What updates tensors on a CPU here: ``native`` (csrc/adamw.cpp) where it was built, else ``torch``."""

_CPU_BLOCK_ELEMENTS = 1 << 17  # five blocks of 512 KB stay in cache over the passes of an update
_DEVICE_BLOCK_ELEMENTS = 1 << 25  # bounds the scratch; launches are rare beside the work of so many elements
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
    narrow: Tensor | None = None,
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
    longer falls.) ``narrow``, bf16 or fp16, receives the new parameters rounded through fp32. ``gradient_scale``, the
    clip coefficient, has one element; the host does not wait for it where the tensors are on a GPU.

    On a CPU the native code updates in one pass over memory, with torch's number of threads; elsewhere, or where it was
    not built, the torch form of :func:`adamw_reference_` does. On a CPU, either way, an element's result does not
    depend on its place: shards of a buffer and the whole give the same bits. ValueError for tensors of other kinds.
    """
    _check(param, grad, exp_avg, exp_avg_sq, gradient_scale, narrow)
    factors = _factors(learning_rate, beta1, beta2, epsilon, weight_decay, step)
    if _native_adamw is not None and param.device.type == "cpu":
        _update_native(param, grad, exp_avg, exp_avg_sq, factors, gradient_scale, narrow)
    else:
        _update_torch(param, grad, exp_avg, exp_avg_sq, factors, gradient_scale, narrow)


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
    narrow: Tensor | None = None,
) -> None:
    """The formula of :func:`adamw_` in torch operations, block by block; takes a block of scratch, three for bf16."""
    _check(param, grad, exp_avg, exp_avg_sq, gradient_scale, narrow)
    factors = _factors(learning_rate, beta1, beta2, epsilon, weight_decay, step)
    _update_torch(param, grad, exp_avg, exp_avg_sq, factors, gradient_scale, narrow)


def _factors(
    learning_rate: float, beta1: float, beta2: float, epsilon: float, weight_decay: float, step: int
) -> _Factors:
    root_correction = math.sqrt(1 - beta2**step)
    return _Factors(
        first_weight=1 - beta1,
        second_decay=beta2,
        second_weight=1 - beta2,
        epsilon=epsilon * root_correction,
        decay=1 - learning_rate * weight_decay,
        update_size=learning_rate * root_correction / (1 - beta1**step),
    )


def _check(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient_scale: Tensor | None,
    narrow: Tensor | None,
) -> None:
    """Refuse what the native code, which sees addresses alone, could not."""
    types = {
        "grad": (param.dtype,),
        "exp_avg": (param.dtype, torch.bfloat16),
        "exp_avg_sq": (param.dtype, torch.bfloat16),
    }
    tensors = {"param": param, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    if narrow is not None:
        tensors["narrow"] = narrow
    for name, tensor in tensors.items():
        if tensor.dtype not in types.get(name, _NARROW if name == "narrow" else _WIDE):
            raise ValueError(f"{name} cannot be {tensor.dtype} beside parameters of {param.dtype}")
        if tensor.shape != (param.numel(),) or not tensor.is_contiguous() or tensor.device != param.device:
            raise ValueError(f"{name} must be flat, contiguous, as long as the parameters and on their device")
    if gradient_scale is not None and (gradient_scale.numel() != 1 or gradient_scale.device != param.device):
        raise ValueError("gradient_scale must have one element, on the device of the parameters")


def _update_native(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    factors: _Factors,
    gradient_scale: Tensor | None,
    narrow: Tensor | None,
) -> None:
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
        **factors._asdict(),
    )
    # Autograd learns, as from any in-place operation, that values it may have saved are gone.
    increment_version([tensor for tensor in (param, exp_avg, exp_avg_sq, narrow) if tensor is not None])


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _update_torch(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    factors: _Factors,
    gradient_scale: Tensor | None,
    narrow: Tensor | None,
) -> None:
    block = _CPU_BLOCK_ELEMENTS if param.device.type == "cpu" else _DEVICE_BLOCK_ELEMENTS
    scale = None if gradient_scale is None else gradient_scale.reshape(())  # with no dimension it widens nothing
    scratch = torch.empty_like(param[:block])
    wide_first, wide_second = (
        None if moment.dtype == param.dtype else torch.empty_like(scratch) for moment in (exp_avg, exp_avg_sq)
    )
    for start in range(0, param.numel(), block):
        at = slice(start, start + block)
        p, g, stored_m, stored_v = param[at], grad[at], exp_avg[at], exp_avg_sq[at]
        m = stored_m if wide_first is None else wide_first[: p.numel()].copy_(stored_m)
        v = stored_v if wide_second is None else wide_second[: p.numel()].copy_(stored_v)
        scratch_block = scratch[: p.numel()]
        if scale is not None:
            g = torch.mul(g, scale, out=scratch_block)
        m.lerp_(g, factors.first_weight)
        v.mul_(factors.second_decay).addcmul_(g, g, value=factors.second_weight)
        denominator = torch.sqrt(v, out=scratch_block).add_(factors.epsilon)
        p.mul_(factors.decay).addcdiv_(m, denominator, value=-factors.update_size)
        if wide_first is not None:
            stored_m.copy_(m)
        if wide_second is not None:
            stored_v.copy_(v)
        if narrow is not None:
            narrow[at].copy_(p)
