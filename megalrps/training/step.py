"""One optimizer update: micro-batches forward and backward, the sum over replicas, clip, AdamW."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megalrps.parallel.collectives import start_stack
from megalrps.parallel.group import Group
from megalrps.parallel.mesh import Mesh
from megalrps.parallel.ordered_sums import TreeSum, sum_in_order_
from megalrps.training.state import TrainState


@dataclass(frozen=True)
class Batch:
    """This rank's share of one global batch; the ranks that share a model or a sequence have the same one.

    tokens: int64 [samples of this rank, seq_length + 1]; inputs are ``[:, :-1]``, labels ``[:, 1:]``.
    global_tokens: labels of the whole global batch, over all ranks.
    """

    tokens: NDArray[np.int64]
    global_tokens: int


@dataclass(frozen=True)
class StepResult:
    """Mean loss over the global batch (nats per token) and the gradient norm before clipping.

    ``skipped``: the gradients overflowed at ``loss_scale`` (fp16 alone has one), and the update was left out on all
    ranks. It was left out as well where either figure is no number.
    """

    loss: float
    gradient_norm: float
    skipped: bool = False
    loss_scale: float | None = None

    @property
    def is_finite(self) -> bool:
        """Whether both figures are numbers, or the norm is none at a loss scale that follows it."""
        return bool(np.isfinite(self.loss) and (self.skipped or np.isfinite(self.gradient_norm)))


def forward_backward(
    state: TrainState, batch: Batch, mesh: Mesh, enter: Callable[[str], None] = lambda phase: None
) -> torch.Tensor:
    """Leave the gradient of the global mean loss in the buffers, summed over replicas; returns that loss (a scalar).

    Each micro-batch adds the gradient of its *sum* of token losses over the *global* token count, so the result does
    not depend on how the batch is cut into micro-batches and ranks, up to the rounding of sums. Under fp16 all is
    multiplied by the loss scale, which the optimizer takes out again; the loss that is returned is without it.

    The loss is the same bits on every rank, so that all decide alike by it; it is no number where any rank's is none.
    """
    enter("forward and backward")
    state.buffers.begin(len(batch.tokens) // state.engine.micro_batch_size)
    tokens = torch.from_numpy(batch.tokens).to(mesh.tensor.device, non_blocking=True)
    scale = state.optimizer.loss_scale or 1.0
    divisor = batch.global_tokens / scale
    if state.buffers.in_order:
        total = _in_order(state, tokens, divisor, mesh)
    else:
        total = state.engine.forward_backward(tokens, divisor)
        enter("sum of gradients")
        state.buffers.finish_gradients()
        for group in (mesh.replicas, mesh.pipeline):
            total = _of_ranks(total, group).sum()
    return _agreed(total, mesh.tensor) / scale


def _in_order(state: TrainState, tokens: torch.Tensor, divisor: float, mesh: Mesh) -> torch.Tensor:
    """The same with ``--deterministic-reduction``: losses and gradients add up in the tree over micro-batches."""
    micro_batches = tokens.split(state.engine.micro_batch_size)
    losses = TreeSum(len(micro_batches))
    for micro_batch in micro_batches:
        losses.add([state.engine.forward_backward(micro_batch, divisor)])
        state.buffers.end_micro_batch()
    state.buffers.finish_gradients()
    return sum_in_order_(losses.total[0].view(1), mesh.data).view(())


def _of_ranks(total: torch.Tensor, group: Group) -> torch.Tensor:
    """[ranks]: the scalar of each. To be added up here: a sum by the network may come in another order on each rank."""
    return total.view(1) if group.size == 1 else start_stack(total.view(1), group).wait().flatten()


def _agreed(total: torch.Tensor, tensor: Group) -> torch.Tensor:
    """The loss that all tensor-parallel ranks have computed; where one of them has no number, none for any."""
    of_ranks = _of_ranks(total, tensor)
    return torch.where(torch.isfinite(of_ranks).all(), of_ranks[0], of_ranks.sum())


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    learning_rate: float,
    mesh: Mesh,
    enter: Callable[[str], None] = lambda phase: None,
) -> StepResult:
    """Make one update of ``state`` with ``batch`` at ``learning_rate``; ``enter`` is told each phase as it begins."""
    loss, scale = forward_backward(state, batch, mesh, enter), state.optimizer.loss_scale
    enter("optimizer")
    norm = state.optimizer.step(learning_rate, loss)
    state.checkpoint = None
    # The one time that the host waits for the device. In fp64: rounding must not make infinite what the optimizer,
    # which has decided already, held to be a number.
    mean, length = torch.stack((loss.double(), norm.double())).tolist()
    state.optimizer.settle(bool(np.isfinite(mean) and np.isfinite(length)))
    return StepResult(mean, length, skipped=scale is not None and not np.isfinite(length), loss_scale=scale)
