"""The passes of one rank's part of the model, forwards and backwards, whatever the layout.

With one pipeline stage these are loops over micro-batches; with several, a schedule's steps. Each rank of a
context-parallel group takes its runs of every sequence. What comes out is the same number on every rank.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from megalrps.kernels.documents import Documents
from megalrps.model.transformer import SummedLoss, Transformer
from megalrps.parallel.context import sequence_positions
from megalrps.parallel.main_gradient import ProductQueue
from megalrps.parallel.mesh import Mesh
from megalrps.parallel.pipeline import Exchanged, Pipeline, forward_only
from megalrps.parallel.schedule import Schedule
from megalrps.training.samples import UNCOUNTED, Samples, documents_at


class Engine:
    """The stages that this rank holds, and how a batch goes through all ranks' stages.

    ``stages``: by index, in the order of the forward pass. ``schedule`` is None for a model in one piece.
    ``passes`` are the same stages as a pipeline calls them: with what they take of the stage before, and the documents
    of the micro-batch.
    ``autocast`` is the type of matrix products, None for the parameters' own. ``exchanged`` has the shape of one
    micro-batch of the residual stream between stages, and its type.
    ``reset_attention_mask``: attention is within documents. ``reset_position_ids``: rotary positions count from each
    document's first token. For either, ``tells_documents``, samples and sequences that are evaluated must come with
    their documents.
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
        reset_attention_mask: bool = False,
        reset_position_ids: bool = False,
    ) -> None:
        self.stages = dict(stages)
        self.micro_batch_size = micro_batch_size
        self._mesh = mesh
        self._autocast = autocast
        self._schedule = schedule
        self._exchanged = exchanged
        self._divisor, self._masked = 1.0, False
        self.tells_documents = reset_attention_mask or reset_position_ids
        assert not self.tells_documents or mesh.context.size == 1, "Config.check refuses it"
        positions = sequence_positions(sequence_length, mesh.context.size, mesh.context.rank)
        self._positions_S = torch.as_tensor(positions, device=mesh.tensor.device)
        self.passes: dict[int, nn.Module] = {
            index: _Stage(stage, self._positions_S, self._precision, reset_attention_mask, reset_position_ids)
            for index, stage in stages.items()
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

    def forward_backward(self, samples: Samples, divisor: float) -> Tensor:
        """Add the gradient of the summed token loss / ``divisor`` to the gradients; returns this rank's part of it.

        ``samples`` are this data-parallel rank's. The part is zero on a rank without the last stage; the parts of all
        ranks but tensor-parallel ones add up to the whole.
        """
        self._divisor, self._masked = divisor, samples.counted is not None
        micro_batches = samples.split(self.micro_batch_size)
        if self._pipeline is not None:
            told = [self._told(each.documents) for each in micro_batches]
            losses = self._pipeline.step(self._own(samples.inputs), self._own(samples.labels), told)
        else:
            losses = [self._pass(each) for each in micro_batches]
        total = torch.zeros((), dtype=torch.float32, device=self._positions_S.device)
        for loss in losses:
            total += loss.detach()
        return total

    def loss(
        self, inputs_BS: Tensor, labels_BS: Tensor, mask_BS: Tensor, starts_BS: Tensor | None = None
    ) -> SummedLoss:
        """The summed loss of whole sequences without gradients, the same on all ranks that share them: for evaluation.

        See :meth:`megalrps.model.transformer.Transformer.loss`; mixed precision is the engine's own, and so is what is
        made of the documents, which ``starts_BS`` gives as in a :class:`megalrps.training.step.Batch`.
        """
        own = self._own(inputs_BS)
        output = self._output(own, self._told(None if starts_BS is None else documents_at(starts_BS)))
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

    def _pass(self, micro_batch: Samples) -> Tensor:
        inputs_BS, documents = self._own(micro_batch.inputs), self._told(micro_batch.documents)
        # No name for the output: it would hold the logits throughout the backward pass.
        loss = self.share_of_loss(self.passes[0](inputs_BS, documents), self._own(micro_batch.labels))
        loss.backward()
        return loss

    def share_of_loss(self, output: Tensor, labels_BS: Tensor) -> Tensor:
        """A micro-batch's share of the loss of the whole batch: shares add up, whatever was cut."""
        mask_BS = None
        if self._masked:  # it comes with the labels, which is all that a pipeline's engine hands to a loss
            mask_BS, labels_BS = labels_BS != UNCOUNTED, labels_BS.clamp_min(0)
        with self._precision():  # the head's products may be the loss's
            return self._last.loss_of_output(output, labels_BS, mask_BS).total / self._divisor

    def _told(self, documents: Documents | None) -> Documents | None:
        """What the stages are told of a micro-batch's documents: nothing where neither mask nor positions are reset."""
        if not self.tells_documents:
            return None
        assert documents is not None, "the samples came without their documents: training would cross them unseen"
        return documents

    def _output(self, inputs_BS: Tensor, documents: Documents | None) -> Tensor | None:
        stages = {index: partial(stage, documents=documents) for index, stage in self.passes.items()}
        if self._schedule is None:
            return stages[0](inputs_BS)
        assert self._exchanged is not None
        shape = (inputs_BS.shape[0], *self._exchanged.shape[1:])
        exchanged = Exchanged(shape, self._exchanged.dtype)
        return forward_only(self._schedule.stage_ranks, stages, self._mesh.pipeline, inputs_BS, exchanged)

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
    """A stage as a pipeline calls it: in the job's precision, at this rank's positions or those in the documents."""

    def __init__(
        self,
        stage: Transformer,
        positions_S: Tensor,
        precision: Callable[[], AbstractContextManager[None]],
        reset_attention_mask: bool,
        reset_position_ids: bool,
    ) -> None:
        super().__init__()
        self.stage = stage
        self._positions_S = positions_S
        self._precision = precision
        self._reset_attention_mask = reset_attention_mask
        self._reset_position_ids = reset_position_ids

    def forward(self, inputs: Tensor, documents: Documents | None = None) -> Tensor:
        positions, within = self._positions_S, None
        if documents is not None:
            # An object of this pass alone: what is derived from it, a mask on a CPU, is given up with its activations.
            of_pass = replace(documents)
            positions = of_pass.positions if self._reset_position_ids else positions
            within = of_pass if self._reset_attention_mask else None
        with self._precision():
            output: Tensor = self.stage.output(inputs, positions, within)
        return output
