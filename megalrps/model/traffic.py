"""Closed forms: the bytes a rank sends in one step, along each dimension of its layout. Imports no torch."""

from dataclasses import dataclass
from math import prod

from megalrps.model.config import ModelConfig
from megalrps.model.parameters import parameter_specs
from megalrps.model.sharding import placements
from megalrps.parallel.layout import Layout
from megalrps.parallel.stages import Stage

_EMBEDDING = "embedding.weight"


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in one optimizer update, by ring collectives, along each dimension of the mesh."""

    pp: int
    dp: int
    cp: int
    tp: int


def step_traffic(
    config: ModelConfig,
    layout: Layout,
    stage: Stage | None = None,
    *,
    samples: int,
    sequence_length: int,
    autocast: bool,
    sequence_parallel: bool,
    sharded: bool = True,
) -> Traffic:
    """The traffic of a rank that holds ``stage`` (None: the model in one piece), one of as many as pipeline ranks.

    ``samples`` are those of a data-parallel rank. An all-gather or a reduce-scatter of n bytes sends (ranks - 1) /
    ranks n from each rank, an all-reduce twice that. Gradients and parameters go along ``dp``, over all replicas: the
    context-parallel ranks are among them. Left out: a few numbers a token (the loss) and a step (the norm), the
    gradients of norms, of shared key-value heads and of a tied head at both ends of a pipeline.
    """
    stage = stage or Stage(range(config.num_layers), has_embedding=True, has_head=True)
    tokens = samples * sequence_length // layout.cp
    tensor = tensor_traffic_per_token(config, stage, autocast=autocast, sequence_parallel=sequence_parallel)
    context = context_traffic_per_token(config, layout, autocast=autocast)
    ends = (not stage.has_embedding) + (not stage.has_head)
    stream = 4 * config.hidden_size / (layout.tp if sequence_parallel else 1)
    replicas = layout.dp * layout.cp
    return Traffic(
        pp=round(tokens * ends * stream),
        dp=round(_exchanged_by_replicas(config, layout.tp, stage, autocast, sharded) * (replicas - 1) / replicas),
        cp=tokens * len(stage.layers) * context,
        tp=round(tokens * tensor * (layout.tp - 1) / layout.tp),
    )


def tensor_traffic_per_token(config: ModelConfig, stage: Stage, *, autocast: bool, sequence_parallel: bool) -> int:
    """Bytes for one token, times (ranks - 1) / ranks, that a rank sends along its tensor-parallel group.

    With h = hidden size elements. A layer has two pairs of column and row maps. Each pair all-reduces h forwards (the
    row map's output) and h backwards (the column map's input gradient), 4 h; under sequence parallelism it gathers h
    forwards, scatters h forwards, and backwards gathers h twice (the column map's input again, the row map's output
    gradient) and scatters h: 5 h. Embedding and head make a pair of their own. All in the type of matrix products (2
    bytes under autocast) but the embedding's output and its gradient, which are 4 bytes.
    """
    narrow, hidden = (2 if autocast else 4), config.hidden_size
    pair, head = (5, 3) if sequence_parallel else (4, 2)
    layers = 2 * len(stage.layers) * pair * narrow * hidden
    return layers + stage.has_head * head * narrow * hidden + stage.has_embedding * 2 * 4 * hidden


def context_traffic_per_token(config: ModelConfig, layout: Layout, *, autocast: bool) -> int:
    """Bytes for one token that a rank holds, and one layer: keys and values gathered twice, their gradients scattered.

    See :class:`megalrps.parallel.context.ContextParallel`; without recomputation.
    """
    heads = max(1, config.query_groups // layout.tp)
    return 6 * heads * config.head_size * (2 if autocast else 4) * (layout.cp - 1)


def _exchanged_by_replicas(config: ModelConfig, ranks: int, stage: Stage, autocast: bool, sharded: bool) -> int:
    """Bytes, times (replicas - 1) / replicas: fp32 gradients scattered and parameters gathered, or gradients summed.

    The parameters are those that are computed with: 2 bytes for those of maps under autocast.
    """
    held = placements(config, ranks, 0, sequence_parallel=False)
    tied = not config.untie_embeddings_and_output_weights
    total = 0
    for name, spec in parameter_specs(config).items():
        if not _on_stage(name, stage, tied):
            continue
        maps = len(spec.shape) == 2 and name != _EMBEDDING
        back = (2 if autocast and maps else 4) if sharded else 4
        total += (4 + back) * prod(held[name].local_shape(spec.shape))
    return total


def _on_stage(name: str, stage: Stage, tied: bool) -> bool:
    if name.startswith("layers."):
        return int(name.split(".")[1]) in stage.layers
    return stage.has_embedding or (tied and stage.has_head) if name == _EMBEDDING else stage.has_head
