"""A test of the tests: each fault that a cut sequence is known for is made, and the comparison must catch it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from context_job import Case, Found, attended, errors, modelled
from torch import Tensor

from megalrps.model.transformer import Transformer
from megalrps.parallel import context
from megalrps.parallel.group import Group

CASE = Case(cp=2)
CAUGHT = 1e-6


def unsummed(parts: Tensor, group: Group) -> Any:
    """The rank's own part of the gradient, instead of the sum of all ranks'."""
    return mock.Mock(wait=lambda: parts[group.rank])


def aligned_with_the_first_key(query: Tensor, key: Tensor, value: Tensor, *, backend: str) -> Tensor:
    heads = [x.transpose(1, 2) for x in (query, key, value)]
    return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)


def without_positions() -> AbstractContextManager[Any]:
    forward = Transformer.forward
    return mock.patch.object(Transformer, "forward", lambda self, inputs, positions: forward(self, inputs))


def contiguous(length: int, ranks: int, rank: int) -> Tensor:
    return torch.arange(length).chunk(ranks)[rank]


def never_filled_again() -> AbstractContextManager[Any]:
    gathered = context._gathered

    def zeros(key: Tensor, value: Tensor, group: Group, out: Tensor | None = None) -> Tensor:
        return gathered(key, value, group) if out is None else out.zero_()

    return mock.patch.object(context, "_gathered", zeros)


def replaced(name: str, by: Any) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: mock.patch.object(context, name, by)


FAULTS: dict[str, tuple[Callable[[Case], Found], Callable[[], AbstractContextManager[Any]]]] = {
    "gathered runs in the order of ranks": (attended, replaced("_owner", lambda run, ranks: divmod(run, 2))),
    "gradients of keys and values not summed": (attended, replaced("start_sum_stack", unsummed)),
    "mask aligned with the first key": (attended, replaced("attention", aligned_with_the_first_key)),
    "sequence cut into one run a rank": (attended, replaced("sequence_positions", contiguous)),
    "memory not filled again": (attended, never_filled_again),
    "positions not passed": (modelled, without_positions),
    "order of ranks, in a model": (modelled, replaced("_owner", lambda run, ranks: divmod(run, 2))),
    "gradients not summed, in a model": (modelled, replaced("start_sum_stack", unsummed)),
}


def _rank_errs(rank: int, fault: str) -> Found:
    compute, makes = FAULTS[fault]
    with makes():
        return compute(CASE)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_catches(run_ranks, fault: str):
    compute, _ = FAULTS[fault]
    worst = max(errors(run_ranks(CASE.ranks, _rank_errs, fault), compute, CASE).values())
    assert not worst < CAUGHT, f"{fault} passes unseen"
