"""Documents and labels that do not count, at any layout: the single process's updates, tensor by tensor, in float64.

Every micro-batch has other documents and another count of labels, the last sample none that counts; ranks that share
out a batch hold unequal counts.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from layout_job import CLIP, Case, case_name, errors, expected, rank_trains, trained, trained_together
from rank_pieces import Pieces, together

from megalrps.model.activation_options import ActivationOptions
from megalrps.parallel import pipeline
from megalrps.parallel.group import Group
from megalrps.training import engine
from megalrps.training.samples import Samples

TOLERANCE = 1e-12
FULL = ActivationOptions(recompute_granularity="full", recompute_method="block", recompute_num_layers=1)
CORE = ActivationOptions(recompute_granularity="selective")
LINEAR = ActivationOptions(cross_entropy_fusion_impl="linear", loss_chunk_tokens=11)
TOLD = Case(documents=("attention", "positions"), counted=True, updates=3, adamw=False)
CROSSED = replace(TOLD, documents=("positions",))

CASES = (
    replace(TOLD, micro_batch=1),
    replace(TOLD, tp=2),
    replace(TOLD, tp=2, sequence_parallel=True, activations=CORE),
    replace(TOLD, dp=2, micro_batch=2, sharding="optim_grads", activations=FULL),
    replace(TOLD, dp=2, micro_batch=1, deterministic=True, adamw=True),
    replace(TOLD, tp=2, dp=2, sequence_parallel=True, activations=LINEAR, micro_batch=2),
    replace(TOLD, pp=2),
    replace(CROSSED, pp=2, tp=2),
    replace(TOLD, pp=2, dp=2, schedule="interleaved", layers=4, tied=True, micro_batch=1),
    replace(TOLD, pp=2, schedule="dualpipev", layers=4, activations=FULL),
    replace(TOLD, pp=2, tp=2, schedule="zbv", layers=4, sequence_parallel=True),
    replace(TOLD, cp=2, dp=2, documents=()),
)


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_losses_gradients_and_parameters_are_those_of_one_process(run_ranks, case: Case):
    wanted = expected(case)
    assert np.all(wanted["norms"] > CLIP)
    assert ("evaluated" in wanted) == bool(case.documents)
    found = trained_together(run_ranks, case, rank_trains)
    wrong = {name: error for name, error in errors(found, wanted).items() if not error <= tolerance(name)}
    assert not wrong


def tolerance(name: str) -> float:
    return 1e-6 if name == "loss" else TOLERANCE  # the loss that is told is fp32


def documents_of_the_micro_batch_before() -> AbstractContextManager[Any]:
    met = pipeline._met
    return mock.patch.object(pipeline, "_met", lambda *args: (order := met(*args))[1:] + order[:1])


def labels_of_the_own_share_counted() -> AbstractContextManager[Any]:
    total = Group.sum_

    def own(self: Group, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.dtype == torch.int64 else total(self, tensor)

    return mock.patch.object(Group, "sum_", own)


def mask_lost_between_stages() -> AbstractContextManager[Any]:
    return mock.patch.object(Samples, "labels", property(lambda self: self.tokens[:, 1:]))


def positions_of_the_window() -> AbstractContextManager[Any]:
    stage = engine._Stage.__init__

    def made(self: Any, inner: Any, positions: Any, precision: Any, attention: bool, positions_too: bool) -> None:
        stage(self, inner, positions, precision, attention, False)

    return mock.patch.object(engine._Stage, "__init__", made)


FAULTS: dict[str, tuple[Case, Callable[[], AbstractContextManager[Any]]]] = {
    "documents of another micro-batch": (replace(TOLD, pp=2), documents_of_the_micro_batch_before),
    "labels counted by each rank for itself": (replace(TOLD, dp=2), labels_of_the_own_share_counted),
    "every label counts": (TOLD, mask_lost_between_stages),
    "positions go on": (CROSSED, positions_of_the_window),
}


def _rank_errs(rank: int, fault: str) -> Pieces:
    case, makes = FAULTS[fault]
    with makes():
        return trained(case)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_catches(run_ranks, fault: str):
    case, _ = FAULTS[fault]
    by_rank = run_ranks(case.ranks, _rank_errs, fault) if case.ranks > 1 else [_rank_errs(0, fault)]
    assert max(errors(together(by_rank), expected(case)).values()) > 1e-6, f"{fault} passes unseen"
