"""The maps of the network, cut over a tensor-parallel group: what each rank computes and what the ranks exchange.

Column maps hold a slice of the outputs and take a whole input; row maps hold a slice of the inputs and give a whole
output, the sum of what the ranks compute. A column map followed by a row map therefore exchanges once a pass
(Shoeybi et al. 2019, arXiv 1909.08053, section 3). Under sequence parallelism what lies between the two is whole and
what lies outside them, norms and residual stream, is a slice of the sequence a rank (Korthikanti et al. 2022, arXiv
2205.05198, section 4.2.2).

The functions take weights and hold none; whoever holds them cuts them by a
:class:`megalrps.parallel.placement.Placement`. One process has the same maps, without a group.
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
from megalrps.parallel.main_gradient import main_gradient_of


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


def column_maps(x: Tensor, weights: Sequence[Tensor], ranks: TensorParallel | None) -> tuple[Tensor, ...]:
    """``x @ weight.T`` for weights [outputs / ranks, H] that share an input: this rank's slice of each output.

    ``x`` [..., H] is whole, or this rank's slice of the sequence under sequence parallelism ([B, S / ranks, H]); the
    outputs are whole along the sequence. One exchange serves all the maps, forwards and backwards. Backwards the
    exchange of the input's gradient runs beside the products that give the weights' gradients; under sequence
    parallelism the whole input is not kept but gathered again, beside the product that gives the input's gradient.
    ``ranks`` None: the weights are whole and nothing is exchanged.

    The gradient of a weight that has a :class:`megalrps.parallel.main_gradient.MainGradient` goes there and autograd
    sees none. A product that is deferred keeps the rows of the output's gradient and of the whole input until it is
    done. Under autocast what is fp32 is narrowed, weights anew in each pass: no narrow copy of a weight is kept.
    """
    outputs: tuple[Tensor, ...] = _Maps.apply(ranks, _narrowed(x), *weights)
    return outputs


def row_map(x_BSF: Tensor, weight: Tensor, ranks: TensorParallel | None) -> Tensor:
    """The output of a map whose inputs are cut: ``x`` [B, S, F / ranks] and ``weight`` [H, F / ranks] are slices.

    The weight's gradient as in :func:`column_maps`; under sequence parallelism the rows of the output's gradient are
    gathered first, so that a deferred product keeps those of the whole sequence.
    """
    (part,) = column_maps(x_BSF, (weight,), None)
    return part if ranks is None else ranks.finish(part)


def embedding(tokens_BS: Tensor, weight_VH: Tensor, ranks: TensorParallel) -> Tensor:
    """The embedding of tokens where each rank holds V = vocabulary / ranks rows: its own rows, zeros elsewhere, summed.

    One rank has each token's row, so the sum is exact in every type.
    """
    rows = tokens_BS - ranks.group.rank * weight_VH.shape[0]
    elsewhere = (rows < 0) | (rows >= weight_VH.shape[0])
    part = F.embedding(rows.masked_fill(elsewhere, 0), weight_VH).masked_fill(elsewhere[..., None], 0)
    return ranks.finish(part)


class _Maps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: TensorParallel | None, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.ranks = ranks
        ctx.save_for_backward(x)
        # Not saved: what recomputation and offload hand back of a saved tensor has lost its attributes.
        ctx.weights = weights
        whole = start_gather(x, ranks.group).wait() if ranks is not None and ranks.sequence_parallel else x
        return tuple(F.linear(whole, _narrowed(weight)) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ranks: TensorParallel | None = ctx.ranks
        (x,) = ctx.saved_tensors
        _, of_input, *of_weights = ctx.needs_input_grad
        gathered = None
        if ranks is not None and ranks.sequence_parallel and any(of_weights):
            gathered = start_gather(x, ranks.group)
        rows = [_rows(gradient) for gradient in gradients]
        part, exchanged = None, None
        if of_input:
            part = _input_gradient(rows, ctx.weights).view(*gradients[0].shape[:-1], x.shape[-1])
            exchanged = None if ranks is None else _start_exchange(part, ranks)
        input_TI = _rows(x if gathered is None else gathered.wait())
        products = [
            _weight_gradient(weight, gradient_TO, input_TI) if wanted else None
            for weight, gradient_TO, wanted in zip(ctx.weights, rows, of_weights, strict=True)
        ]
        return None, part if exchanged is None else exchanged.wait(), *products


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _input_gradient(rows: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The sum of ``gradient_TO @ weight_OI``: [T, I] in the gradients' type."""
    total = rows[0] @ weights[0].to(rows[0].dtype)
    for gradient_TO, weight in zip(rows[1:], weights[1:], strict=True):
        torch.addmm(total, gradient_TO, weight.to(gradient_TO.dtype), out=total)
    return total


def _weight_gradient(weight: Tensor, gradient_TO: Tensor, input_TI: Tensor) -> Tensor | None:
    """What autograd is given of a weight's gradient: none where the weight has a main gradient, which takes it."""
    main = main_gradient_of(weight)
    if main is None:
        return (gradient_TO.T @ input_TI).to(weight.dtype)
    main.add_product(gradient_TO, input_TI)
    return None


def _start_exchange(part: Tensor, ranks: TensorParallel) -> Pending:
    return start_sum_scatter(part, ranks.group) if ranks.sequence_parallel else start_sum_(part, ranks.group)


def _narrowed(operand: Tensor) -> Tensor:
    """The operand of a matrix product as autocast would cast it: it does not look into functions of our own."""
    kind = operand.device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return operand.to(torch.get_autocast_dtype(kind)) if enabled and operand.dtype == torch.float32 else operand
