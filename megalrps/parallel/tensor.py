"""The maps of the network, cut over a tensor-parallel group: what each rank computes and what the ranks exchange.

Column maps hold a slice of the outputs and take a whole input; row maps hold a slice of the inputs and give a whole
output, the sum of what the ranks compute. A column map followed by a row map therefore exchanges once a pass
(Shoeybi et al. 2019, arXiv 1909.08053, section 3). Under sequence parallelism what lies between the two is whole and
what lies outside them, norms and residual stream, is a slice of the sequence a rank (Korthikanti et al. 2022, arXiv
2205.05198, section 4.2.2).

The functions take weights and hold none; whoever holds them cuts them by a
:class:`megalrps.parallel.placement.Placement`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalrps.parallel.collectives import (
    Pending,
    start_gather,
    start_sum_,
    start_sum_scatter,
    sum_parts_,
    sum_scatter_parts,
)
from megalrps.parallel.group import Group


@dataclass(frozen=True)
class TensorParallel:
    """The ranks that share every matrix, two at least, and whether they share the sequence between the matrices."""

    group: Group
    sequence_parallel: bool = False

    def finish(self, part_BSH: Tensor) -> Tensor:
        """What enters the residual stream: the sum of the ranks' parts, whole or this rank's slice of the sequence."""
        if self.sequence_parallel:
            return sum_scatter_parts(part_BSH, self.group)
        return sum_parts_(part_BSH, self.group)


def column_maps(x_BSH: Tensor, weights: Sequence[Tensor], ranks: TensorParallel) -> tuple[Tensor, ...]:
    """``x @ weight.T`` for weights [outputs / ranks, H] that share an input: this rank's slice of each output.

    ``x`` is whole, or this rank's slice of the sequence under sequence parallelism; the outputs are whole along the
    sequence. One exchange serves all the maps, forwards and backwards. Backwards the exchange of the input's gradient
    runs beside the products that give the weights' gradients; under sequence parallelism the whole input is not kept
    but gathered again, beside the product that gives the input's gradient.
    """
    narrow = [_narrowed(operand) for operand in (x_BSH, *weights)]
    outputs: tuple[Tensor, ...] = _ColumnMaps.apply(ranks, *narrow)
    return outputs


def row_map(x_BSF: Tensor, weight: Tensor, ranks: TensorParallel) -> Tensor:
    """The output of a map whose inputs are cut: ``x`` [B, S, F / ranks] and ``weight`` [H, F / ranks] are slices."""
    return ranks.finish(F.linear(x_BSF, weight))


def embedding(tokens_BS: Tensor, weight_VH: Tensor, ranks: TensorParallel) -> Tensor:
    """The embedding of tokens where each rank holds V = vocabulary / ranks rows: its own rows, zeros elsewhere, summed.

    One rank has each token's row, so the sum is exact in every type.
    """
    rows = tokens_BS - ranks.group.rank * weight_VH.shape[0]
    elsewhere = (rows < 0) | (rows >= weight_VH.shape[0])
    part = F.embedding(rows.masked_fill(elsewhere, 0), weight_VH).masked_fill(elsewhere[..., None], 0)
    return ranks.finish(part)


class _ColumnMaps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: TensorParallel, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.ranks = ranks
        ctx.save_for_backward(x, *weights)
        whole = start_gather(x, ranks.group).wait() if ranks.sequence_parallel else x
        return tuple(F.linear(whole, weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ranks: TensorParallel = ctx.ranks
        x, *weights = ctx.saved_tensors
        gathered = start_gather(x, ranks.group) if ranks.sequence_parallel else None
        part = gradients[0] @ weights[0]
        for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
            part += gradient @ weight
        exchanged = _start_exchange(part, ranks)
        rows = (x if gathered is None else gathered.wait()).flatten(0, -2)
        of_weights = [gradient.flatten(0, -2).T @ rows for gradient in gradients]
        return None, exchanged.wait(), *of_weights


def _start_exchange(part: Tensor, ranks: TensorParallel) -> Pending:
    return start_sum_scatter(part, ranks.group) if ranks.sequence_parallel else start_sum_(part, ranks.group)


def _narrowed(operand: Tensor) -> Tensor:
    """The operand of a matrix product as autocast would cast it: it does not look into functions of our own."""
    kind = operand.device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return operand.to(torch.get_autocast_dtype(kind)) if enabled and operand.dtype == torch.float32 else operand
