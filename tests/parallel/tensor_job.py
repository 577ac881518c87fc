"""A few updates of a small model in float64, alone or cut over ranks: what the tests of tensor parallelism compare."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from megalrps.model.config import ModelConfig
from megalrps.model.initialisation import initialise_
from megalrps.model.layers import LocalLayers
from megalrps.model.sharding import check_tensor_parallel, key_value_copies, placements
from megalrps.model.tensor_layers import TensorLayers
from megalrps.model.transformer import Transformer
from megalrps.parallel.buffers import FlatBuffers
from megalrps.parallel.group import Group
from megalrps.parallel.layout import Layout
from megalrps.parallel.mesh import Mesh, alone, make_mesh
from megalrps.parallel.tensor import TensorParallel
from megalrps.training.optimizer import Optimizer
from megalrps.training.options import OptimizerOptions
from megalrps.training.state import TrainState
from megalrps.training.step import Batch, forward_backward

MODEL = ModelConfig(
    num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=64, vocab_size=64
)
BATCH, SEQUENCE = 8, 16
CLIP, UPDATES = 0.05, 20
ADAMW_RATE, SGD_RATE = 1e-3, 1.0  # Adam divides by gradients: a larger rate would amplify their rounding
Found = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """What is trained, and on which layout: ``tp`` x ``dp`` ranks."""

    tp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    groups: int = 2
    tied: bool = False
    adamw: bool = True
    updates: int = UPDATES
    passes: int = 1
    """Micro-batches of a rank's share."""

    @property
    def model(self) -> ModelConfig:
        return replace(MODEL, num_query_groups=self.groups, untie_embeddings_and_output_weights=not self.tied)

    @property
    def ranks(self) -> int:
        return self.tp * self.dp

    @property
    def alone(self) -> "Case":
        """The same on one process."""
        return replace(self, tp=1, dp=1, sequence_parallel=False)


def case_name(case: Case) -> str:
    words = [f"tp{case.tp}", f"dp{case.dp}", f"kv{case.groups}", "adamw" if case.adamw else "sgd"]
    return "-".join([*words, *(["sp"] if case.sequence_parallel else []), *(["tied"] if case.tied else [])])


class Sgd(Optimizer):
    """Plain descent behind the same clipping: it hides no fault in the size of a gradient."""

    def step(self, learning_rate: float) -> torch.Tensor:
        norm = self.buffers.gradient_norm()
        self.buffers.scale_gradients((self.options.clip_grad / (norm + 1e-6)).clamp(max=1.0))
        for group in self.buffers.groups:
            group.parameters.sub_(group.gradients, alpha=learning_rate)
        return norm


def mesh_of(case: Case) -> Mesh:
    if case.ranks == 1:
        return alone(torch.device("cpu"))
    everyone = Group(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), dist.group.WORLD)
    layout = Layout(dp=case.dp, tp=case.tp)
    return make_mesh(layout, everyone, copies=frozenset({key_value_copies(case.model, case.tp)}))


def state_of(case: Case, mesh: Mesh) -> TrainState:
    """A freshly initialised state, in float64, of this rank's part of the model."""
    torch.set_num_threads(1)
    config, ranks = case.model, mesh.tensor.size
    check_tensor_parallel(config, ranks)
    lie = placements(config, ranks, mesh.tensor.rank, sequence_parallel=case.sequence_parallel)
    cut = TensorLayers(TensorParallel(mesh.tensor, case.sequence_parallel), dtype=torch.float64)
    model = Transformer(config, layers=cut if ranks > 1 else LocalLayers(dtype=torch.float64))
    initialise_(model, config, 7, lie)
    buffers = FlatBuffers(model, mesh=mesh, placements=lie)
    options = OptimizerOptions(clip_grad=CLIP)
    return TrainState(model, buffers, Optimizer(buffers, options) if case.adamw else Sgd(buffers, options))


def batch_of(step: int, mesh: Mesh) -> Batch:
    tokens = np.random.default_rng(step).integers(0, MODEL.vocab_size, size=(BATCH, SEQUENCE + 1))
    share = BATCH // mesh.data.size
    return Batch(tokens[mesh.data.rank * share :][:share], BATCH * SEQUENCE)


def whole(state: TrainState, name: str, local: torch.Tensor) -> np.ndarray:
    """The global tensor, put together from all ranks."""
    found = state.buffers.as_global(name, local)
    return (found.full_tensor() if hasattr(found, "full_tensor") else found).detach().numpy().copy()


def gradients(state: TrainState) -> Found:
    return {
        f"gradient {name}": whole(state, name, view)
        for group in state.buffers.groups
        for name, view in group.named(group.gradients)
    }


def trained(case: Case, between: Callable[[TrainState, int], None] | None = None) -> Found:
    """Losses, norms, the first update's gradients, and parameters after the last, all of them global.

    ``between`` is called after the backward pass of every update.
    """
    mesh = mesh_of(case)
    state = state_of(case, mesh)
    found: Found = {}
    losses, norms = [], []
    for step in range(case.updates):
        micro_batch = BATCH // mesh.data.size // case.passes
        losses.append(
            forward_backward(state, batch_of(step, mesh), micro_batch=micro_batch, bf16=False, world=mesh.data)
        )
        if between is not None:
            between(state, step)
        if step == 0:
            found |= gradients(state)
        norms.append(state.optimizer.step(ADAMW_RATE if case.adamw else SGD_RATE))
    found["norms"], found["loss"] = torch.stack(norms).numpy(), torch.stack(losses).numpy()
    return found | {f"parameter {n}": whole(state, n, view) for n, view in state.buffers.named_parameters()}


def errors(found: Found, expected: Found) -> dict[str, float]:
    """For each tensor the largest difference, relative to the largest element."""
    assert found.keys() == expected.keys()
    return {
        name: float(np.abs(found[name] - value).max() / np.abs(value).max())
        if found[name].shape == value.shape
        else 1.0
        for name, value in expected.items()
    }
