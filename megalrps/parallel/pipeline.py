"""Running a pipeline schedule over the stages that one rank holds: torch.distributed.pipelining is the engine.

What is handed to it is decided here, for reasons that were measured:

* The shape and type of what stages exchange is stated. Left to find out, the engine runs a forward and a backward pass
  on uninitialised memory before the first step, which adds to the gradients whatever it likes.
* It never scales gradients: each micro-batch's loss is already its share of the global mean.
* Where a schedule computes weight gradients later than input gradients (zero bubble: Qi et al. 2023, arXiv 2401.10241),
  it is not left to split autograd's graph, which knows neither hooks nor functions that accumulate by themselves and
  runs every exchange of a tensor-parallel map twice. The maps put their products aside in a queue, and the engine takes
  them from there.
* What a stage is told of a micro-batch beside its input is not given to the engine. It would take tensors by name and
  cut them, and then count them among the inputs whose gradients go to the stage before, differently in each version.
  Each stage meets its micro-batches in the order of the schedule, so it finds what belongs to each by counting.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalrps.parallel.group import Group
from megalrps.parallel.main_gradient import ProductQueue
from megalrps.parallel.schedule import SCHEDULES, Schedule

LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Exchanged:
    """The tensor that goes from stage to stage for one micro-batch (its gradient, which comes back, is alike)."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def example(self) -> Tensor:
        """One of its kind, without memory."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta", requires_grad=True)


class Pipeline:
    """The stages of this rank, under one schedule.

    ``stages`` are those that the schedule places on this rank of ``group``, by index; the first takes tokens
    [B, S], every other one what ``exchanged`` describes, and the last gives what ``loss`` takes with the labels. What
    :meth:`step` is to tell them of a micro-batch they take besides. Every rank of the group makes its own, and all call
    :meth:`step` together.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Mapping[int, nn.Module],
        group: Group,
        *,
        tokens: tuple[int, ...],
        exchanged: Exchanged,
        loss: LossFunction,
        queue: ProductQueue,
    ) -> None:
        """``tokens`` is the shape [B, S] of one micro-batch of inputs on this rank."""
        assert sorted(stages) == [stage for stage, rank in enumerate(schedule.stage_ranks) if rank == group.rank]
        self.schedule = schedule
        self._group = group
        self._holds_first, self._holds_last = 0 in stages, schedule.stages - 1 in stages
        queue.deferring = SCHEDULES[schedule.name].splits_backward
        take = queue.take if queue.deferring else None
        first = torch.empty(tokens, dtype=torch.int64, device="meta")
        self._stages = {index: _ToldStage(stages[index], _met(schedule, group.rank, index)) for index in sorted(stages)}
        built = [
            _stage(module, index, schedule, group, first if index == 0 else exchanged.example(), exchanged, take)
            for index, module in self._stages.items()
        ]
        self._engine = _engine(schedule, built, loss)

    def step(self, tokens_BS: Tensor, labels_BS: Tensor, told: Sequence[Any]) -> list[Tensor]:
        """The passes of all micro-batches, forwards and backwards; gradients are added where the parameters keep them.

        Both are all of this rank's samples [B, S], which are cut into the schedule's micro-batches. ``told``, one for
        each of those, is the second argument of every stage's pass of it. Returns the losses of the micro-batches on
        the rank of the last stage, and nothing elsewhere.
        """
        assert len(told) == self.schedule.micro_batches
        for stage in self._stages.values():
            stage.tell(told)
        losses: list[Tensor] = []
        inputs = (tokens_BS,) if self._holds_first else ()
        target = labels_BS if self._holds_last else None
        self._engine.step(*inputs, target=target, losses=losses if self._holds_last else None, return_outputs=False)
        return losses


class _ToldStage(nn.Module):
    """A stage as the engine calls it: with its input alone. ``order``: the micro-batches in which it does so."""

    def __init__(self, stage: nn.Module, order: Sequence[int]) -> None:
        super().__init__()
        self.stage = stage
        self._order = order
        self._told: Iterator[Any] = iter(())

    def tell(self, told: Sequence[Any]) -> None:
        """What the passes of the next step are told, by micro-batch."""
        self._told = iter([told[number] for number in self._order])

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.stage(inputs, next(self._told))
        return output


def _met(schedule: Schedule, rank: int, stage: int) -> list[int]:
    """The micro-batches of the forward passes of ``stage``, in their order."""
    return [each.micro_batch for each in schedule.orders[rank] if (each.kind, each.stage) == ("F", stage)]


def forward_only(
    schedule_ranks: tuple[int, ...],
    stages: Mapping[int, Callable[[Tensor], Tensor]],
    group: Group,
    tokens_BS: Tensor,
    exchanged: Exchanged,
) -> Tensor | None:
    """The output of the last stage for one batch of any size, on its rank; None elsewhere. For evaluation.

    ``schedule_ranks``: the rank of ``group`` that holds each stage. Batches overlap where a rank can go on with the
    next one, which with one stage a rank is all that a pipeline can do.
    """
    hidden = tokens_BS
    for index, rank in enumerate(schedule_ranks):
        if rank != group.rank:
            continue
        if index > 0 and schedule_ranks[index - 1] != rank:
            hidden = torch.empty(exchanged.shape, dtype=exchanged.dtype, device=group.device)
            dist.recv(hidden, group=group.group, group_src=schedule_ranks[index - 1])
        hidden = stages[index](hidden)
        if index + 1 < len(schedule_ranks) and schedule_ranks[index + 1] != rank:
            dist.send(hidden.contiguous(), group=group.group, group_dst=schedule_ranks[index + 1])
    return hidden if schedule_ranks[-1] == group.rank else None


def _stage(
    module: nn.Module,
    index: int,
    schedule: Schedule,
    group: Group,
    inputs: Tensor,
    exchanged: Exchanged,
    take: Callable[[], Callable[[], None]] | None,
) -> Any:
    from torch.distributed.pipelining import PipelineStage  # it costs a second to import, and most jobs have one stage

    return PipelineStage(
        module,
        index,
        schedule.stages,
        group.device,
        input_args=inputs,
        output_args=exchanged.example(),
        group=group.group,
        dw_builder=take,
    )


def _engine(schedule: Schedule, stages: list[Any], loss: LossFunction) -> Any:
    from torch.distributed import pipelining

    kinds = {
        "gpipe": pipelining.ScheduleGPipe,
        "1f1b": pipelining.Schedule1F1B,
        "interleaved": pipelining.ScheduleInterleaved1F1B,
        "zbv": pipelining.ScheduleZBVZeroBubble,
        "dualpipev": pipelining.ScheduleDualPipeV,
    }
    make = partial(kinds[schedule.name], n_microbatches=schedule.micro_batches, loss_fn=loss, scale_grads=False)
    return make(stages[0]) if schedule.name in ("gpipe", "1f1b") else make(stages)
