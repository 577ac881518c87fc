"""Closed forms: the bytes a rank sends in one step, along each dimension of its layout. Imports no torch."""

from dataclasses import dataclass

from megalrps.model.config import ModelConfig
from megalrps.model.counts import rank_parameter_count


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in one optimizer update, by ring collectives, along each dimension of the mesh."""

    tensor: int
    data: int


def step_traffic(
    config: ModelConfig,
    *,
    samples: int,
    sequence_length: int,
    autocast: bool,
    tensor: int,
    data: int,
    sequence_parallel: bool,
) -> Traffic:
    """The traffic of ``samples`` a rank, of ``sequence_length`` tokens, over ``tensor`` x ``data`` ranks.

    An all-gather or a reduce-scatter of n bytes sends (ranks - 1) / ranks n from each rank, an all-reduce twice that.
    Along the tensor-parallel group (:func:`tensor_traffic_per_token`); along the data-parallel one, one all-reduce of
    the rank's gradients in fp32. A few numbers a token (the loss) and a step (the norm) are left out, and so are the
    gradients of norms and shared heads.
    """
    per_token = tensor_traffic_per_token(config, autocast=autocast, sequence_parallel=sequence_parallel)
    gradients = 4 * rank_parameter_count(config, tensor)
    return Traffic(
        tensor=round(samples * sequence_length * per_token * (tensor - 1) / tensor),
        data=round(2 * gradients * (data - 1) / data),
    )


def tensor_traffic_per_token(config: ModelConfig, *, autocast: bool, sequence_parallel: bool) -> int:
    """Bytes for one token, times (ranks - 1) / ranks, that a rank sends along its tensor-parallel group.

    With h = hidden size elements. A layer has two pairs of column and row maps. Each pair all-reduces h forwards (the
    row map's output) and h backwards (the column map's input gradient), 4 h; under sequence parallelism it gathers h
    forwards, scatters h forwards, and backwards gathers h twice (the column map's input again, the row map's output
    gradient) and scatters h: 5 h. Embedding and head make a pair of their own. All in the type of matrix products (2
    bytes under autocast) but the embedding's output and its gradient, which are 4 bytes.
    """
    narrow, hidden = (2 if autocast else 4), config.hidden_size
    if sequence_parallel:
        pair, ends = 5 * narrow * hidden, 3 * narrow * hidden + 2 * 4 * hidden
    else:
        pair, ends = 4 * narrow * hidden, 2 * narrow * hidden + 2 * 4 * hidden
    return 2 * config.num_layers * pair + ends
