"""Every layout makes the single process's updates, tensor by tensor.

In float64 and with a threshold that clips: in fp32 AdamW hides most faults of parallel code. Layouts are data; each is
compared with the same model, batch and updates on one process in one pass.
"""

from dataclasses import replace

import numpy as np
import pytest
from layout_job import CLIP, Case, case_name, errors, expected, rank_trains, trained_together

from megalrps.model.activation_options import ActivationOptions

TOLERANCE = 1e-12

TENSOR = (
    Case(tp=2),
    Case(tp=2, sequence_parallel=True, adamw=False),
    Case(tp=2, groups=4, sequence_parallel=True),
    Case(tp=4, groups=2, sequence_parallel=True),
    Case(tp=4, groups=2, adamw=False),
    Case(tp=4, groups=1, tied=True, sequence_parallel=True, adamw=False),
    Case(tp=4, groups=1, tied=True),
    Case(tp=2, dp=2, sequence_parallel=True, micro_batch=2),
    Case(tp=2, dp=2, groups=1, tied=True, adamw=False),
)
DATA = (
    Case(dp=2, micro_batch=1),
    Case(dp=4, adamw=False, sharding="no_shard"),
    Case(dp=4, bucket=1000, sharding="optim"),
    Case(dp=4, bucket=1000, micro_batch=1, sharding="optim_grads", adamw=False),
    Case(dp=8, overlap=False, adamw=False),
)
PIPELINE = (
    Case(pp=2, schedule="gpipe"),
    Case(pp=2, layers=3, tied=True, adamw=False),
    Case(pp=4, layers=4),
    Case(pp=4, layers=6, stated="E|t*2|t*3|tL", adamw=False, micro_batch=2),
    Case(pp=2, schedule="interleaved", layers=4),
    Case(pp=2, schedule="interleaved", virtual=3, layers=7, tied=True, adamw=False),
    Case(pp=2, schedule="zbv", layers=4, adamw=False),
    Case(pp=2, schedule="zbv", layers=5, tied=True),
    Case(pp=2, schedule="dualpipev", layers=4, adamw=False),
    Case(pp=4, schedule="dualpipev", layers=8),
)
CONTEXT = (
    Case(cp=2),
    Case(cp=4, groups=1, adamw=False),
    Case(cp=2, tp=2, sequence_parallel=True, tied=True),
    Case(cp=2, dp=2, sharding="optim_grads", micro_batch=2, adamw=False),
)
PRODUCTS = (
    Case(tp=2, pp=2, dp=2, sequence_parallel=True),
    Case(tp=2, pp=2, sequence_parallel=True, schedule="interleaved", layers=4, tied=True, micro_batch=2, adamw=False),
    Case(tp=2, pp=2, dp=2, sequence_parallel=True, schedule="dualpipev", layers=4, tied=True, micro_batch=1),
    Case(tp=2, pp=2, cp=2, layers=2, tied=True),
    Case(pp=2, cp=2, dp=2, schedule="zbv", layers=4, sharding="optim_grads", bucket=1000),
    Case(tp=2, cp=2, dp=2, sequence_parallel=True, groups=1, adamw=False),
    Case(
        tp=2,
        pp=2,
        dp=2,
        sequence_parallel=True,
        schedule="zbv",
        layers=5,
        groups=1,
        adamw=False,
        sharding="optim_grads",
        activations=ActivationOptions(recompute_granularity="full", recompute_method="block", recompute_num_layers=1),
    ),
)
FEWER = 3
"""Updates of all cases but the first of each kind: what a first update leaves behind (moments, weights that were
gathered, deferred products) is in the gradients and the norm of the second and in the parameters of the third.
"""
CASES = tuple(
    case if place == 0 else replace(case, updates=FEWER)
    for kind in (TENSOR, DATA, PIPELINE, CONTEXT, PRODUCTS)
    for place, case in enumerate(kind)
)


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_losses_gradients_and_parameters_are_those_of_one_process(run_ranks, case: Case):
    wanted = expected(case)
    assert np.all(wanted["norms"] > CLIP), "the threshold must clip, or the test says nothing about clipping"
    found = trained_together(run_ranks, case, rank_trains)
    wrong = {name: error for name, error in errors(found, wanted).items() if not error <= tolerance(name)}
    assert not wrong


def tolerance(name: str) -> float:
    return 1e-6 if name == "loss" else TOLERANCE  # the loss that is told is fp32


def test_where_the_sums_are_the_same_the_bits_are(run_ranks):
    """What only moves the optimizer's state, or the moment of an exchange, changes no sum but that of the norm."""
    case = Case(dp=2, bucket=1000, micro_batch=2, clip=0.0)
    whole = trained_together(run_ranks, case, rank_trains)
    for other in (replace(case, sharding="no_shard"), replace(case, overlap=False), replace(case, bucket=1)):
        found = trained_together(run_ranks, other, rank_trains)
        assert [name for name, value in whole.items() if not np.array_equal(value, found[name])] in ([], ["norms"])
