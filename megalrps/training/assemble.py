"""From a checked job to this rank's live part of it: stages, buffers, optimizer, and the engine that runs them."""

from collections.abc import Mapping
from datetime import timedelta

import torch
from torch import nn

from megalrps.model.layers import Layers, LocalLayers
from megalrps.model.sharding import key_value_copies, placements
from megalrps.model.tensor_layers import TensorLayers
from megalrps.model.transformer import Transformer
from megalrps.parallel.buffers import FlatBuffers
from megalrps.parallel.context import ContextParallel
from megalrps.parallel.group import Group
from megalrps.parallel.mesh import Mesh, make_mesh
from megalrps.parallel.pipeline import Exchanged
from megalrps.parallel.tensor import TensorParallel
from megalrps.training.engine import Engine
from megalrps.training.optimizer import Optimizer
from megalrps.training.prepare import Job
from megalrps.training.state import TrainState

_EMBEDDING = "embedding.weight"


def job_mesh(job: Job, everyone: Group, timeout: timedelta | None = None) -> Mesh:
    """The mesh of the job's layout over the ranks of a launch. Collective."""
    where = job.schedule.stage_ranks if job.schedule is not None else (0,)
    tied = not job.model.untie_embeddings_and_output_weights
    copies = frozenset({key_value_copies(job.model, job.layout.tp)})
    return make_mesh(job.layout, everyone, copies=copies, ends=tied and where[0] != where[-1], timeout=timeout)


def assemble(job: Job, mesh: Mesh, dtype: torch.dtype | None = None) -> TrainState:
    """The state of this rank, its parameters uninitialised; ``dtype`` is that of the parameters (None: fp32)."""
    stages = build_stages(job, mesh, dtype)
    parallel, training = job.config.parallel, job.config.training
    tied = not job.model.untie_embeddings_and_output_weights
    holds_both = any(stage.has_embedding for stage in stages.values()) and any(s.has_head for s in stages.values())
    buffers = FlatBuffers(
        Held(stages),
        mesh=mesh,
        placements=placements(
            job.model, mesh.tensor.size, mesh.tensor.rank, sequence_parallel=parallel.sequence_parallel
        ),
        compute_dtype=training.compute_dtype,
        sharding=parallel.data_parallel_sharding_strategy,
        bucket_size=parallel.ddp_bucket_size,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        shared_with_ends=frozenset({_EMBEDDING} if mesh.ends is not None else ()),
        uses={_EMBEDDING: 2} if tied and holds_both else {},
        offload=parallel.optimizer_cpu_offload,
        in_order=parallel.deterministic_reduction,
    )
    engine = Engine(
        stages,
        mesh,
        micro_batch_size=job.micro_batch_size,
        sequence_length=job.config.data.seq_length,
        autocast=training.compute_dtype,
        schedule=job.schedule,
        exchanged=exchanged(job, dtype),
        queue=buffers.queue,
        reset_attention_mask=job.config.data.reset_attention_mask,
        reset_position_ids=job.config.data.reset_position_ids,
    )
    scaling = job.config.scaling if training.fp16 else None
    optimizer = Optimizer(buffers, job.config.optimizer, scaling, job.config.kernels.optimizer_backend)
    return TrainState(engine, buffers, optimizer)


def build_stages(job: Job, mesh: Mesh, dtype: torch.dtype | None = None) -> dict[int, Transformer]:
    """This rank's stages by index; one that holds both ends of a tied model holds their embedding once."""
    ranks = TensorParallel(mesh.tensor, job.config.parallel.sequence_parallel)
    backend = job.config.kernels.attention_backend
    context = ContextParallel(mesh.context, backend) if mesh.context.size > 1 else None
    given = (mesh.tensor.device, dtype, context, backend)
    layers: Layers = LocalLayers(*given) if mesh.tensor.size == 1 else TensorLayers(ranks, *given)
    where = job.schedule.stage_ranks if job.schedule is not None else (0,)
    stages = {
        index: Transformer(
            job.model,
            stage.layers,
            has_embedding=stage.has_embedding,
            has_head=stage.has_head,
            layers=layers,
            activations=job.config.activations,
        )
        for index, stage in enumerate(job.stages)
        if where[index] == mesh.pipeline.rank
    }
    tables = [stage.embedding for stage in stages.values() if hasattr(stage, "embedding")]
    for table in tables[1:]:
        table.weight = tables[0].weight
    return stages


def exchanged(job: Job, dtype: torch.dtype | None = None) -> Exchanged:
    """The residual stream between two stages: one micro-batch's, of this rank's part of the sequence."""
    parallel = job.config.parallel
    parts = job.layout.cp * (job.layout.tp if parallel.sequence_parallel else 1)
    shape = (job.micro_batch_size, job.config.data.seq_length // parts, job.model.hidden_size)
    return Exchanged(shape, dtype or torch.float32)


class Held(nn.Module):
    """What a rank holds of the model, under the global names: the modules of its stages, put together again."""

    def __init__(self, stages: Mapping[int, Transformer]) -> None:
        super().__init__()
        embedding = next((stage.embedding for stage in stages.values() if stage.has_embedding), None)
        if embedding is not None:
            self.embedding = embedding  # first, as buckets lie in the order of the passes
        self.layers = nn.ModuleDict()
        for stage in stages.values():
            self.layers.update(dict(stage.layers.items()))
            for name, module in stage.named_children():
                if name != "layers" and not hasattr(self, name):
                    self.add_module(name, module)
