"""One optimizer update: micro-batches forward and backward, the sum over replicas, clip, AdamW."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megalrps.parallel.mesh import Mesh
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
    ranks.
    """

    loss: float
    gradient_norm: float
    skipped: bool = False
    loss_scale: float | None = None

    @property
    def is_finite(self) -> bool:
        """Whether a run may go on: both figures are numbers, or the update was left out for one that is not."""
        return bool(np.isfinite(self.loss) and (self.skipped or np.isfinite(self.gradient_norm)))


def forward_backward(state: TrainState, batch: Batch, mesh: Mesh) -> torch.Tensor:
    """Leave the gradient of the global mean loss in the buffers, summed over replicas; returns that loss (a scalar).

    Each micro-batch adds the gradient of its *sum* of token losses over the *global* token count, so the result does
    not depend on how the batch is cut into micro-batches and ranks, up to the rounding of sums. Under fp16 all is
    multiplied by the loss scale, which the optimizer takes out again; the loss that is returned is without it.
    """
    state.buffers.begin(len(batch.tokens) // state.engine.micro_batch_size)
    tokens = torch.from_numpy(batch.tokens).to(mesh.tensor.device, non_blocking=True)
    scale = state.optimizer.loss_scale or 1.0
    total = state.engine.forward_backward(tokens, batch.global_tokens / scale)
    state.buffers.finish_gradients()
    mesh.replicas.sum_(total)
    mesh.pipeline.sum_(total)
    return total / scale


def train_step(state: TrainState, batch: Batch, *, learning_rate: float, mesh: Mesh) -> StepResult:
    """Make one update of ``state`` with ``batch`` at ``learning_rate``."""
    loss, scale = forward_backward(state, batch, mesh), state.optimizer.loss_scale
    norm = state.optimizer.step(learning_rate)
    state.checkpoint = None
    # The one time that the host waits for the device. In fp64: rounding must not make infinite what the optimizer,
    # which has decided already, held to be a number.
    mean, length = torch.stack((loss.double(), norm.double())).tolist()
    state.optimizer.settle(bool(np.isfinite(length)))
    return StepResult(mean, length, skipped=scale is not None and not np.isfinite(length), loss_scale=scale)
