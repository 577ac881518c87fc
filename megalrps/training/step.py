"""One optimizer update: micro-batches forward and backward, the data-parallel sum, clip, AdamW."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megalrps.parallel.group import Group
from megalrps.training.state import TrainState


@dataclass(frozen=True)
class Batch:
    """This rank's share of one global batch; the ranks of a tensor-parallel group have the same one.

    tokens: int64 [samples of this rank, seq_length + 1]; inputs are ``[:, :-1]``, labels ``[:, 1:]``.
    global_tokens: labels of the whole global batch, over all ranks.
    """

    tokens: NDArray[np.int64]
    global_tokens: int


@dataclass(frozen=True)
class StepResult:
    """Mean loss over the global batch (nats per token) and the gradient norm before clipping."""

    loss: float
    gradient_norm: float

    @property
    def is_finite(self) -> bool:
        """Whether both figures are numbers a run may go on with."""
        return bool(np.isfinite(self.loss) and np.isfinite(self.gradient_norm))


def forward_backward(state: TrainState, batch: Batch, *, micro_batch: int, bf16: bool, world: Group) -> torch.Tensor:
    """Leave the gradient of the global mean loss in the buffers, summed over ranks; returns that loss (a scalar).

    ``world`` holds the data-parallel ranks, which share out the batch.

    Each micro-batch adds the gradient of its *sum* of token losses over the *global* token count, so the result does
    not depend on how the batch is cut into micro-batches and ranks, up to the rounding of sums.
    """
    state.buffers.zero_gradients()
    total = torch.zeros((), dtype=torch.float32, device=world.device)
    for first in range(0, len(batch.tokens), micro_batch):
        tokens = torch.from_numpy(batch.tokens[first : first + micro_batch]).to(world.device, non_blocking=True)
        with torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=bf16):
            loss_sum, _ = state.model.loss(tokens[:, :-1], tokens[:, 1:])
        loss = loss_sum / batch.global_tokens
        loss.backward()
        total += loss.detach()
    state.buffers.sum_gradients(world)
    return world.sum_(total)


def train_step(
    state: TrainState, batch: Batch, *, learning_rate: float, micro_batch: int, bf16: bool, world: Group
) -> StepResult:
    """Make one update of ``state`` with ``batch`` at ``learning_rate``."""
    loss = forward_backward(state, batch, micro_batch=micro_batch, bf16=bf16, world=world)
    norm = state.optimizer.step(learning_rate)
    state.checkpoint = None
    figures = torch.stack((loss.float(), norm.float())).tolist()  # one host synchronisation for both
    return StepResult(figures[0], figures[1])
