"""The passes of one rank's part of the model, forwards and backwards, whatever the layout.

With one pipeline stage these are loops over micro-batches; with several, a schedule's steps. Each rank of a
context-parallel group takes its runs of every sequence. What comes out is the same number on every rank.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from megalrps.model.transformer import SummedLoss, Transformer
from megalrps.parallel.context import sequence_positions
from megalrps.parallel.main_gradient import ProductQueue
from megalrps.parallel.mesh import Mesh
from megalrps.parallel.pipeline import Exchanged, Pipeline, forward_only
from megalrps.parallel.schedule import Schedule


class Engine:
    """The stages that this rank holds, and how a batch goes through all ranks' stages.

    ``stages``: by index, in the order of the forward pass. ``schedule`` is None for a model in one piece.
    ``passes`` are the same stages as a pipeline calls them, with one argument.
    ``autocast`` is the type of matrix products, None for the parameters' own. ``exchanged`` has the shape of one
    micro-batch of the residual stream between stages, and its type.
    """

    def __init__(
        self,
        stages: Mapping[int, Transformer],
        mesh: Mesh,
        *,
        micro_batch_size: int,
        sequence_length: int,
        autocast: torch.dtype | None = None,
        schedule: Schedule | None = None,
        exchanged: Exchanged | None = None,
        queue: ProductQueue | None = None,
    ) -> None:
        self.stages = dict(stages)
        self.micro_batch_size = micro_batch_size
        self._mesh = mesh
        self._autocast = autocast
        self._schedule = schedule
        self._exchanged = exchanged
        self._divisor = 1.0
        positions = sequence_positions(sequence_length, mesh.context.size, mesh.context.rank)
        self._positions_S = torch.as_tensor(positions, device=mesh.tensor.device)
        self.passes: dict[int, nn.Module] = {
            index: _Stage(stage, self._positions_S, self._precision) for index, stage in stages.items()
        }
        self._pipeline = None
        if schedule is not None:
            assert exchanged is not None and queue is not None
            self._pipeline = Pipeline(
                schedule,
                self.passes,
                mesh.pipeline,
                tokens=(micro_batch_size, len(self._positions_S)),
                exchanged=exchanged,
                loss=self.share_of_loss,
                queue=queue,
            )

    def forward_backward(self, tokens_BS: Tensor, divisor: float) -> Tensor:
        """Add the gradient of the summed token loss / ``divisor`` to the gradients; returns this rank's part of it.

        ``tokens_BS`` are this data-parallel rank's samples of S + 1 tokens. The part is zero on a rank without the
        last stage; the parts of all ranks but tensor-parallel ones add up to the whole.
        """
        self._divisor = divisor
        inputs_BS, labels_BS = self._own(tokens_BS[:, :-1]), self._own(tokens_BS[:, 1:])
        if self._pipeline is not None:
            losses = self._pipeline.step(inputs_BS, labels_BS)
        else:
            losses = [self._pass(*each) for each in self._micro_batches(inputs_BS, labels_BS)]
        total = torch.zeros((), dtype=torch.float32, device=self._positions_S.device)
        for loss in losses:
            total += loss.detach()
        return total

    def loss(self, inputs_BS: Tensor, labels_BS: Tensor, mask_BS: Tensor) -> SummedLoss:
        """The summed loss of whole sequences without gradients, the same on all ranks that share them: for evaluation.

        See :meth:`megalrps.model.transformer.Transformer.loss`; mixed precision is the engine's own.
        """
        own = self._own(inputs_BS)
        output = self._output(own)
        sums = torch.zeros(2, dtype=torch.float64, device=own.device)
        if output is not None:
            with self._precision():
                loss = self._last.loss_of_output(output, self._own(labels_BS), self._own(mask_BS))
            sums = torch.stack((loss.total.double(), loss.tokens.double()))
        self._mesh.context.sum_(sums)
        self._mesh.pipeline.sum_(sums)
        return SummedLoss(sums[0], sums[1].long())

    def modules(self) -> Iterator[nn.Module]:
        """Every module of the rank's stages."""
        for stage in self.stages.values():
            yield from stage.modules()

    def _pass(self, inputs_BS: Tensor, labels_BS: Tensor) -> Tensor:
        loss = self.share_of_loss(self.passes[0](inputs_BS), labels_BS)
        loss.backward()
        return loss

    def _micro_batches(self, inputs_BS: Tensor, labels_BS: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(inputs_BS.split(self.micro_batch_size), labels_BS.split(self.micro_batch_size), strict=True)

    def share_of_loss(self, output: Tensor, labels_BS: Tensor) -> Tensor:
        """A micro-batch's share of the loss of the whole batch: shares add up, whatever was cut."""
        with self._precision():  # the head's products may be the loss's
            return self._last.loss_of_output(output, labels_BS).total / self._divisor

    def _output(self, inputs_BS: Tensor) -> Tensor | None:
        if self._schedule is None:
            return self.passes[0](inputs_BS)
        assert self._exchanged is not None
        shape = (inputs_BS.shape[0], *self._exchanged.shape[1:])
        exchanged = Exchanged(shape, self._exchanged.dtype)
        return forward_only(self._schedule.stage_ranks, self.passes, self._mesh.pipeline, inputs_BS, exchanged)

    def _own(self, of_sequence_BS: Tensor) -> Tensor:
        """This context-parallel rank's part of what there is for every token of a sequence."""
        return of_sequence_BS if self._mesh.context.size == 1 else of_sequence_BS[:, self._positions_S]

    @property
    def _last(self) -> Transformer:
        """The stage with the head."""
        return self.stages[max(self.stages)]

    def _precision(self) -> AbstractContextManager[None]:
        kind = self._positions_S.device.type
        return torch.autocast(kind, dtype=self._autocast or torch.bfloat16, enabled=self._autocast is not None)


class _Stage(nn.Module):
    """A stage as a pipeline calls it: with one argument, in the job's precision, at this rank's positions."""

    def __init__(
        self, stage: Transformer, positions_S: Tensor, precision: Callable[[], AbstractContextManager[None]]
    ) -> None:
        super().__init__()
        self.stage = stage
        self._positions_S = positions_S
        self._precision = precision

    def forward(self, inputs: Tensor) -> Tensor:
        with self._precision():
            output: Tensor = self.stage.output(inputs, self._positions_S)
        return output
