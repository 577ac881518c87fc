"""Token losses from logits: ``log(sum_v exp(z_v)) - z_label``, with gradient ``softmax(z) - onehot(label)``.

Only the logits are kept between the passes. Both passes go over blocks of rows that stay in a CPU's cache, in fp32
whatever the logits' type: at small widths and large vocabularies the loss is memory traffic, and on a CPU the first
touch of a fresh T x V buffer costs as much as the arithmetic.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK_ELEMENTS = 1 << 20  # 4 MB in fp32: the fastest of 128 KB to 32 MB on a server CPU


def cross_entropy(logits_TV: Tensor, labels_T: Tensor, *, overwrite_logits: bool = False) -> Tensor:
    """The loss of each token in nats, [T] in fp32 (fp64 for fp64 logits); ``labels_T`` holds indices in [0, V).

    With ``overwrite_logits`` the backward pass writes the gradient into the logits' own storage, which halves the
    memory of the largest tensors of a step. Only for logits nobody reads afterwards; autograd refuses a second
    backward pass.
    """
    losses_T: Tensor = _CrossEntropy.apply(logits_TV, labels_T, overwrite_logits)
    return losses_T


def cross_entropy_reference(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """The formula of :func:`cross_entropy` left to autograd: what the tests compare with."""
    wide = logits_TV.to(_accumulation_type(logits_TV))
    return wide.logsumexp(-1) - wide.gather(-1, labels_T[:, None]).squeeze(-1)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, labels_T: Tensor, overwrite_logits: bool) -> Tensor:
        losses_T = logits_TV.new_empty(logits_TV.shape[0], dtype=_accumulation_type(logits_TV))
        for rows in row_blocks(logits_TV):
            losses_T[rows] = cross_entropy_reference(logits_TV[rows], labels_T[rows])
        ctx.save_for_backward(logits_TV, labels_T)
        ctx.overwrite_logits = overwrite_logits
        return losses_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, losses_gradient_T: Tensor) -> tuple[Tensor, None, None]:
        logits_TV, labels_T = ctx.saved_tensors
        gradient_TV = logits_TV if ctx.overwrite_logits else torch.empty_like(logits_TV)
        for rows in row_blocks(logits_TV):
            scale = losses_gradient_T[rows, None]
            block = torch.softmax(logits_TV[rows], dim=-1, dtype=scale.dtype).mul_(scale)
            gradient_TV[rows] = block.scatter_add_(1, labels_T[rows, None], -scale)
        return gradient_TV, None, None


def _accumulation_type(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def row_blocks(logits_TV: Tensor) -> list[slice]:
    """The rows of ``logits_TV`` in runs whose fp32 copies stay in a CPU's cache."""
    tokens, vocabulary = logits_TV.shape
    rows = max(1, _BLOCK_ELEMENTS // vocabulary)
    return [slice(start, start + rows) for start in range(0, tokens, rows)]
