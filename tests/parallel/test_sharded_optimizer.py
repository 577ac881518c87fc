"""Replicas that share out the optimizer, and gradients too, make the updates of one process."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from shard_job import CLIP, Case, Found, Job, Pieces, case_name, errors, trained, trained_together

from megalrps.parallel.buffers import Sharding
from megalrps.training.options import LossScaleOptions

TOLERANCE = 1e-12
SHARDINGS: tuple[Sharding, ...] = ("no_shard", "optim", "optim_grads")

CASES = (
    *(Case(dp=2, passes=3, sharding=sharding) for sharding in SHARDINGS),
    *(Case(dp=3, adamw=False, passes=2, tied=True, bucket=1500, sharding=sharding) for sharding in SHARDINGS),
    *(Case(dp=4, adamw=False, bucket=1, sharding=sharding) for sharding in SHARDINGS),
    Case(dp=4, passes=3, bucket=3000, overlap=False, sharding="optim_grads"),
    *(Case(tp=2, dp=2, passes=2, bucket=900, groups=1, tied=True, sharding=sharding) for sharding in SHARDINGS),
    *(Case(tp=2, dp=2, sequence_parallel=True, adamw=False, passes=3, sharding=sharding) for sharding in SHARDINGS),
    Case(tp=4, dp=2, groups=2, sequence_parallel=True, adamw=False, bucket=500, sharding="optim_grads"),
)


@cache
def expected(case: Case) -> Found:
    return trained_together(lambda *_: [], case, _rank_trains)


def _rank_trains(rank: int, case: Case) -> Pieces:
    return trained(case)


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_gradients_norms_and_state_are_those_of_one_process(run_ranks, case: Case):
    wanted = expected(case.alone)
    assert np.all(wanted["norms"] > CLIP), "the threshold must clip, or the test says nothing about clipping"
    found = trained_together(run_ranks, case, _rank_trains)
    assert not {name: error for name, error in errors(found, wanted).items() if not error <= TOLERANCE}


def test_where_the_sums_are_the_same_the_bits_are(run_ranks):
    """Two summands have one sum: what moves state, or the moment of an exchange, changes no bit of an update.

    The norm adds squares up by shards; so nothing is clipped here.
    """
    case = Case(dp=2, passes=3, bucket=1500, clip=0.0)
    found = trained_together(run_ranks, case, _rank_trains)
    for other in (replace(case, overlap=False), replace(case, bucket=1), replace(case, sharding="no_shard")):
        compared = trained_together(run_ranks, other, _rank_trains)
        differing = [name for name, value in compared.items() if not np.array_equal(value, found[name])]
        assert differing in ([], ["norms"])
        assert max(errors(found, compared).values()) < 1e-14


SCALING = LossScaleOptions(initial_loss_scale=1024.0, loss_scale_window=2, hysteresis=2)


def _rank_overflows(rank: int, sharding: Sharding) -> list[tuple[float, bool, float, int]]:
    """Scale, whether the norm was a number, the sum of the masters and the count after each of six updates."""
    job = Job(Case(dp=2, sharding=sharding, scaling=SCALING, bucket=1500))
    told = []
    for step in range(6):
        job.gradients(step)
        if rank == 1 and step in (1, 2):
            job.buffers.buckets[-1].gradient_shard[-1] = float("inf") if step == 1 else float("nan")
        if sharding == "no_shard" and step in (1, 2):  # every replica would hold the sum
            job.buffers.buckets[-1].gradient_shard[-1] = float("inf")
        norm = job.optimizer.step(1e-3)
        masters = torch.stack([bucket.master.sum() for bucket in job.buffers.buckets]).sum().item()
        assert job.optimizer.loss_scale is not None
        told.append((job.optimizer.loss_scale, bool(norm.isfinite()), masters, int(job.optimizer.updates)))
    return told


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_an_overflow_on_one_rank_skips_the_update_on_all(run_ranks, sharding: Sharding):
    for told in run_ranks(2, _rank_overflows, sharding):
        scales, finite, masters, updates = zip(*told, strict=True)
        assert scales == (
            1024,
            1024,
            512,
            512,
            1024,
            1024,
        )  # the second overflow in a row halves, two good updates double
        assert finite == (True, False, False, True, True, True)
        assert updates == (1, 1, 1, 2, 3, 4)
        assert masters[0] == masters[1] == masters[2] != masters[3]


def _rank_scales(rank: int, scaling: LossScaleOptions | None) -> Pieces:
    return trained(Case(dp=2, adamw=False, scaling=scaling, passes=2))


def test_the_scale_is_taken_out_again(run_ranks):
    plain = run_ranks(2, _rank_scales, None)[0]
    scaled = run_ranks(2, _rank_scales, LossScaleOptions(loss_scale=64.0))[0]
    found = {name: part for name, _, _, part in scaled if name.startswith(("model.", "norms", "loss"))}
    for name, _, _, part in plain:
        if name in found:
            np.testing.assert_allclose(found[name], part, rtol=1e-12, atol=1e-13)


def _rank_breaks(rank: int, _: None) -> tuple[bool, bool]:
    job = Job(Case(dp=2))
    before = [bucket.parameters.clone() for bucket in job.buffers.buckets]
    job.gradients(0)
    if rank == 0:
        job.buffers.buckets[0].gradient_shard[0] = float("nan")
    norm = job.optimizer.step(1e-3)
    same = all(torch.equal(old, bucket.parameters) for old, bucket in zip(before, job.buffers.buckets, strict=True))
    return bool(norm.isnan()), same and int(job.optimizer.updates) == 0


def test_gradients_that_are_no_numbers_are_told_on_all_ranks_and_update_nothing(run_ranks):
    assert run_ranks(2, _rank_breaks, None) == [(True, True)] * 2
