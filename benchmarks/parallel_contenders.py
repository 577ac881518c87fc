"""What benchmarks/parallel.py lets run side by side: our training step at some layout, and torch's own ways.

All train one model from the same weights with the same batches, the same clipping and AdamW, so that their losses are
the same but for rounding. All use our ``Transformer``: what differs is what is around it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from megalrps.config import Config
from megalrps.data.options import DataOptions
from megalrps.model.activation_options import ActivationOptions
from megalrps.model.config import ModelConfig
from megalrps.model.initialisation import initialise_
from megalrps.model.layers import LocalLayers
from megalrps.model.stage_cut import cut_model
from megalrps.model.transformer import Transformer
from megalrps.parallel.buffers import decays_matrices
from megalrps.parallel.mesh import Mesh
from megalrps.parallel.options import ParallelOptions
from megalrps.parallel.schedule import make_schedule
from megalrps.parallel.world import World
from megalrps.training.assemble import assemble, job_mesh
from megalrps.training.options import OptimizerOptions, RuntimeOptions, TrainingOptions
from megalrps.training.prepare import Job
from megalrps.training.state import TrainState
from megalrps.training.step import Batch, train_step

LEARNING_RATE = 3e-4
SEED = 1234
Step = Callable[[np.ndarray], float]
"""One update with the global batch of tokens [B, S + 1]; returns its loss."""


@dataclass(frozen=True)
class Work:
    """What every contender trains."""

    model: ModelConfig
    sequence_length: int
    batch_size: int
    """Samples of one update, over all ranks."""
    bf16: bool = False

    def batch(self, step: int) -> np.ndarray:
        """Random tokens [B, S + 1] of one update."""
        shape = (self.batch_size, self.sequence_length + 1)
        return np.random.default_rng(step).integers(0, self.model.vocab_size, shape, dtype=np.int64)


@dataclass(frozen=True)
class Contender:
    """A way to make the update on ``ranks`` processes."""

    name: str
    ranks: int
    kind: Literal["ours", "plain", "ddp", "fsdp2"] = "ours"
    alone: str | None = None
    """The peer on one process that makes passes of the same size over the batch; None: it is one."""
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    micro_batch: int | None = None
    """Samples of one pass; None: the whole share of a rank."""
    activations: ActivationOptions = field(default_factory=ActivationOptions)
    resharded: bool = True
    """Of FSDP2: parameters are given up between forward and backward pass."""


class Running(NamedTuple):
    """A contender on this rank."""

    step: Step
    finish: Callable[[], None]
    """Ends a row of updates: nothing is under way afterwards."""
    mesh: Mesh | None
    """Ours; None for a peer."""


def job_of(contender: Contender, work: Work) -> Job:
    """Our job at the contender's layout, without data or plan: all that building and stepping a state asks of one."""
    config = Config(
        model=work.model,
        data=DataOptions(seq_length=work.sequence_length),
        training=TrainingOptions(
            global_batch_size=work.batch_size, micro_batch_size=contender.micro_batch, bf16=work.bf16
        ),
        parallel=contender.parallel,
        activations=contender.activations,
        runtime=RuntimeOptions(device="cpu"),
    )
    layout = contender.parallel.layout(contender.ranks)
    share = work.batch_size // layout.dp
    micro_batch = contender.micro_batch or share
    count = layout.pp * contender.parallel.stages_per_rank if layout.pp > 1 else 1
    stages = cut_model(work.model, count, sequence_length=work.sequence_length, layout=None)
    schedule = None
    if layout.pp > 1:
        schedule = make_schedule(contender.parallel.pipeline_schedule, layout.pp, count, share // micro_batch)
    return Job(config, work.model, cast(Any, None), (), (), layout, stages, schedule, micro_batch)


def world_of(contender: Contender, device: torch.device) -> World:
    """The processes of the contender: all that there are, or this one alone."""
    if contender.ranks == 1:
        return World(0, 1, device, None)
    return World(dist.get_rank(), dist.get_world_size(), device, dist.group.WORLD)


def start(contender: Contender, work: Work, device: torch.device) -> Running:
    """Build what the contender needs on this rank. Collective."""
    if contender.kind != "ours":
        return Running(_peer_step(contender, work, device), lambda: None, None)
    state, step, mesh = start_ours(contender, work, device)
    return Running(step, state.buffers.wait_parameters, mesh)


def start_ours(contender: Contender, work: Work, device: torch.device) -> tuple[TrainState, Step, Mesh]:
    """Our state on this rank, and its step. Collective."""
    job = job_of(contender, work)
    mesh = job_mesh(job, world_of(contender, device))
    state = assemble(job, mesh)
    state.initialise(work.model, SEED)
    return state, _our_step(state, mesh), mesh


def _our_step(state: TrainState, mesh: Mesh) -> Step:
    def step(tokens: np.ndarray) -> float:
        share = len(tokens) // mesh.data.size
        batch = Batch(tokens[mesh.data.rank * share :][:share], tokens.shape[0] * (tokens.shape[1] - 1))
        return train_step(state, batch, learning_rate=LEARNING_RATE, mesh=mesh).loss

    return step


def _peer_step(contender: Contender, work: Work, device: torch.device) -> Step:
    """The update as a user of torch writes it, data parallel or alone; the loss that is returned is the global one."""
    world = world_of(contender, device)
    model = Transformer(work.model, layers=LocalLayers(device))
    initialise_(model, work.model, SEED)
    wrapped = _wrapped(model, contender, world)
    parameters = list(wrapped.parameters())
    optimizer = _fused_adamw(wrapped)

    def step(tokens: np.ndarray) -> float:
        share = len(tokens) // world.size
        # The wrappers average gradients over ranks: a rank's loss is a mean over its own tokens.
        divisor = share * (tokens.shape[1] - 1)
        own = torch.from_numpy(tokens[world.rank * share :][:share]).to(device, non_blocking=True)
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for part in own.split(contender.micro_batch or share):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=work.bf16):
                loss: Tensor = model.loss_of_logits(wrapped(part[:, :-1]), part[:, 1:]).total / divisor
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(parameters, OptimizerOptions().clip_grad)
        optimizer.step()
        return float(world.sum_(total)) / world.size

    return step


