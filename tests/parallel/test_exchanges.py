"""When buckets of gradients and parameters travel, and what memory a replica keeps meanwhile."""

from typing import Any

import pytest
import torch
from shard_job import Case, Job

from megalrps.parallel.buffers import Sharding
from megalrps.parallel.main_gradient import main_gradient_of

SHARDINGS: tuple[Sharding, ...] = ("no_shard", "optim", "optim_grads")


class Recorded:
    """What happened, in order: exchanges begun and ended, passes begun and ended, memory of gradients."""

    def __init__(self, job: Job) -> None:
        self.events: list[str] = []
        sums, gathers = job.buffers._sums, job.buffers._gathers
        self._spy(sums, "_start", "sum begins")
        self._spy(gathers, "start", "gathers begin")
        job.model.register_forward_pre_hook(
            lambda *_: self.events.append(f"forward, {len(gathers._under_way)} pending")
        )

    def _spy(self, owner: object, method: str, word: str) -> None:
        original = getattr(owner, method)

        def spied(*arguments: object) -> object:
            self.events.append(" ".join([word, *map(str, arguments)]))
            return original(*arguments)

        setattr(owner, method, spied)


def _rank_records(rank: int, case: Case) -> tuple[list[str], int]:
    job = Job(case)
    recorded = Recorded(job)
    for step in range(2):
        job.gradients(step, lambda number: recorded.events.append(f"backward {number} ended"))
        recorded.events.append("optimizer")
        job.optimizer.step(1e-3)
    return recorded.events, len(job.buffers.buckets)


@pytest.mark.parametrize("tied", [False, True])
def test_exchanges_overlap_with_the_passes(run_ranks, tied: bool):
    case = Case(dp=2, bucket=1500, passes=2, tied=tied)
    (events, buckets), other = run_ranks(2, _rank_records, case)
    assert events == other[0], "collectives must begin in the same order on all ranks"
    assert buckets > 3
    first, last = events.index("backward 0 ended"), events.index("backward 1 ended")
    assert not [event for event in events[:first] if event.startswith("sum")], "they are not complete yet"
    within = [event for event in events[first:last] if event.startswith("sum")]
    assert len(within) == buckets, "every bucket left before the last backward pass ended"
    assert events.count("forward, 0 pending") == 3
    assert f"forward, {buckets} pending" in events, "no gather had been waited for when the second update began"


def test_without_overlap_nothing_leaves_before_the_end(run_ranks):
    (events, buckets), _ = run_ranks(2, _rank_records, Case(dp=2, bucket=1500, overlap=False))
    passes = [index for index, event in enumerate(events) if event.startswith("sum")]
    assert len(passes) == 2 * buckets and events.index("backward 0 ended") < passes[0]
    assert all(event == "forward, 0 pending" for event in events if event.startswith("forward"))


def _rank_weighs(rank: int, case: Case) -> dict[str, float]:
    """Bytes by what they are for, of one rank; of gradients the most that there were after a backward pass."""
    job = Job(case)

    def gradients() -> int:
        return sum(bucket.gradients.untyped_storage().size() for bucket in job.buffers.buckets)

    between: list[int] = []
    before = gradients()
    job.gradients(0, lambda _: between.append(gradients()))
    moments = (*job.optimizer.exp_avg, *job.optimizer.exp_avg_sq)
    return {
        "moments": sum(moment.untyped_storage().size() for moment in moments),
        "gradients before": before,
        "gradients between": max(between),
        "gradients after": gradients(),
        "largest bucket": max(bucket.gradients.nbytes for bucket in job.buffers.buckets),
        "shards": sum(bucket.gradient_shard.nbytes for bucket in job.buffers.buckets),
        "parameters": sum(bucket.parameters.nbytes for bucket in job.buffers.buckets),
    }


def test_a_replica_keeps_its_share_alone(run_ranks):
    by_sharding = {
        sharding: run_ranks(4, _rank_weighs, Case(dp=4, bucket=1500, passes=3, sharding=sharding))[1]
        for sharding in SHARDINGS
    }
    whole = by_sharding["no_shard"]
    assert whole["moments"] == 2 * whole["parameters"]
    for sharding in ("optim", "optim_grads"):
        found = by_sharding[sharding]
        assert found["moments"] == 2 * found["parameters"] / 4
        assert found["parameters"] < 1.2 * whole["parameters"]  # padding
    freed = by_sharding["optim_grads"]
    assert freed["gradients before"] == freed["gradients after"] == 0
    assert freed["gradients between"] <= freed["largest bucket"] < freed["parameters"] / 4
    assert freed["shards"] == freed["parameters"] / 4


def _rank_goes_wrong(rank: int, sharding: Sharding) -> list[str]:
    told = []
    job = Job(Case(dp=2, sharding=sharding, bucket=1500))

    def refused(act: Any) -> None:
        try:
            act()
        except RuntimeError as error:
            told.append(str(error))

    job.gradients(0)
    weight = job.model.layers["0"].attention.query.weight
    main = main_gradient_of(weight)
    assert main is not None
    rows = torch.ones(1, weight.shape[0], dtype=torch.float64), torch.ones(1, weight.shape[1], dtype=torch.float64)
    refused(lambda: main.add_product(*rows))
    job.optimizer.step(1e-3)
    job.buffers.begin(1)
    refused(lambda: main.add_product(*rows))  # by a pass that called no module
    job.buffers.wait_parameters()
    return told


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_late_gradient_and_an_early_use_are_noticed(run_ranks, sharding: Sharding):
    for told in run_ranks(2, _rank_goes_wrong, sharding):
        assert "layers.0.attention.query.weight came after its sum had left" in told[0]
        assert len(told) == (1 if sharding == "no_shard" else 2)
        assert all("while they were being gathered" in each for each in told[1:])


def _rank_reads_narrow(rank: int, overlap: bool) -> bool:
    """Whether after updates every rank computes with the same rounded masters."""
    job = Job(Case(dp=2, bucket=1500, overlap=overlap), dtype=torch.float32, compute_dtype=torch.bfloat16)
    for step in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            job.update(step)
    job.buffers.wait_parameters()
    found = [bucket.parameters.clone() for bucket in job.buffers.buckets]
    assert any(part.dtype == torch.bfloat16 for part in found)
    rounded = [torch.equal(bucket.computed, bucket.master.to(bucket.computed.dtype)) for bucket in job.buffers.buckets]
    job.buffers.refresh()
    same = [torch.equal(part, bucket.parameters) for part, bucket in zip(found, job.buffers.buckets, strict=True)]
    return all(rounded) and all(same)


@pytest.mark.parametrize("overlap", [False, True])
def test_what_is_gathered_are_the_rounded_masters(run_ranks, overlap: bool):
    assert run_ranks(2, _rank_reads_narrow, overlap) == [True, True]
