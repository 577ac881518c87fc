"""AdamW with decoupled weight decay (Loshchilov and Hutter 2017, arXiv 1711.05101, algorithm 2), over flat tensors."""

import math

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 17  # on a CPU: five blocks of 512 KB stay in cache over the five passes of an update


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
) -> None:
    """Update ``param``, ``exp_avg`` and ``exp_avg_sq`` in place; all four are flat, of one floating type, fp32 or fp64.

    ``step`` counts updates from 1 and corrects the bias of the moments::

        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        p <- (1 - learning_rate weight_decay) p - learning_rate m^ / (sqrt(v^) + epsilon)

    with m^ = m / (1 - beta1^step) and v^ = v / (1 - beta2^step).

    One block of scratch is the only memory taken on a CPU; elsewhere the block is the whole tensor.
    """
    block = _BLOCK_ELEMENTS if param.device.type == "cpu" else max(1, param.numel())
    update_size = learning_rate / (1 - beta1**step)
    root_correction = math.sqrt(1 - beta2**step)
    scratch = torch.empty_like(param[:block])
    for p, g, m, v in zip(*(x.split(block) for x in (param, grad, exp_avg, exp_avg_sq)), strict=True):
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denominator = torch.sqrt(v, out=scratch[: v.numel()]).div_(root_correction).add_(epsilon)
        p.mul_(1 - learning_rate * weight_decay).addcdiv_(m, denominator, value=-update_size)
