"""Token losses from logits whose vocabulary is cut over a tensor-parallel group: no rank ever holds a whole row.

Each rank reduces its slice of a row to two numbers, the log-sum-exp of its logits and the label's logit where the label
is its own, and one gather of these gives every rank the same loss to the last bit::

    loss = log sum_ranks exp(lse_rank) - z_label,    d loss / d z_v = exp(z_v - lse) - [v = label]

In fp32 whatever the logits' type, block by block as :mod:`megalrps.kernels.cross_entropy` does and for its reasons.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalrps.kernels.cross_entropy import row_blocks
from megalrps.parallel.collectives import start_stack
from megalrps.parallel.group import Group


def cross_entropy_(logits_TV: Tensor, labels_T: Tensor, group: Group) -> Tensor:
    """The loss of each token in nats, [T] in fp32 (fp64 for fp64 logits), equal on all ranks.

    ``logits_TV`` is this rank's slice, V = vocabulary / ranks; the backward pass overwrites it with its gradient.
    ``labels_T`` holds indices into the whole vocabulary.
    """
    losses_T: Tensor = _CrossEntropy.apply(logits_TV, labels_T - group.rank * logits_TV.shape[1], group)
    return losses_T


class _CrossEntropy(torch.autograd.Function):
    """Labels count from the first of this rank's logits: those below 0 or beyond the last are other ranks'."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, labels_T: Tensor, group: Group) -> Tensor:
        tokens, vocabulary = logits_TV.shape
        elsewhere_T = (labels_T < 0) | (labels_T >= vocabulary)
        local_T = labels_T.masked_fill(elsewhere_T, 0)
        of_rank_2T = logits_TV.new_empty(2, tokens, dtype=torch.promote_types(logits_TV.dtype, torch.float32))
        for rows in row_blocks(logits_TV):
            wide = logits_TV[rows].to(of_rank_2T.dtype)
            of_rank_2T[0, rows] = wide.logsumexp(-1)
            of_rank_2T[1, rows] = wide.gather(-1, local_T[rows, None]).squeeze(-1)
        of_rank_2T[1].masked_fill_(elsewhere_T, 0)
        of_ranks_R2T = start_stack(of_rank_2T, group).wait()
        logsumexp_T = of_ranks_R2T[:, 0].logsumexp(0)
        ctx.save_for_backward(logits_TV, local_T, elsewhere_T, logsumexp_T)
        return logsumexp_T - of_ranks_R2T[:, 1].sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_T: Tensor) -> tuple[Tensor, None, None]:
        logits_TV, local_T, elsewhere_T, logsumexp_T = ctx.saved_tensors
        of_label_T = gradient_T.masked_fill(elsewhere_T, 0)
        for rows in row_blocks(logits_TV):
            block = (logits_TV[rows] - logsumexp_T[rows, None]).exp_().mul_(gradient_T[rows, None])
            logits_TV[rows] = block.scatter_add_(1, local_T[rows, None], -of_label_T[rows, None])
        return logits_TV, None, None