def _wrapped(model: Transformer, contender: Contender, world: World) -> nn.Module:
    if contender.kind == "ddp":
        return DistributedDataParallel(model)
    if contender.kind == "fsdp2":
        for block in model.layers.values():
            fully_shard(block, reshard_after_forward=contender.resharded)
        fully_shard(model, reshard_after_forward=contender.resharded)
    return model


def _fused_adamw(model: nn.Module) -> torch.optim.Optimizer:
    options = OptimizerOptions()
    groups = [
        {"params": [p for n, p in model.named_parameters() if decays_matrices(n, p) is flag], "weight_decay": decay}
        for flag, decay in ((True, options.weight_decay), (False, 0.0))
    ]
    betas = (options.adam_beta1, options.adam_beta2)
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=betas, eps=options.adam_eps, fused=True)


def _data(sharding: str) -> ParallelOptions:
    return ParallelOptions(data_parallel_sharding_strategy=cast(Any, sharding))


def _tensor(ranks: int, *, sequence: bool = False, pipeline: int = 1) -> ParallelOptions:
    return ParallelOptions(
        tensor_model_parallel_size=ranks, sequence_parallel=sequence, pipeline_model_parallel_size=pipeline
    )


def _pipeline(schedule: str) -> ParallelOptions:
    return ParallelOptions(pipeline_model_parallel_size=2, pipeline_schedule=cast(Any, schedule))


def contenders(micro_batch: int) -> dict[int, tuple[Contender, ...]]:
    """By number of processes. A pipeline makes passes of ``micro_batch`` samples, everyone else one of its whole share.

    The peers are DDP, FSDP2, and the plain loops of the first process, while the others wait.
    """
    whole, cut = "plain", "plain, micro-batches"
    plain = (Contender(whole, 1, "plain"), Contender(cut, 1, "plain", micro_batch=micro_batch))
    return {
        1: (
            *plain,
            Contender("1x1x1", 1, alone=whole),
            Contender("1x1x1, micro-batches", 1, alone=cut, micro_batch=micro_batch),
        ),
        2: (
            *plain,
            *_data_parallel(2, whole),
            Contender("tp2", 2, alone=whole, parallel=_tensor(2)),
            Contender("tp2 sp", 2, alone=whole, parallel=_tensor(2, sequence=True)),
            Contender("cp2", 2, alone=whole, parallel=ParallelOptions(context_parallel_size=2)),
            *(
                Contender(f"pp2 {name}", 2, alone=cut, parallel=_pipeline(name), micro_batch=micro_batch)
                for name in ("1f1b", "interleaved", "zbv", "dualpipev")
            ),
        ),
        4: (
            *plain,
            *_data_parallel(4, whole),
            Contender("tp2 dp2", 4, alone=whole, parallel=_tensor(2)),
            Contender(
                "tp2 sp pp2", 4, alone=cut, parallel=_tensor(2, sequence=True, pipeline=2), micro_batch=micro_batch
            ),
        ),
    }


def with_memory_in_mind(micro_batch: int) -> tuple[Contender, ...]:
    """Layouts that differ in what a rank holds rather than in its work."""
    grads = replace(_data("optim_grads"), ddp_bucket_size=200_000)
    full = ActivationOptions(recompute_granularity="full", recompute_method="uniform")
    pipeline, two = _pipeline("1f1b"), _tensor(2, sequence=True)
    return (
        Contender("dp2 optim_grads, small buckets", 2, parallel=grads),
        Contender("tp2 sp recompute", 2, parallel=two, activations=full),
        Contender("pp2 1f1b recompute", 2, parallel=pipeline, micro_batch=micro_batch, activations=full),
    )


def _data_parallel(ranks: int, alone: str) -> Sequence[Contender]:
    """The peers, and our three strategies."""
    ours = Contender(f"dp{ranks}", ranks, alone=alone)
    return (
        Contender("DDP", ranks, "ddp", alone=alone),
        Contender("FSDP2", ranks, "fsdp2", alone=alone),
        Contender("FSDP2, parameters kept", ranks, "fsdp2", alone=alone, resharded=False),
        *(
            replace(ours, name=f"dp{ranks} {sharding}", parallel=_data(sharding))
            for sharding in ("no_shard", "optim", "optim_grads")
        ),
    )
