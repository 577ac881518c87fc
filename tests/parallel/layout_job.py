"""A few updates of a small model in float64, at any layout: what the tests of parallel training compare."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from rank_pieces import Found, Pieces, pieces, together
from torch import Tensor

from megalrps.config import Config
from megalrps.data.options import DataOptions
from megalrps.model.activation_options import ActivationOptions
from megalrps.model.config import ModelConfig
from megalrps.model.sharding import check_tensor_parallel
from megalrps.model.stage_cut import cut_model
from megalrps.parallel.layout import Layout
from megalrps.parallel.mesh import Mesh
from megalrps.parallel.options import ParallelOptions
from megalrps.parallel.schedule import PipelineSchedule, make_schedule
from megalrps.parallel.world import World
from megalrps.training.assemble import assemble, job_mesh
from megalrps.training.optimizer import Optimizer
from megalrps.training.options import OptimizerOptions, TrainingOptions
from megalrps.training.prepare import Job
from megalrps.training.state import TrainState
from megalrps.training.step import Batch, forward_backward

MODEL = ModelConfig(
    num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=64, vocab_size=64
)
BATCH, SEQUENCE = 8, 16
CLIP, UPDATES = 0.05, 8
ADAMW_RATE, SGD_RATE = 1e-3, 1.0  # Adam divides by gradients: a larger rate would amplify their rounding
KEPT = ActivationOptions()


@dataclass(frozen=True)
class Case:
    """What is trained, and on which layout."""

    tp: int = 1
    dp: int = 1
    pp: int = 1
    cp: int = 1
    schedule: PipelineSchedule = "1f1b"
    virtual: int | None = None
    stated: str | None = None
    """Where stages begin, in the language of --pipeline-model-parallel-layout."""
    sequence_parallel: bool = False
    layers: int = 2
    groups: int = 2
    tied: bool = False
    adamw: bool = True
    updates: int = UPDATES
    micro_batch: int | None = None
    """Samples of one pass; None: a rank's whole share, or what keeps a pipeline busy."""
    sharding: str = "optim"
    bucket: int = 40_000_000
    overlap: bool = True
    activations: ActivationOptions = KEPT
    clip: float = CLIP
    documents: tuple[str, ...] = ()
    """What is within the documents of a sample, of which there are several: "attention", "positions"."""
    counted: bool = False
    """Labels that do not count: of some samples all."""
    deterministic: bool = False

    @property
    def model(self) -> ModelConfig:
        tied = not self.tied
        return replace(
            MODEL, num_layers=self.layers, num_query_groups=self.groups, untie_embeddings_and_output_weights=tied
        )

    @property
    def layout(self) -> Layout:
        return Layout(pp=self.pp, dp=self.dp, cp=self.cp, tp=self.tp)

    @property
    def ranks(self) -> int:
        return self.layout.world_size

    @property
    def alone(self) -> "Case":
        """The same on one process, in one pass."""
        return Case(
            layers=self.layers,
            groups=self.groups,
            tied=self.tied,
            adamw=self.adamw,
            updates=self.updates,
            documents=self.documents,
            counted=self.counted,
        )


def case_name(case: Case) -> str:
    """Every field that is not its default's, for a test's name."""
    default = asdict(Case())
    return (
        "-".join(
            name if value is True else f"{name}_{value}".replace("|", "+")
            for name, value in asdict(case).items()
            if value != default[name] and name not in ("activations", "documents")
        )
        or "alone"
    )


class Sgd(Optimizer):
    """Plain descent behind the same clipping: it hides no fault in the size of a gradient."""

    def update(self, learning_rate: float, scale: Tensor) -> None:
        for bucket in self.buffers.buckets:
            bucket.master.sub_(bucket.gradient_shard * scale, alpha=learning_rate)


def job_of(case: Case) -> Job:
    """A job without data or plan: what building and stepping a state asks of one."""
    parallel = ParallelOptions(
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        context_parallel_size=case.cp,
        pipeline_schedule=case.schedule,
        num_virtual_stages_per_pipeline_rank=case.virtual,
        pipeline_model_parallel_layout=case.stated,
        sequence_parallel=case.sequence_parallel,
        data_parallel_sharding_strategy=cast(Any, case.sharding),
        ddp_bucket_size=case.bucket,
        overlap_grad_reduce=case.overlap,
        overlap_param_gather=case.overlap,
        deterministic_reduction=case.deterministic,
    )
    config = Config(
        model=case.model,
        data=DataOptions(
            seq_length=SEQUENCE,
            reset_attention_mask="attention" in case.documents,
            reset_position_ids="positions" in case.documents,
        ),
        training=TrainingOptions(global_batch_size=BATCH, micro_batch_size=case.micro_batch),
        parallel=parallel,
        optimizer=OptimizerOptions(clip_grad=case.clip),
        activations=case.activations,
    )
    check_tensor_parallel(case.model, case.tp)
    share = BATCH // case.dp
    micro_batch = case.micro_batch or (share if case.pp == 1 else 1)
    count = case.pp * parallel.stages_per_rank if case.pp > 1 else 1
    stages = cut_model(case.model, count, sequence_length=SEQUENCE, layout=case.stated)
    schedule = make_schedule(case.schedule, case.pp, count, share // micro_batch) if case.pp > 1 else None
    return Job(config, case.model, cast(Any, None), (), (), case.layout, stages, schedule, micro_batch)


def world_of(case: Case) -> World:
    if case.ranks == 1:
        return World(0, 1, torch.device("cpu"), None)
    return World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), dist.group.WORLD)


