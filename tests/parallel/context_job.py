"""Attention, and a small model's loss, in float64, alone or cut along the sequence: what the tests of it compare.

A rank hands in arrays of the whole's shape that hold its own contribution, so that the sum over all ranks is the whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from megalrps.kernels.attention import attention
from megalrps.model.config import ModelConfig
from megalrps.model.initialisation import initialise_
from megalrps.model.layers import LocalLayers
from megalrps.model.sharding import key_value_copies, placements
from megalrps.model.tensor_layers import TensorLayers
from megalrps.model.transformer import Transformer
from megalrps.parallel import context
from megalrps.parallel.context import ContextParallel
from megalrps.parallel.group import Group
from megalrps.parallel.layout import Layout
from megalrps.parallel.mesh import Mesh, alone, make_mesh
from megalrps.parallel.tensor import TensorParallel

HEADS, HEAD_SIZE, BATCH, LENGTH = 4, 6, 3, 24  # runs of 6 positions over 2 ranks and of 3 over 4
MODEL = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=HEADS, ffn_hidden_size=64, vocab_size=64)
Found = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """``cp`` x ``tp`` ranks, and what they compute."""

    cp: int = 1
    tp: int = 1
    groups: int = 2
    sequence_parallel: bool = False
    recompute: bool = False
    length: int = LENGTH

    @property
    def model(self) -> ModelConfig:
        return replace(MODEL, num_query_groups=self.groups)

    @property
    def ranks(self) -> int:
        return self.cp * self.tp

    @property
    def alone(self) -> "Case":
        """The same on one process."""
        return replace(self, cp=1, tp=1, sequence_parallel=False, recompute=False)


def case_name(case: Case) -> str:
    words = [f"cp{case.cp}", f"tp{case.tp}", f"kv{case.groups}", f"length{case.length}"]
    return "-".join([*words, *(["sp"] if case.sequence_parallel else []), *(["again"] if case.recompute else [])])


def mesh_of(case: Case) -> Mesh:
    if case.ranks == 1:
        return alone(torch.device("cpu"))
    everyone = Group(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), dist.group.WORLD)
    copies = frozenset({key_value_copies(case.model, case.tp)})
    return make_mesh(Layout(cp=case.cp, tp=case.tp), everyone, copies=copies)


def attended(case: Case) -> Found:
    """Output of the attention, and the gradients of query, key and value for a random gradient of the output."""
    mesh = mesh_of(case)
    positions = context.sequence_positions(case.length, case.cp, mesh.context.rank)
    generator = torch.Generator().manual_seed(case.groups)
    query, key, value, probe = (
        torch.randn(BATCH, case.length, heads, HEAD_SIZE, dtype=torch.float64, generator=generator)
        for heads in (HEADS, case.groups, case.groups, HEADS)
    )
    heads, groups = held(HEADS, mesh.tensor), held(case.groups, mesh.tensor)
    mine = [
        whole[:, positions][:, :, those].requires_grad_()
        for whole, those in ((query, heads), (key, groups), (value, groups))
    ]
    attend = attention if case.ranks == 1 else ContextParallel(mesh.context).attention
    output = checkpoint(attend, *mine, use_reentrant=False) if case.recompute else attend(*mine)
    gradients = torch.autograd.grad(output, mine, probe[:, positions][:, :, heads])

    def placed(part: torch.Tensor, whole: torch.Tensor, those: slice) -> np.ndarray:
        found = np.zeros(whole.shape)
        found[:, positions.numpy(), those] = part.detach().numpy()
        return found

    places = {"output": (query, heads), "query": (query, heads), "key": (key, groups), "value": (value, groups)}
    return {
        name: placed(part, *place) for (name, place), part in zip(places.items(), (output, *gradients), strict=True)
    }


def held(heads: int, ranks: Group) -> slice:
    """The heads that a tensor-parallel rank holds; of fewer heads than ranks several hold the same."""
    pieces = min(heads, ranks.size)
    piece, length = ranks.rank * pieces // ranks.size, heads // pieces
    return slice(piece * length, (piece + 1) * length)


def model_of(case: Case, mesh: Mesh, dtype: torch.dtype = torch.float64) -> Transformer:
    """This rank's part of the model, freshly initialised."""
    torch.set_num_threads(1)
    ranks = ContextParallel(mesh.context) if case.cp > 1 else None
    cut = TensorLayers(TensorParallel(mesh.tensor, case.sequence_parallel), dtype=dtype, context=ranks)
    layers = cut if case.tp > 1 else LocalLayers(dtype=dtype, context=ranks)
    model = Transformer(case.model, layers=layers)
    initialise_(model, case.model, 7, lie(case, mesh))
    return model


def lie(case: Case, mesh: Mesh):
    return placements(case.model, case.tp, mesh.tensor.rank, sequence_parallel=case.sequence_parallel)


def modelled(case: Case) -> Found:
    """The summed loss of a batch and all its gradients."""
    mesh = mesh_of(case)
    model, places = model_of(case, mesh), lie(case, mesh)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, MODEL.vocab_size, size=(BATCH, case.length + 1)))
    positions = context.sequence_positions(case.length, case.cp, mesh.context.rank)
    inputs, labels = tokens[:, positions], tokens[:, 1:][:, positions]
    loss = model.loss_of_logits(model(inputs, positions), labels).total
    loss.backward()
    found = {"loss": loss.detach().numpy() / case.tp}
    wholes = dict(Transformer(case.model, layers=LocalLayers(torch.device("meta"))).named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        whole, place = torch.zeros(wholes[name].shape, dtype=torch.float64), places[name]
        place.part(whole).copy_(parameter.grad if place.sums else parameter.grad / place.copies)
        found[name] = whole.numpy()
    return found


def errors(by_rank: Sequence[Found], compute: Callable[[Case], Found], case: Case) -> dict[str, float]:
    """For each array the largest difference of the ranks' sum from one process, relative to the largest element."""
    return {
        name: float(np.abs(sum(found[name] for found in by_rank) - value).max() / np.abs(value).max())
        for name, value in compute(case.alone).items()
    }
