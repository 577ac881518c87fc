"""Updates of a small model in float64 over replicas that share out what they keep: what their tests compare."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megalrps.model.config import ModelConfig
from megalrps.model.initialisation import initialise_buffers_
from megalrps.model.layers import LocalLayers
from megalrps.model.sharding import key_value_copies, placements
from megalrps.model.tensor_layers import TensorLayers
from megalrps.model.transformer import Transformer
from megalrps.parallel.buffers import FlatBuffers, Sharding
from megalrps.parallel.group import Group
from megalrps.parallel.layout import Layout
from megalrps.parallel.mesh import Mesh, alone, make_mesh
from megalrps.parallel.shard_view import ShardView
from megalrps.parallel.tensor import TensorParallel
from megalrps.training.optimizer import Optimizer
from megalrps.training.options import LossScaleOptions, OptimizerOptions

MODEL = ModelConfig(
    num_layers=2, hidden_size=24, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=40, vocab_size=44
)
BATCH, SEQUENCE, UPDATES = 12, 8, 3
CLIP, ADAMW_RATE, SGD_RATE = 0.05, 1e-3, 1.0
Found = dict[str, np.ndarray]
Pieces = list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]]
"""What a rank holds: name, global shape, where the piece begins in it, the piece."""


@dataclass(frozen=True)
class Case:
    """``tp`` x ``dp`` ranks, and how replicas share out what they hold. ``passes``: micro-batches of a rank's share."""

    dp: int = 1
    tp: int = 1
    sharding: Sharding = "optim"
    bucket: int = 40_000_000
    overlap: bool = True
    passes: int = 1
    adamw: bool = True
    tied: bool = False
    groups: int = 2
    sequence_parallel: bool = False
    clip: float = CLIP
    moments: Any = "fp32"
    scaling: LossScaleOptions | None = None

    @property
    def model(self) -> ModelConfig:
        return replace(MODEL, num_query_groups=self.groups, untie_embeddings_and_output_weights=not self.tied)

    @property
    def ranks(self) -> int:
        return self.dp * self.tp

    @property
    def alone(self) -> "Case":
        return Case(adamw=self.adamw, tied=self.tied, groups=self.groups, clip=self.clip)


def case_name(case: Case) -> str:
    default = Case()
    return "-".join(f"{key}_{value}" for key, value in vars(case).items() if value != getattr(default, key))


class Sgd(Optimizer):
    """Plain descent behind the same clipping: it hides no fault in the size of a gradient."""

    def update(self, learning_rate: float, factor: Tensor) -> None:
        for bucket in self.buffers.buckets:
            bucket.master.sub_(bucket.gradient_shard * factor, alpha=learning_rate)


