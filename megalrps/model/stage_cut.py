"""Where the model is cut into pipeline stages. Imports no torch."""

from megalrps.model.config import ModelConfig
from megalrps.model.counts import layer_matmul_weights
from megalrps.parallel.stages import Stage, cut_by_cost, parse_layout


def cut_model(config: ModelConfig, stages: int, *, sequence_length: int, layout: str | None) -> tuple[Stage, ...]:
    """The ``stages`` stages of the model: as ``layout`` spells them, or else of as equal cost as whole layers allow.

    Raises InputError for a layout that does not fit, or fewer layers than stages.
    """
    if layout is not None:
        return parse_layout(layout, config.num_layers, stages)
    layer, head = stage_costs(config, sequence_length)
    return cut_by_cost(config.num_layers, stages, layer_cost=layer, embedding_cost=0.0, head_cost=head)


def stage_costs(config: ModelConfig, sequence_length: int) -> tuple[float, float]:
    """FLOPs of the forward pass of one layer and of the head for one token; a multiplication and an addition are two.

    Attention is counted causal: half the square. The embedding is a gather, which costs none.
    """
    layer = 2 * layer_matmul_weights(config) + 2 * sequence_length * config.query_width
    return float(layer), float(2 * config.vocab_size * config.hidden_size)
