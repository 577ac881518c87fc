"""Token losses from logits whose vocabulary is cut over a tensor-parallel group: no rank ever holds a whole row.

Each rank reduces its slice of a row to two numbers, the log-sum-exp of its logits and the label's logit where the label
is its own, and one gather of these gives every rank the same loss to the last bit::

    loss = log sum_ranks exp(lse_rank) - z_label,    d loss / d z_v = exp(z_v - lse) - [v = label]
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalrps.kernels.cross_entropy import cross_entropy_gradient_, cross_entropy_statistics
from megalrps.parallel.collectives import start_stack
from megalrps.parallel.group import Group


def cross_entropy_(logits_TV: Tensor, labels_T: Tensor, group: Group) -> Tensor:
    """The loss of each token in nats, [T] in fp32 (fp64 for fp64 logits), equal on all ranks.

    ``logits_TV`` is this rank's slice, V = vocabulary / ranks; the backward pass overwrites it with its gradient.
    ``labels_T`` holds indices into the whole vocabulary.
    """
    losses_T: Tensor = _CrossEntropy.apply(logits_TV, labels_T - group.rank * logits_TV.shape[1], group)
    return losses_T


def whole_statistics(of_rank_2T: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """(log-sum-exp over the whole vocabulary, label's logit), [T] each, the same bits on all ranks.

    From what each rank has of the two of its slice, stacked (megalrps.kernels.cross_entropy.cross_entropy_statistics).
    """
    of_ranks_R2T = start_stack(of_rank_2T, group).wait()
    return of_ranks_R2T[:, 0].logsumexp(0), of_ranks_R2T[:, 1].sum(0)


class _CrossEntropy(torch.autograd.Function):
    """Labels count from the first of this rank's logits: those below 0 or beyond the last are other ranks'."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, labels_T: Tensor, group: Group) -> Tensor:
        logsumexp_T, label_logit_T = whole_statistics(torch.stack(cross_entropy_statistics(logits_TV, labels_T)), group)
        ctx.save_for_backward(logits_TV, labels_T, logsumexp_T)
        return logsumexp_T - label_logit_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_T: Tensor) -> tuple[Tensor, None, None]:
        logits_TV, labels_T, logsumexp_T = ctx.saved_tensors
        cross_entropy_gradient_(logits_TV, labels_T, logsumexp_T, gradient_T)
        return logits_TV, None, None