class Job:
    """A freshly initialised model on this rank, with what updates it."""

    def __init__(self, case: Case, *, dtype: torch.dtype = torch.float64, **buffers: Any) -> None:
        torch.set_num_threads(1)
        self.case = case
        self.mesh = mesh_of(case)
        tensor = self.mesh.tensor
        lie = placements(case.model, tensor.size, tensor.rank, sequence_parallel=case.sequence_parallel)
        cut = TensorLayers(TensorParallel(tensor, case.sequence_parallel), dtype=dtype)
        self.model = Transformer(case.model, layers=cut if tensor.size > 1 else LocalLayers(dtype=dtype))
        self.buffers = FlatBuffers(
            self.model,
            mesh=self.mesh,
            placements=lie,
            sharding=case.sharding,
            bucket_size=case.bucket,
            overlap_grad_reduce=case.overlap,
            overlap_param_gather=case.overlap,
            uses={"embedding.weight": 2} if case.tied else {},
            **buffers,
        )
        options = OptimizerOptions(clip_grad=case.clip, exp_avg_dtype=case.moments, exp_avg_sq_dtype=case.moments)
        self.optimizer = (Optimizer if case.adamw else Sgd)(self.buffers, options, case.scaling)
        initialise_buffers_(self.buffers, case.model, 7)

    def passes(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """Inputs and labels of this rank's micro-batches of one update."""
        tokens = torch.from_numpy(np.random.default_rng(step).integers(0, MODEL.vocab_size, (BATCH, SEQUENCE + 1)))
        share = tokens.chunk(self.mesh.data.size)[self.mesh.data.rank]
        return [(each[:, :-1], each[:, 1:]) for each in share.chunk(self.case.passes)]

    def gradients(self, step: int, between: Callable[[int], None] | None = None) -> Tensor:
        """Leave the gradients of one update in the buffers; ``between`` is called after each backward pass."""
        self.buffers.begin(self.case.passes)
        scale, total = self.optimizer.loss_scale or 1.0, torch.zeros((), dtype=torch.float64)
        for number, (inputs, labels) in enumerate(self.passes(step)):
            loss = self.model.loss(inputs, labels).total * (scale / (BATCH * SEQUENCE))
            loss.backward()
            total += loss.detach() / scale
            if between is not None:
                between(number)
        self.buffers.finish_gradients()
        return self.mesh.replicas.sum_(total)

    def update(self, step: int) -> tuple[Tensor, Tensor]:
        """One update: its loss and the norm of its gradients."""
        loss = self.gradients(step)
        return loss, self.optimizer.step(ADAMW_RATE if self.case.adamw else SGD_RATE)

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds."""
        return {
            **{f"model.{name}": view for name, view in self.buffers.named_masters()},
            **{f"optimizer.{name}": view for name, view in self.optimizer.named_state()},
        }


def mesh_of(case: Case) -> Mesh:
    if case.ranks == 1:
        return alone(torch.device("cpu"))
    everyone = Group(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), dist.group.WORLD)
    copies = frozenset({key_value_copies(case.model, case.tp)})
    return make_mesh(Layout(dp=case.dp, tp=case.tp), everyone, copies=copies)


def pieces(named: Iterable[tuple[str, Tensor]]) -> Pieces:
    """What this rank holds of each tensor, as a checkpoint would be told."""
    found: Pieces = []
    for name, tensor in named:
        whole = [((0,) * tensor.dim(), tensor)]
        for offset, part in tensor.chunks() if isinstance(tensor, ShardView) else whole:
            found.append((name, tuple(tensor.shape), offset, part.detach().double().numpy().copy()))
    return found


def together(by_rank: Iterable[Pieces]) -> Found:
    """The global tensors from what all ranks hold; ranks that hold the same must agree to the last bit."""
    whole: Found = {}
    for name, shape, offset, part in (piece for held in by_rank for piece in held):
        tensor = whole.setdefault(name, np.full(shape, np.nan))
        box = tuple(slice(start, start + size) for start, size in zip(offset, part.shape, strict=True))
        known = ~np.isnan(tensor[box])
        assert np.array_equal(tensor[box][known], part[known]), f"{name}: the ranks have drifted apart"
        tensor[box] = part
    assert not [name for name, value in whole.items() if np.isnan(value).any()], "held by no rank"
    return whole


def trained(case: Case) -> Pieces:
    """This rank's pieces of the first update's gradients, of every loss and norm, and of the state after the last."""
    job = Job(case)
    told: list[tuple[Tensor, Tensor]] = []
    found: Pieces = []
    for step in range(UPDATES):
        loss = job.gradients(step)
        if step == 0:
            found += pieces((f"gradient {name}", view) for name, view in job.buffers.named_gradients())
        told.append((loss, job.optimizer.step(ADAMW_RATE if case.adamw else SGD_RATE)))
    job.buffers.wait_parameters()
    computed = [bucket.parameters[bucket.shard.start : bucket.shard.stop] for bucket in job.buffers.buckets]
    assert all(torch.equal(part, bucket.master) for part, bucket in zip(computed, job.buffers.buckets, strict=True))
    losses, norms = (torch.stack(column) for column in zip(*told, strict=True))
    return found + pieces([("loss", losses), ("norms", norms), *job.tensors().items()])


def trained_together(run_ranks: Callable[..., list[Any]], case: Case, train: Callable[..., Pieces]) -> Found:
    """What ``train(rank, case)`` gives on all ranks of the case, put together."""
    return together(run_ranks(case.ranks, train, case) if case.ranks > 1 else [train(0, case)])


def errors(found: Found, expected: Found) -> dict[str, float]:
    """For each tensor the largest difference, relative to the largest element."""
    assert found.keys() == expected.keys()
    return {
        name: float(np.abs(found[name] - value).max() / max(np.abs(value).max(), 1e-300))
        for name, value in expected.items()
    }
