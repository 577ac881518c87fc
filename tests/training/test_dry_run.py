"""What a dry run says of every rank, against what ranks that train hold and send."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_job import ALONE, TinyData, command, launch, make_data, world_of_harness

from megalrps.config import parse_config
from megalrps.kernels import attention
from megalrps.model.counts import activation_bytes_per_token
from megalrps.model.traffic import step_traffic
from megalrps.parallel.world import World
from megalrps.training.assemble import assemble, job_mesh
from megalrps.training.dry_run import report_rank, report_ranks
from megalrps.training.layout_warnings import warnings
from megalrps.training.prepare import Job, prepare
from megalrps.training.rank_trace import lower_right_mask, traffic_labels
from megalrps.training.step import Batch, train_step
from megalrps.training.storage_tracker import StorageTracker, TrafficCounter, replaced

MODEL = ("--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4", "--num-query-groups", "2",
         "--ffn-hidden-size", "96", "--seq-length", "64", "--global-batch-size", "8")  # fmt: skip
PP2 = ("--pipeline-model-parallel-size", "2", "--micro-batch-size", "2", "--num-layers", "4")
ONE_LAYER_A_STAGE = ("--num-layers", "2")
TP2 = ("--tensor-model-parallel-size", "2")
CP2 = ("--context-parallel-size", "2")
LINEAR = ("--cross-entropy-fusion-impl", "linear")
FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform")


def job_of(data: TinyData, flags: Sequence[str], ranks: int) -> Job:
    return prepare(parse_config(command(data, Path("unused"), *MODEL, *flags)), ranks)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return TinyData(make_data(tmp_path_factory.mktemp("data"), (500,)).increments, ())


def batch_of(job: Job, tokens: np.ndarray) -> Batch:
    """Of one document a sample or, where the job knows documents, of two, the second's first label not counted."""
    shape = (len(tokens), job.config.data.seq_length)
    if not job.config.data.knows_documents:
        return Batch(tokens, tokens[:, 1:].size * job.layout.dp)
    second = np.arange(shape[1]) >= 20
    counted = np.broadcast_to(np.arange(shape[1]) != 19, shape)
    starts = np.broadcast_to(np.where(second, 20, 0).astype(np.int32), shape)
    return Batch(tokens, None, starts.copy(), counted.copy())


def measured(job: Job, world: World) -> tuple[int, dict[str, int]]:
    """The most bytes alive in the second step of a rank that trains, and the bytes it sends in it."""
    torch.set_num_threads(1)
    mesh = job_mesh(job, world)
    share = job.config.training.global_batch_size // job.layout.dp
    length = job.config.data.seq_length
    # torch's own mask cannot be made where operations are counted
    with replaced(attention, "causal_lower_right", lower_right_mask), StorageTracker() as tracker:
        state = assemble(job, mesh)
        state.initialise(job.model, 0)
        for _ in range(2):
            tokens = np.random.default_rng(0).integers(0, job.model.vocab_size, (share, length + 1))
            tracker.mark()
            with TrafficCounter(traffic_labels(mesh, state.buffers.buckets)) as traffic:
                train_step(state, batch_of(job, tokens), learning_rate=1e-3, mesh=mesh)
        return tracker.peak, dict(traffic.sent)


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--micro-batch-size", "2"),
        ("--micro-batch-size", "2", "--bf16"),
        ("--micro-batch-size", "4", *FULL),
        ("--micro-batch-size", "4", "--recompute-granularity", "selective", "--recompute-modules", "mlp", "layernorm"),
        ("--micro-batch-size", "4", "--bf16", "--exp-avg-dtype", "bf16", "--exp-avg-sq-dtype", "bf16"),
        ("--micro-batch-size", "1", "--untie-embeddings-and-output-weights", "--fp16"),
        ("--micro-batch-size", "4", "--bf16", *LINEAR, "--loss-chunk-tokens", "100"),
        ("--micro-batch-size", "4", "--reset-attention-mask", "--reset-position-ids", "--eod-mask-loss"),
    ],
    ids=" ".join,
)
def test_bytes_are_those_of_a_process_that_trains(one: TinyData, flags: tuple[str, ...]):
    job = job_of(one, flags, 1)
    peak, _ = measured(job, ALONE)
    assert report_rank(job, 0).bytes.total == pytest.approx(peak, rel=0.05)


