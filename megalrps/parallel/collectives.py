"""The dual pairs of communication that tensor parallelism puts around a cut map, as autograd functions.

Without sequence parallelism an activation between two layers is whole on every rank, and the pair is identity and sum
(Shoeybi et al. 2019, arXiv 1909.08053, section 3: f and g). With it each rank holds a slice of the sequence there, and
the pair is gather and scatter of sums (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2: g and g-bar), which
moves as many bytes and keeps 1 / ranks of the activation.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalrps.parallel.group import Group

# torch 2.13 renamed both and warns of the old names; 2.11 and 2.12 know only those.
_ALL_GATHER: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending:
    """A tensor whose collective is under way; :meth:`wait` gives it. What is computed meanwhile hides the transfer."""

    def __init__(self, work: dist.Work, finish: Callable[[], Tensor], operand: Tensor) -> None:
        self._work = work
        self._finish = finish
        self._operand = operand  # kept alive: the collective reads it until it has ended

    def wait(self) -> Tensor:
        """The result, once it is there."""
        self._work.wait()
        return self._finish()

    def then(self, change: Callable[[Tensor], Tensor]) -> "Pending":
        """The same, with ``change`` made to the result when it is waited for."""
        return Pending(self._work, lambda: change(self._finish()), self._operand)


def start_sum_(part: Tensor, group: Group) -> Pending:
    """Begin to add the contiguous ``part`` up over the group, in place."""
    return Pending(dist.all_reduce(part, group=group.group, async_op=True), lambda: part, part)


def start_stack(tensor: Tensor, group: Group) -> Pending:
    """Begin to gather the ranks' tensors of one shape [...] as [ranks, ...]."""
    tensor = tensor.contiguous()
    stacked = tensor.new_empty(group.size, *tensor.shape)
    work = _ALL_GATHER(stacked.flatten(0, 1), tensor, group=group.group, async_op=True)
    return Pending(work, lambda: stacked, tensor)


def start_gather(slice_BSH: Tensor, group: Group) -> Pending:
    """Begin to put the ranks' slices of the sequence together: [B, S / ranks, H] to [B, S, H]."""
    return start_stack(slice_BSH, group).then(lambda stacked: stacked.transpose(0, 1).flatten(1, 2))


def start_sum_scatter(part_BSH: Tensor, group: Group) -> Pending:
    """Begin to add ``part_BSH`` up over the group and leave each rank its slice of the sequence of the sum."""
    return start_sum_stack(part_BSH.unflatten(1, (group.size, -1)).transpose(0, 1), group)


def start_sum_stack(parts: Tensor, group: Group) -> Pending:
    """Begin to add ``parts`` [ranks, ...] up over the group and leave each rank its own [...] of the sum."""
    parts = parts.contiguous()
    scattered = torch.empty_like(parts[0])
    work = _REDUCE_SCATTER(scattered, parts.flatten(0, 1), group=group.group, async_op=True)
    return Pending(work, lambda: scattered, parts)


def start_sum_own_(flat: Tensor, group: Group) -> Pending:
    """Begin to add the contiguous ``flat`` [ranks n] up over the group; gives this rank's [n] of the sum, in its place.

    The rest of ``flat`` is undefined afterwards.
    """
    own = flat.view(group.size, -1)[group.rank]
    work = _REDUCE_SCATTER(own, flat, group=group.group, async_op=True)
    return Pending(work, lambda: own, flat)


def start_fill_(flat: Tensor, group: Group) -> Pending:
    """Begin to fill the contiguous ``flat`` [ranks n], where each rank has its own [n], with those of all ranks."""
    work = _ALL_GATHER(flat, flat.view(group.size, -1)[group.rank], group=group.group, async_op=True)
    return Pending(work, lambda: flat, flat)


def sum_parts_(part: Tensor, group: Group) -> Tensor:
    """The sum of the ranks' partial outputs, whole on every rank; its gradient passes unchanged.

    In place: for a contiguous tensor that neither the caller nor the backward pass of its maker reads again.
    """
    whole: Tensor = _SumParts.apply(part, group)
    return whole


def sum_scatter_parts(part_BSH: Tensor, group: Group) -> Tensor:
    """This rank's slice of the sequence of that sum; backwards the slices' gradients are gathered."""
    slice_BSH: Tensor = _SumScatterParts.apply(part_BSH, group)
    return slice_BSH


class _SumParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group) -> Tensor:
        ctx.mark_dirty(part)
        return start_sum_(part, group).wait()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _SumScatterParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part_BSH: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return start_sum_scatter(part_BSH, group).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BSH: Tensor) -> tuple[Tensor, None]:
        return start_gather(gradient_BSH, ctx.group).wait(), None
