"""One optimizer update: micro-batches forward and backward, the sum over replicas, clip, AdamW."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megalrps.errors import InputError, RepeatedError
from megalrps.parallel.collectives import start_stack
from megalrps.parallel.group import Group
from megalrps.parallel.mesh import Mesh
from megalrps.parallel.ordered_sums import TreeSum, sum_in_order_
from megalrps.training.samples import Samples, documents_at
from megalrps.training.state import TrainState


@dataclass(frozen=True)
class Batch:
    """This rank's share of one global batch; the ranks that share a model or a sequence have the same one.

    tokens: int64 [samples of this rank, seq_length + 1]; inputs are ``[:, :-1]``, labels ``[:, 1:]``. An array on the
    host, or a tensor on the device already; and so the other two.
    global_tokens: labels of the whole global batch, over all ranks, that count; None: the step adds them up.
    starts_BS: int32 [samples, seq_length], the place in its sample where the document of each input begins; None
    where it is of no interest. counted_BS: bool [samples, seq_length], which labels count in the loss; None: all.
    """

    tokens: NDArray[np.int64] | torch.Tensor
    global_tokens: int | None
    starts_BS: NDArray[np.int32] | torch.Tensor | None = None  # noqa: N815
    counted_BS: NDArray[np.bool_] | torch.Tensor | None = None  # noqa: N815


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

    Each micro-batch adds the gradient of its *sum* of token losses over the *global* count of labels that count, so
    the result does not depend on how the batch is cut into micro-batches and ranks, up to the rounding of sums, nor on
    which of them hold labels that do not count. Under fp16 all is multiplied by the loss scale, which the optimizer
    takes out again; the loss that is returned is without it.

    The loss is the same bits on every rank, so that all decide alike by it; it is no number where any rank's is none.
    Raises InputError where no label of the global batch counts: on the first rank, and a RepeatedError on the others.
    """
    enter("forward and backward")
    samples = _on_device(batch, mesh.tensor.device, state.engine.tells_documents)
    scale = state.optimizer.loss_scale or 1.0
    divisor = _counted_labels(batch, samples, mesh) / scale
    state.buffers.begin(len(batch.tokens) // state.engine.micro_batch_size)
    if state.buffers.in_order:
        total = _in_order(state, samples, divisor, mesh)
    else:
        total = state.engine.forward_backward(samples, divisor)
        enter("sum of gradients")
        state.buffers.finish_gradients()
        for group in (mesh.replicas, mesh.pipeline):
            total = _of_ranks(total, group).sum()
    return _agreed(total, mesh.tensor) / scale


def _on_device(batch: Batch, device: torch.device, tells_documents: bool) -> Samples:
    """Packed samples always come with their documents; whether the model is told of them is another matter."""
    documents = counted = None
    if batch.starts_BS is not None and tells_documents:
        documents = documents_at(torch.as_tensor(batch.starts_BS, device=device))
    if batch.counted_BS is not None:
        counted = torch.as_tensor(batch.counted_BS, device=device)
    return Samples(torch.as_tensor(batch.tokens, device=device), documents, counted)


def _counted_labels(batch: Batch, samples: Samples, mesh: Mesh) -> int:
    """Labels of the global batch that count, at least 1: a whole number, and so the same on every rank.

    With a mask that all data-parallel ranks exchange one integer for, and the host waits for it; never without.
    """
    count = batch.global_tokens
    if count is None and samples.counted is None:
        count = samples.labels.numel() * mesh.data.size
    elif count is None:
        assert samples.counted is not None
        count = int(mesh.data.sum_(samples.counted.sum()))
    if count > 0:
        return count
    error = InputError(
        "no label of a whole global batch counts in the loss, by --eod-mask-loss or --pack-documents: there is nothing "
        "to train on. Raise --global-batch-size or --seq-length, or leave the flag out and train in a new --save"
    )
    groups = (mesh.data, mesh.tensor, mesh.pipeline, mesh.context)
    raise error if all(group.rank == 0 for group in groups) else RepeatedError(str(error))


def _in_order(state: TrainState, samples: Samples, divisor: float, mesh: Mesh) -> torch.Tensor:
    """The same with ``--deterministic-reduction``: losses and gradients add up in the tree over micro-batches."""
    micro_batches = samples.split(state.engine.micro_batch_size)
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