def state_of(case: Case) -> tuple[TrainState, Mesh]:
    """A freshly initialised state, in float64, of this rank's part of the model."""
    torch.set_num_threads(1)
    job = job_of(case)
    mesh = job_mesh(job, world_of(case))
    state = assemble(job, mesh, torch.float64)
    if not case.adamw:
        state.optimizer = Sgd(state.buffers, job.config.optimizer)
    state.initialise(case.model, 7)
    return state, mesh


def batch_of(step: int, mesh: Mesh) -> Batch:
    tokens = np.random.default_rng(step).integers(0, MODEL.vocab_size, size=(BATCH, SEQUENCE + 1))
    share = BATCH // mesh.data.size
    return Batch(tokens[mesh.data.rank * share :][:share], BATCH * SEQUENCE)


def documents_of(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the documents of a global batch begin; which labels count: of the first sample most, of the last none."""
    generator = np.random.default_rng([step, 1])
    is_start = generator.random((BATCH, SEQUENCE)) < np.linspace(0.0, 0.6, BATCH)[:, None]
    starts = np.maximum.accumulate(np.where(is_start, np.arange(SEQUENCE), 0), axis=1).astype(np.int32)
    return starts, generator.random((BATCH, SEQUENCE)) < np.linspace(0.9, 0.0, BATCH)[:, None]


def batch_of_case(case: Case, step: int, mesh: Mesh) -> Batch:
    """The same samples as :func:`batch_of`, with what the case has of documents and of labels that do not count."""
    plain, (starts, counted) = batch_of(step, mesh), documents_of(step)
    if not (case.documents or case.counted):
        return plain
    own = slice(mesh.data.rank * len(plain.tokens), (mesh.data.rank + 1) * len(plain.tokens))
    return replace(
        plain,
        global_tokens=None if case.counted else plain.global_tokens,
        starts_BS=starts[own] if case.documents else None,
        counted_BS=counted[own] if case.counted else None,
    )


def evaluated(state: TrainState) -> Tensor:
    """The summed loss of two samples of several documents, told as an evaluation does, the same on all ranks."""
    tokens = torch.arange(2 * (SEQUENCE + 1)).view(2, -1) ** 2 % MODEL.vocab_size
    starts, counted = (torch.from_numpy(each[3:5]) for each in documents_of(0))
    with torch.no_grad():
        return state.engine.loss(tokens[:, :-1], tokens[:, 1:], counted, starts).total


def trained(case: Case, between: Callable[[TrainState, int], None] | None = None) -> Pieces:
    """Losses, norms, the first update's gradients, and parameters after the last: this rank's pieces of them.

    ``between`` is called after the backward pass of every update.
    """
    state, mesh = state_of(case)
    found: Pieces = []
    losses, norms = [], []
    for step in range(case.updates):
        losses.append(forward_backward(state, batch_of_case(case, step, mesh), mesh))
        if between is not None:
            between(state, step)
        if step == 0:
            found += pieces((f"gradient {name}", view) for name, view in state.buffers.named_gradients())
        norms.append(state.optimizer.step(ADAMW_RATE if case.adamw else SGD_RATE))
    found += pieces((f"parameter {name}", view) for name, view in state.buffers.named_masters())
    if case.documents:
        found += pieces([("evaluated", evaluated(state))])
    return found + pieces((("norms", torch.stack(norms)), ("loss", torch.stack(losses))))


def trained_together(run_ranks: Callable[..., list[Any]], case: Case, function: Callable[..., Pieces]) -> Found:
    """What ``function(rank, case)`` gives on all ranks of the case's layout, put together."""
    return together(run_ranks(case.ranks, function, case) if case.ranks > 1 else [function(0, case)])


@cache
def expected(case: Case) -> Found:
    """What one process finds."""
    return together([trained(case.alone)])


def rank_trains(rank: int, case: Case) -> Pieces:
    """What each rank does."""
    return trained(case)


def errors(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> dict[str, float]:
    """For each tensor the largest difference, relative to the largest element."""
    assert found.keys() == expected.keys()
    return {
        name: float(np.abs(found[name] - value).max() / np.abs(value).max())
        if found[name].shape == value.shape
        else 1.0
        for name, value in expected.items()
    }
