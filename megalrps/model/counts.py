"""Closed forms: parameters, floating-point operations and bytes of a model that need not be built. Imports no torch."""

from typing import Literal

from megalrps.model.config import ModelConfig

FlopConvention = Literal["full-square", "causal"]


def layer_matmul_weights(config: ModelConfig) -> int:
    """Weights of the linear maps of one layer: query and output, key and value, gate, up and down."""
    attention = 2 * config.query_width + 2 * config.key_value_width
    return config.hidden_size * (attention + 3 * config.feed_forward_width)


def non_embedding_parameter_count(config: ModelConfig) -> int:
    """Parameters of the layers and the final norm: all but embedding and head."""
    return config.num_layers * (layer_matmul_weights(config) + 2 * config.hidden_size) + config.hidden_size


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the model; a tied head counts once."""
    tables = 2 if config.untie_embeddings_and_output_weights else 1
    return non_embedding_parameter_count(config) + tables * config.vocab_size * config.hidden_size


def flops_per_token(config: ModelConfig, sequence_length: int, convention: FlopConvention = "full-square") -> int:
    """Floating-point operations of one training step, forward and backward, for one token.

    ``6 W + 12 L S d``: W weights of matrix products (the head, also a tied one, but not the embedding's gather), L
    layers, S tokens a sequence, d = heads x head size. ``"full-square"`` is the PaLM convention (arXiv 2204.02311,
    appendix B), which published model-FLOPs utilisation uses: it counts the masked half of the attention scores.
    ``"causal"`` halves that term. A multiplication and an addition are two operations; norms, rotary positions and
    softmax are not counted, and neither is anything recomputed.
    """
    weights = config.num_layers * layer_matmul_weights(config) + config.vocab_size * config.hidden_size
    square = 12 * config.num_layers * sequence_length * config.query_width
    return 6 * weights + (square if convention == "full-square" else square // 2)


def activation_bytes_per_token(
    config: ModelConfig, *, autocast: bool, ranks: int = 1, sequence_parallel: bool = False
) -> float:
    """Bytes kept for the backward pass, for one token, without recomputation.

    Elements a layer, with H hidden, A = heads x head size, G = key-value heads x head size, F feed-forward, N heads:
    each of the two norms keeps its input and the inverse root (H + 1) and hands H to the maps after it; attention keeps
    query, key, value, output and its log-sum-exp (2A + 2G + N); the feed-forward layer keeps gate, up and the product
    (3F). After the layers: the final norm, the head's input and the logits (2H + 1 + V). All are 4 bytes; under bf16
    autocast the outputs of matrix products and what is computed from them alone are 2.

    Of ``ranks`` tensor-parallel ranks each keeps its share of what lies between a column map and a row map and of the
    logits (a key-value head per rank where there are fewer), and of the norms' part its slice of the sequence under
    sequence parallelism, all of it without.
    """
    between_maps = 1 / ranks
    outside = between_maps if sequence_parallel else 1.0
    hidden, query = config.hidden_size, config.query_width
    key_value = max(config.query_groups, ranks) * config.head_size
    narrow = 2 if autocast else 4
    norm = outside * (4 * (hidden + 1) + narrow * hidden)
    attention = between_maps * (narrow * (2 * query + 2 * key_value) + 4 * config.num_attention_heads)
    feed_forward = between_maps * narrow * 3 * config.feed_forward_width
    logits = between_maps * narrow * config.vocab_size
    return config.num_layers * (2 * norm + attention + feed_forward) + norm + logits