def _rank_measures(rank: int, data: TinyData, flags: tuple[str, ...]) -> tuple[int, dict[str, int]]:
    world = world_of_harness()
    return measured(job_of(data, flags, world.size), world)


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (2, PP2),
        (2, (*PP2, "--bf16", *FULL)),
        (2, (*PP2, "--pipeline-schedule", "gpipe")),
        (2, (*PP2, "--pipeline-schedule", "interleaved")),
        (2, (*PP2, "--pipeline-schedule", "zbv", "--bf16")),
        (2, (*PP2, "--pipeline-schedule", "dualpipev")),
        (2, (*TP2, "--micro-batch-size", "4")),
        (2, (*TP2, "--sequence-parallel", "--micro-batch-size", "4", "--bf16")),
        (2, ("--micro-batch-size", "2")),
        (2, ("--micro-batch-size", "2", "--data-parallel-sharding-strategy", "no_shard")),
        (2, (*TP2, "--sequence-parallel", "--bf16", *LINEAR)),
        (2, ("--micro-batch-size", "2", "--data-parallel-sharding-strategy", "optim_grads", "--bf16")),
        (2, ("--micro-batch-size", "4", "--context-parallel-size", "2")),
        (4, (*PP2, *TP2, "--sequence-parallel")),
        (4, (*PP2, "--pipeline-schedule", "zbv", "--ddp-bucket-size", "1000")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_bytes_held_and_sent_are_those_of_ranks_that_train(
    run_ranks, one: TinyData, ranks: int, flags: tuple[str, ...]
):
    told = report_ranks(job_of(one, flags, ranks))
    for report, (peak, sent) in zip(told, run_ranks(ranks, _rank_measures, one, flags), strict=True):
        assert report.bytes.total == pytest.approx(peak, rel=0.05), report
        for dimension, size in report.sent.items():
            assert size == pytest.approx(sent.get(dimension, 0), rel=1e-3, abs=64), dimension


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (8, (*PP2, *TP2, "--sequence-parallel", "--bf16", *ONE_LAYER_A_STAGE)),
        (8, (*TP2, *CP2, "--data-parallel-sharding-strategy", "optim_grads", "--num-layers", "1")),
        (4, ("--context-parallel-size", "4", "--num-layers", "1")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_a_rank_of_each_kind_speaks_for_its_like(one: TinyData, ranks: int, flags: tuple[str, ...]):
    job = job_of(one, flags, ranks)
    assert report_ranks(job) == tuple(report_rank(job, rank) for rank in range(ranks))


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (2, TP2),
        (4, ("--tensor-model-parallel-size", "4", "--sequence-parallel", "--bf16")),
        (4, (*TP2, "--bf16")),
        (4, ("--data-parallel-sharding-strategy", "no_shard", "--bf16")),
        (4, ("--context-parallel-size", "2", "--bf16")),
        (4, (*PP2, *TP2, "--sequence-parallel", "--bf16", "--untie-embeddings-and-output-weights")),
        (8, (*PP2, "--context-parallel-size", "2", "--untie-embeddings-and-output-weights")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_bytes_sent_are_those_of_the_closed_form(one: TinyData, ranks: int, flags: tuple[str, ...]):
    job = job_of(one, flags, ranks)
    for report in report_ranks(job):
        told = step_traffic(
            job.model,
            job.layout,
            job.stages[report.coordinates.pp],
            samples=job.config.training.global_batch_size // job.layout.dp,
            sequence_length=job.config.data.seq_length,
            autocast=job.config.training.bf16,
            sequence_parallel=job.config.parallel.sequence_parallel,
            sharded=job.config.parallel.data_parallel_sharding_strategy != "no_shard",
        )
        assert report.sent == pytest.approx(asdict(told), rel=0.03, abs=64)


@pytest.mark.parametrize("autocast", [False, True])
def test_activations_are_those_of_the_closed_form(one: TinyData, autocast: bool):
    job = job_of(one, ("--micro-batch-size", "4", *(("--bf16",) if autocast else ())), 1)
    told = activation_bytes_per_token(job.model, autocast=autocast) * 4 * job.config.data.seq_length
    assert report_rank(job, 0).bytes.activations == pytest.approx(told, rel=0.03)


def test_every_rank_of_a_thousand_is_told(one: TinyData, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    shape = ("--num-layers", "8", "--num-attention-heads", "8", "--num-query-groups", "8")
    batch = ("--micro-batch-size", "1", "--global-batch-size", "256", "--sequence-parallel")
    layout = ("--tensor-model-parallel-size", "8", "--pipeline-model-parallel-size", "8", "--world-size", "1024")
    flags = (*MODEL, *shape, *batch, *layout, "--dry-run", "--json")
    assert launch(command(one, tmp_path / "run", *flags)) == 0
    told = json.loads(capsys.readouterr().out)
    ranks = told["ranks"]
    assert [rank["rank"] for rank in ranks] == list(range(1024))
    assert len({tuple(rank["coordinates"].values()) for rank in ranks}) == 1024
    assert ranks[0]["coordinates"] == {"pp": 0, "dp": 0, "cp": 0, "tp": 0}
    assert all(rank["bytes_total"] == sum(rank["bytes"].values()) for rank in ranks)
    assert 0 < told["bubble_fraction"] < 1
    assert sum(rank["parameters"] for rank in ranks[::128]) * 8 > told["parameters"] > 0
    assert not (tmp_path / "run").exists()


def warned(data: TinyData, ranks: int, *flags: str) -> str:
    return "\n".join(warnings(job_of(data, flags, ranks)))


@pytest.mark.parametrize(
    ("ranks", "flags", "told"),
    [
        (2, (*PP2, "--micro-batch-size", "4"), "2 micro-batches a step for 2 stages"),
        (2, (*PP2, "--pipeline-model-parallel-layout", "Et|tttL"), "uneven"),
        (2, (*PP2, "--pipeline-model-parallel-layout", "E|ttttL"), "no layer"),
        (2, TP2, "without --sequence-parallel"),
        (16, ("--tensor-model-parallel-size", "16", "--num-attention-heads", "16"), "16 ranks"),
        (1, ("--make-vocab-size-divisible-by", "72"), "72 rows"),
        (1, ("--cpu-offloading-num-layers", "1"), "--cpu-offloading-num-layers"),
    ],
)
def test_what_wastes_ranks_is_warned_of(one: TinyData, ranks: int, flags: tuple[str, ...], told: str):
    assert told in warned(one, ranks, *flags)


def test_a_job_that_wastes_nothing_is_not_warned_of(one: TinyData):
    assert warned(one, 4, *PP2, *TP2, "--sequence-parallel", "--make-vocab-size-divisible-by", "64") == ""
