"""Tensor and sequence parallel training equals one process, tensor by tensor, in float64."""

from functools import cache

import numpy as np
import pytest
from tensor_job import CLIP, Case, Found, case_name, errors, trained

TOLERANCE = 1e-12
CASES = (
    Case(tp=2),
    Case(tp=2, sequence_parallel=True, passes=2),
    Case(tp=4, groups=4, sequence_parallel=True, adamw=False),
    Case(tp=4, groups=2, sequence_parallel=True),
    Case(tp=4, groups=2, adamw=False),
    Case(tp=4, groups=1, tied=True, sequence_parallel=True, adamw=False),
    Case(tp=4, groups=1, tied=True),
    Case(tp=2, groups=1, tied=True, adamw=False),
    Case(tp=2, dp=2, sequence_parallel=True, passes=2),
    Case(tp=2, dp=2, groups=1, tied=True, adamw=False),
    Case(tp=4, dp=2, groups=2, sequence_parallel=True, adamw=False),
    Case(dp=4, adamw=False),
)


@cache
def expected(case: Case) -> Found:
    return trained(case.alone)


def _rank_trains(rank: int, case: Case) -> Found:
    return trained(case)


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_losses_gradients_and_parameters_are_those_of_one_process(run_ranks, case: Case):
    by_rank = run_ranks(case.ranks, _rank_trains, case)
    wanted = expected(case)
    assert np.all(wanted["norms"] > CLIP), "the threshold must clip, or the test says nothing about clipping"
    for rank, found in enumerate(by_rank):
        wrong = {name: error for name, error in errors(found, wanted).items() if not error <= tolerance(name)}
        assert not wrong, f"rank {rank}: {wrong}"
    for found in by_rank[1:]:
        assert all(np.array_equal(by_rank[0][name], found[name]) for name in found), "the ranks have drifted apart"


def tolerance(name: str) -> float:
    return 1e-6 if name == "loss" else TOLERANCE  # the loss that is told is fp32
