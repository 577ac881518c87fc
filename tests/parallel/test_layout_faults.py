"""A test of the tests: each fault that parallel code is known for is made, and the comparison must catch it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from layout_job import Case, errors, expected, trained
from rank_pieces import Pieces, together

from megalrps.model.tensor_layers import TensorLayers
from megalrps.parallel import gradient_sums, tensor
from megalrps.parallel.bucket import Bucket
from megalrps.parallel.buffers import FlatBuffers
from megalrps.parallel.group import Group
from megalrps.parallel.main_gradient import ProductQueue
from megalrps.parallel.parameter_gathers import ParameterGathers
from megalrps.training import engine
from megalrps.training.engine import Engine
from megalrps.training.optimizer import Optimizer
from megalrps.training.state import TrainState
from megalrps.training.step import Batch

SEQUENCE = Case(tp=2, sequence_parallel=True, adamw=False, updates=3)
PLAIN = replace(SEQUENCE, sequence_parallel=False)
GROUPED = replace(PLAIN, groups=1)
DATA = Case(dp=2, adamw=False, updates=3)
PIPELINE = Case(pp=2, adamw=False, updates=3)
TIED = replace(PIPELINE, tied=True)
ZERO_BUBBLE = Case(pp=2, schedule="zbv", layers=4, adamw=False, updates=3)
CONTEXT = Case(cp=2, adamw=False, updates=3)
CAUGHT = 1e-6

Fault = AbstractContextManager[Any]


def buckets_with(**changes: Any) -> Fault:
    """Every set of buffers made meanwhile takes its buckets for others."""
    make = FlatBuffers.__init__

    def made(self: FlatBuffers, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        for bucket in self.buckets:
            for name, value in changes.items():
                object.__setattr__(bucket, name, value)

    return mock.patch.object(FlatBuffers, "__init__", made)


def share_instead_of_global_mean() -> Fault:
    make = Batch.__init__

    def made(self: Batch, tokens: Any, global_tokens: int) -> None:
        make(self, tokens, tokens.shape[0] * (tokens.shape[1] - 1))

    return mock.patch.object(Batch, "__init__", made)


def norm_of_own_part() -> Fault:
    def norm(self: FlatBuffers) -> torch.Tensor:
        return torch.linalg.vector_norm(torch.stack([bucket.gradient_shard.norm() for bucket in self.buckets]))

    return mock.patch.object(FlatBuffers, "gradient_norm", norm)


def update_with(change: Callable[[torch.Tensor], torch.Tensor]) -> Fault:
    """The factor on the gradients is another one."""
    step = Optimizer.step

    def stepped(self: Optimizer, learning_rate: float) -> torch.Tensor:
        update = self.update
        with mock.patch.object(self, "update", lambda rate, factor: update(rate, change(factor))):
            return step(self, learning_rate)

    return mock.patch.object(Optimizer, "step", stepped)


class _NotExchanged:
    def __init__(self, part: torch.Tensor) -> None:
        self.wait = lambda: part


@contextmanager
def labels_of_rank_0() -> Iterator[None]:
    """Every rank takes its slice of the vocabulary for the first one."""
    original = TensorLayers.cross_entropy

    def wrong(self: TensorLayers, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return original(self, logits, labels + self.ranks.group.rank * logits.shape[1])

    with mock.patch.object(TensorLayers, "cross_entropy", wrong):
        yield


def one_micro_batch_without_weights() -> Fault:
    """The products that one call of the queue hands out are lost."""
    take, calls = ProductQueue.take, []

    def taken(self: ProductQueue) -> Callable[[], None]:
        calls.append(self)
        products = take(self)
        return (lambda: None) if len(calls) == 3 else products

    return mock.patch.object(ProductQueue, "take", taken)


def loss_of_one_micro_batch_left_out() -> Fault:
    share, calls = Engine.share_of_loss, []

    def shared(self: Engine, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls.append(self)
        return share(self, logits, labels) * (0.0 if len(calls) == 2 else 1.0)

    return mock.patch.object(Engine, "share_of_loss", shared)


def positions_of_rank_0() -> Fault:
    original = engine.sequence_positions
    return mock.patch.object(engine, "sequence_positions", lambda length, ranks, rank: original(length, ranks, 0))


def stale_element(state: TrainState, step: int) -> None:
    """One element of what is computed with differs from what was sent, on one rank."""
    if step == 1 and dist.get_rank() == 1:
        state.buffers.wait_parameters()
        state.buffers.buckets[0].parameters[5] += 1e-3


def own_gradients_alone() -> Fault:
    """What replicas computed is not added up: each keeps its own part of its own gradients."""

    def own(flat: torch.Tensor, group: Group) -> _NotExchanged:
        return _NotExchanged(flat.view(group.size, -1)[group.rank])

    return mock.patch.object(gradient_sums, "start_sum_own_", own)


FAULTS: dict[str, tuple[Case, Callable[[], Fault]]] = {
    "gradients of norms not summed": (SEQUENCE, lambda: buckets_with(sums=False)),
    "gradients of shared heads not summed": (GROUPED, lambda: buckets_with(sums=False)),
    "whole gradients summed": (PLAIN, lambda: buckets_with(sums=True)),
    "shared parameters counted by every holder": (
        PLAIN,
        lambda: mock.patch.object(Bucket, "times_held", property(lambda self: 1)),
    ),
    "norm of the rank's own part": (PLAIN, norm_of_own_part),
    "norm of the rank's own stage": (PIPELINE, norm_of_own_part),
    "norm of the rank's own shard": (DATA, norm_of_own_part),
    "sum instead of mean": (DATA, share_instead_of_global_mean),
    "gradients halved": (DATA, lambda: update_with(lambda factor: factor / 2)),
    "clipping by nine tenths": (DATA, lambda: update_with(lambda factor: factor * 0.9)),
    "no clipping": (PLAIN, lambda: update_with(torch.ones_like)),
    "gradients not summed over data": (DATA, own_gradients_alone),
    "gradients not summed over context": (CONTEXT, own_gradients_alone),
    "shards not gathered": (DATA, lambda: mock.patch.object(ParameterGathers, "start", lambda self: None)),
    "input gradient not exchanged": (
        PLAIN,
        lambda: mock.patch.object(tensor, "_start_exchange", lambda part, ranks: _NotExchanged(part)),
    ),
    "labels of another slice": (PLAIN, labels_of_rank_0),
    "positions of another rank": (CONTEXT, positions_of_rank_0),
    "stale element": (replace(DATA, sharding="no_shard"), nullcontext),
    "tied embedding not summed over the ends": (TIED, lambda: buckets_with(ends=None)),
    "tied embedding counted twice": (
        TIED,
        lambda: mock.patch.object(Bucket, "times_held", property(lambda self: 1)),
    ),
    "weight products lost": (ZERO_BUBBLE, one_micro_batch_without_weights),
    "loss of a micro-batch left out": (PIPELINE, loss_of_one_micro_batch_left_out),
}


def _rank_errs(rank: int, fault: str) -> Pieces:
    case, makes = FAULTS[fault]
    with makes():
        return trained(case, stale_element if fault == "stale element" else None)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_catches(run_ranks, fault: str):
    case, _ = FAULTS[fault]
    by_rank = run_ranks(case.ranks, _rank_errs, fault)
    try:
        worst = max(errors(together(by_rank), expected(case)).values())
    except AssertionError as error:
        assert "drifted apart" in str(error)
        return
    assert not worst < CAUGHT, f"{fault} passes unseen"
