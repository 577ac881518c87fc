"""A test of the tests: each fault that parallel code is known for is made, and the comparison must catch it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from tensor_job import Case, Found, errors, trained

from megalrps.model.tensor_layers import TensorLayers
from megalrps.parallel import tensor
from megalrps.parallel.buffers import BufferGroup, FlatBuffers
from megalrps.training.state import TrainState
from megalrps.training.step import Batch

SEQUENCE = Case(tp=2, sequence_parallel=True, adamw=False, updates=3)
PLAIN = replace(SEQUENCE, sequence_parallel=False)
GROUPED = replace(PLAIN, groups=1)
DATA = replace(PLAIN, dp=2)
CAUGHT = 1e-6


def with_groups(change: Callable[[BufferGroup], BufferGroup]) -> AbstractContextManager[Any]:
    """Every set of buffers made meanwhile has its groups changed."""
    make = FlatBuffers.__init__

    def made(self: FlatBuffers, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.groups = tuple(change(group) for group in self.groups)

    return mock.patch.object(FlatBuffers, "__init__", made)


def unsummed(group: BufferGroup) -> BufferGroup:
    return replace(group, sums=False)


def counted_by_every_holder(group: BufferGroup) -> BufferGroup:
    return replace(group, holders=None)


def summed_though_whole(group: BufferGroup) -> BufferGroup:
    return replace(group, sums=True)


def share_instead_of_global_mean() -> AbstractContextManager[Any]:
    make = Batch.__init__

    def made(self: Batch, tokens: Any, global_tokens: int) -> None:
        make(self, tokens, tokens.shape[0] * (tokens.shape[1] - 1))

    return mock.patch.object(Batch, "__init__", made)


def norm_of_own_part() -> AbstractContextManager[Any]:
    def norm(self: FlatBuffers) -> torch.Tensor:
        return torch.linalg.vector_norm(torch.stack([group.gradients.norm() for group in self.groups]))

    return mock.patch.object(FlatBuffers, "gradient_norm", norm)


def scaled(method: str, factor: float) -> AbstractContextManager[Any]:
    original = FlatBuffers.scale_gradients
    return mock.patch.object(
        FlatBuffers,
        method,
        lambda self, coefficient: original(self, torch.ones_like(coefficient) * factor * coefficient),
    )


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


def stale_element(state: TrainState, step: int) -> None:
    """One element of what is sent differs from what is held, on one rank."""
    if step == 1 and state.buffers.groups[0].holders is None and torch.distributed.get_rank() == 1:
        state.buffers.groups[0].parameters[5] += 1e-3


FAULTS: dict[str, tuple[Case, Callable[[], AbstractContextManager[Any]]]] = {
    "gradients of norms not summed": (SEQUENCE, lambda: with_groups(unsummed)),
    "gradients of shared heads not summed": (GROUPED, lambda: with_groups(unsummed)),
    "whole gradients summed": (PLAIN, lambda: with_groups(summed_though_whole)),
    "shared parameters counted by every holder": (PLAIN, lambda: with_groups(counted_by_every_holder)),
    "norm of the rank's own part": (PLAIN, norm_of_own_part),
    "sum instead of mean": (DATA, share_instead_of_global_mean),
    "clipping by nine tenths": (DATA, lambda: scaled("scale_gradients", 0.9)),
    "no clipping": (PLAIN, lambda: mock.patch.object(FlatBuffers, "scale_gradients", lambda self, factor: None)),
    "gradients not summed over data": (
        DATA,
        lambda: mock.patch.object(FlatBuffers, "sum_gradients", lambda self, data: None),
    ),
    "input gradient not exchanged": (
        PLAIN,
        lambda: mock.patch.object(tensor, "_start_exchange", lambda part, ranks: _NotExchanged(part)),
    ),
    "labels of another slice": (PLAIN, labels_of_rank_0),
    "stale element": (DATA, nullcontext),
}


@cache
def expected(case: Case) -> Found:
    return trained(case.alone)


def _rank_errs(rank: int, fault: str) -> Found:
    case, makes = FAULTS[fault]
    with makes():
        return trained(case, stale_element if fault == "stale element" else None)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_catches(run_ranks, fault: str):
    case, _ = FAULTS[fault]
    by_rank = run_ranks(case.ranks, _rank_errs, fault)
    worst = max(error for found in by_rank for error in errors(found, expected(case)).values())
    assert not worst < CAUGHT, f"{fault} passes unseen"
